"""How primitives lower: the FFI call on CUDA, the reference elsewhere."""

import jax
import numpy as np
from jax.interpreters import mlir

from . import _jax_fa, _layout, _limits

_LAYOUTS = (_layout.SEPARATE, _layout.KV_PACKED, _layout.QKV_PACKED)


def reference_rule(name, reference, has_kernel):
    """Lowers to the reference, unless the call insists on a kernel where there is one."""
    generic = mlir.lower_fun(reference, multiple_results=True)

    def rule(ctx, *args, implementation, **static):
        if implementation == "cuda" and has_kernel:
            raise NotImplementedError(f"implementation='cuda' of {name} needs a CUDA device")
        return generic(ctx, *args, **static)

    return rule


def cuda_rule(op, reference):
    """Lowers to the FFI call, or says why there is no kernel."""
    generic = mlir.lower_fun(reference, multiple_results=True)

    def call(*args, **static):
        return _ffi_call(op, args, static)

    kernel = mlir.lower_fun(call, multiple_results=True)

    def rule(ctx, *args, implementation, **static):
        operands = dict(zip(op.operands, ctx.avals_in))
        if implementation == "reference" or _is_empty(operands):
            return generic(ctx, *args, **static)
        reason = _limits.no_kernel(op.name, operands, static)
        if reason:
            raise NotImplementedError(f"{op.name} has no CUDA kernel for this call: {reason}")
        return kernel(ctx, *args, **static)

    return rule


def _is_empty(operands):
    """Whether no query sees a key, or nothing is appended: constants, which need no kernel."""
    if "k_new" in operands:
        return 0 in operands["k_new"].shape
    table = operands["page_table"].shape if "page_table" in operands else ()
    rows = operands["q_start"].shape if "q_start" in operands else ()
    return any(0 in operands[i].shape for i in "qkv") or 0 in rows or 0 in table[1:]


def _ffi_call(op, args, static):
    operands = dict(zip(op.operands, args))
    avals = op.abstract_eval({name: jax.typeof(x) for name, x in operands.items()}, static)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    count = len(results)
    if op.name == "jax_fa_decode":
        results += _decode_scratch(operands)
    elif op.name in ("jax_fa_fwd", "jax_fa_varlen_fwd", "jax_fa_hybrid"):
        results.append(jax.ShapeDtypeStruct((1,), np.int32))  # of prefill: tiles that were taken
    call = jax.ffi.ffi_call(op.name, results, input_output_aliases=op.aliases)
    return call(*args, **_attributes(static))[:count]


def _decode_scratch(operands):
    """Partial results of the splits, whose number depends on shapes alone."""
    q, v = operands["q"], operands["v"]
    splits = _jax_fa.decode_splits(*decode_shape(operands))
    rows = (splits, q.shape[0] * q.shape[1], q.shape[2]) if splits > 1 else (0,)
    o = (*rows, v.shape[-1]) if splits > 1 else (0,)
    return [jax.ShapeDtypeStruct(shape, np.float32) for shape in (o, rows)]


def decode_shape(operands):
    """batch, len_q, heads_q, heads_kv, head_dim and the longest row of a decode call."""
    batch, len_q, heads_q, dim = operands["q"].shape
    _, size, heads_kv, _ = operands["k"].shape
    table = operands["page_table"].shape
    return batch, len_q, heads_q, heads_kv, dim, size * table[1] if len(table) == 2 else size


def _attributes(static):
    """Static parameters as FFI attributes: the width of each must match its handler's."""

    def attribute(name, value):
        if name == "layout":
            return np.int32(_LAYOUTS.index(value))
        if isinstance(value, bool):
            return np.bool_(value)
        return np.float32(value) if isinstance(value, float) else np.int32(value)

    return {name: attribute(name, value) for name, value in static.items()}
