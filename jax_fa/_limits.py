"""What is legal for any attention, and what the kernels cover: the one table of limits."""

import numpy as np

from . import _jax_fa

FLOATS = ("float16", "bfloat16", "float32", "float64")
_KERNEL_FLOATS = ("float16", "bfloat16", "float32")
_MAX_HEAD_DIM = max(_jax_fa.head_dims)


def no_kernel(name, operands, static):
    """Why no kernel covers a primitive's call, or None. Operands are avals by name."""
    if name == "jax_fa_append":
        return _no_append_kernel(operands)
    q, k, v = (operands[i] for i in "qkv")
    if q.dtype.name not in _KERNEL_FLOATS:
        return f"q is {q.dtype.name}; kernels take {', '.join(_KERNEL_FLOATS)}"
    dim, dim_v = k.shape[-1], v.shape[-1]
    if dim % 8 or dim > _MAX_HEAD_DIM:
        return f"head dim {dim}; kernels take multiples of 8 up to {_MAX_HEAD_DIM}"
    if dim_v != dim:
        return f"head dim {dim_v} of v; kernels take that of k, {dim}"
    if q.dtype == np.float32 and not k.dtype == v.dtype == q.dtype:
        return f"float32 queries with {k.dtype.name} keys; kernels take float16 or bfloat16 ones"
    if static.get("dropout_rate"):
        return f"dropout_rate={static['dropout_rate']}; kernels have no dropout"
    if static.get("split_size"):
        return f"split_size={static['split_size']}; kernels have no fixed splits"
    return None


def _no_append_kernel(operands):
    for name in ("k", "v", "k_new", "v_new"):
        if operands[name].dtype == np.float64:
            return f"{name} is float64; kernels take {', '.join(_KERNEL_FLOATS)}"
    return None
