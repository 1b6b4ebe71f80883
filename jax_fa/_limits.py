"""What is legal for any attention, and what the kernels cover: the one table of limits."""

import os

import numpy as np

from . import _jax_fa

# plan.cc reads it too: sm80 keeps to the portable kernels.
if os.environ.get("JAX_FA_ARCH", "") not in ("", "sm80"):
    raise ValueError(f"JAX_FA_ARCH must be sm80 or unset, got {os.environ['JAX_FA_ARCH']}")

FLOATS = ("float16", "bfloat16", "float32", "float64")
_KERNEL_FLOATS = ("float16", "bfloat16", "float32")
MAX_DECODE_BATCH = 65535  # CUDA's bound on the third dimension of a grid
_ABSENT = np.empty(0)


def no_kernel(name, operands, static):
    """Why no kernel covers a primitive's call, or None. Operands are avals by name."""
    if name == "jax_fa_append":
        return _no_append_kernel(operands)
    q, k, v = (operands[i] for i in "qkv")
    if q.dtype.name not in _KERNEL_FLOATS:
        return f"q is {q.dtype.name}; kernels take {', '.join(_KERNEL_FLOATS)}"
    most = _jax_fa.max_head_dim(q.dtype.itemsize, name.endswith("_bwd"))
    for key, x in (("k", k), ("v", v)):
        dim = x.shape[-1]
        if dim % 8 or dim > most:
            return (
                f"head dim {dim} of {key}; {q.dtype.name} kernels take multiples of 8 up to {most}"
            )
    if q.dtype == np.float32 and not k.dtype == v.dtype == q.dtype:
        return f"float32 queries with {k.dtype.name} keys; kernels take float16 or bfloat16 ones"
    if name.endswith("_bwd"):
        for key, x in (("k", k), ("v", v)):
            if x.dtype != q.dtype:
                return f"{key} is {x.dtype.name}; gradients by kernels take q's, {q.dtype.name}"
    if static.get("exact") and (reason := _no_exact_kernel(name, operands)):
        return reason
    bias = operands.get("bias", q)
    if bias.dtype.name not in _KERNEL_FLOATS:
        return f"bias is {bias.dtype.name}; kernels take {', '.join(_KERNEL_FLOATS)}"
    if static.get("dropout_rate") and not k.dtype == v.dtype == q.dtype:
        return f"dropout over {k.dtype.name} keys; kernels have it for keys of q's dtype"
    return _no_scale_kernel(name, operands) or _no_grid(name, operands)


def _no_exact_kernel(name, operands):
    """Of float32 products that may not be rounded to TF32."""
    if name.endswith("_bwd") and operands.get("bias", _ABSENT).shape != (0,):
        return "a gradient of bias; exact float32 kernels have none"
    return None


def _no_append_kernel(operands):
    for name in ("k", "v", "k_new", "v_new"):
        if operands[name].dtype == np.float64:
            return f"{name} is float64; kernels take {', '.join(_KERNEL_FLOATS)}"
        if operands[name].shape[-1] % 4:
            return f"head dim {operands[name].shape[-1]} of {name}; kernels take multiples of 4"
    return _no_scale_kernel("jax_fa_append", operands)


def _no_scale_kernel(name, operands):
    """Scales are read beside their values: in the same rows, and for whole groups of 8 elements."""
    for key in ("k", "v"):
        values, scale = operands[key], operands[f"{key}_scale"]
        if scale.shape == (0,):
            continue
        group = values.shape[-1] // scale.shape[-1]
        if scale.shape[-1] > 1 and group % 8:
            return f"groups of {group} elements in {key}; kernels take multiples of 8"
        if name == "jax_fa_fwd" and scale.shape[0] not in (1, values.shape[0]):
            return (
                f"scales of {key} with batch {scale.shape[0]} for values with batch "
                f"{values.shape[0]}; kernels take the same batch or 1"
            )
    return None


def _no_grid(name, operands):
    """CUDA's bound on the second and third dimension of a grid."""
    if name == "jax_fa_decode" and operands["q"].shape[0] > MAX_DECODE_BATCH:
        return f"batch {operands['q'].shape[0]}; kernels take up to {MAX_DECODE_BATCH}"
    return None
