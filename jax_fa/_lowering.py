"""How primitives lower: the FFI call on CUDA, the reference elsewhere."""

import math

import jax
import numpy as np
from jax.interpreters import mlir

from . import _jax_fa, _layout, _limits

# Those that no kernel covers run through the reference on CUDA too; of others that is an error.
BACKWARD = ("jax_fa_fwd_bwd", "jax_fa_varlen_bwd")
# From so many tiles of queries for each key head on, a copy of 8-bit keys and values costs less
# than widening them for every tile (H200), or than products that take fp8 keys as they are.
_READERS_OF_COPIES, _READERS_OF_BYTES = 8, 16
_MOST_COPIED_BYTES = 2 << 30
_LAYOUTS = (_layout.SEPARATE, _layout.KV_PACKED, _layout.QKV_PACKED)


def reference_rule(name, reference, has_kernel):
    """Lowers to the reference, unless the call insists on a kernel where there is one."""
    generic = mlir.lower_fun(reference, multiple_results=True)

    def rule(ctx, *args, implementation, **static):
        if implementation == "cuda" and has_kernel:
            raise NotImplementedError(f"implementation='cuda' of {name} needs a CUDA device")
        return generic(ctx, *args, **static)

    return rule


def cuda_rule(op, reference, decode=None):
    """Lowers to the FFI call, or says why there is no kernel; of gradients to the reference.

    `decode` is the operation that takes over the calls that `decodes` names.
    """
    generic = mlir.lower_fun(reference, multiple_results=True)

    def call(*args, **static):
        operands = dict(zip(op.operands, args))
        if decode is not None and decodes(operands, static):
            return _ffi_call(decode, *as_decode(operands, static))
        return _ffi_call(op, operands, static)

    kernel = mlir.lower_fun(call, multiple_results=True)

    def rule(ctx, *args, implementation, **static):
        operands = dict(zip(op.operands, ctx.avals_in))
        if implementation == "reference" or _is_empty(operands):
            return generic(ctx, *args, **static)
        reason = _limits.no_kernel(op.name, operands, static)
        if reason and op.name in BACKWARD:
            return generic(ctx, *args, **static)
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


def _ffi_call(op, operands, static):
    avals = op.abstract_eval({name: jax.typeof(x) for name, x in operands.items()}, static)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    wanted = list(range(len(results)))
    if op.name == "jax_fa_decode":
        results += _decode_scratch(operands)
    elif op.name == "jax_fa_fwd":
        results += _prefill_scratch(operands, static)
    elif op.name in ("jax_fa_varlen_fwd", "jax_fa_hybrid"):
        results.append(jax.ShapeDtypeStruct((_jax_fa.taken_counts,), np.int32))
    if op.name == "jax_fa_hybrid":
        results += _hybrid_scratch(operands, static["split_size"])
    if op.name in BACKWARD:
        # dq, dk and dv, of which those in the buffer of another are absent, then the others
        buffers = _layout.BUFFERS[static.get("layout", _layout.SEPARATE)]
        absent = [jax.ShapeDtypeStruct((0,), np.float32)] * (3 - buffers)
        wanted[buffers:] = [i + len(absent) for i in wanted[buffers:]]
        results[buffers:buffers] = absent
        results += _backward_scratch(operands, static)
    call = jax.ffi.ffi_call(op.name, results, input_output_aliases=op.aliases)
    outs = call(*(operands[name] for name in op.operands), **_attributes(static))
    return [outs[i] for i in wanted]


def decodes(operands, static):
    """Whether the decode kernel takes a dense call: few queries, whose keys it splits over blocks.

    Prefill kernels compute a whole tile for each head, however few its queries, and split no keys:
    they take up to twelve times as long (H200, T = 1, 32 heads on one, 32 x 2048 keys).
    """
    q, k, v = (operands[name] for name in "qkv")
    if not all(isinstance(size, int) for size in q.shape + k.shape):  # symbolic
        return False
    return _means_the_same(operands, static) and _is_faster(q.shape, k.shape, v.shape[-1])


def _means_the_same(operands, static):
    """Whether the decode kernel has the features of a dense call."""
    q, k, v = (operands[name] for name in "qkv")
    if static["layout"] != _layout.SEPARATE or not q.dtype == k.dtype == v.dtype:
        return False
    if q.dtype == np.float32 or max(q.shape[-1], v.shape[-1]) > 256 or k.shape[0] != v.shape[0]:
        return False
    if any(operands[name].shape != (0,) for name in ("bias", "q_lengths", "seeds")):
        return False
    # the diagonal of decoding ends at the last key
    square = q.shape[1] == k.shape[1] and operands["kv_lengths"].shape == (0,)
    masked = static["window_left"] >= 0 or static["window_right"] >= 0
    diagonal = masked or operands["slopes"].shape != (0,)
    return square or not (static["top_left"] and diagonal)


def _is_faster(q, k, dim_v):
    """As measured on an H200; q and k are shapes."""
    batch, len_q, heads, dim = q
    group = heads // k[2]
    columns = group * len_q  # of the decode kernel's tiles
    if batch > _limits.MAX_DECODE_BATCH or len_q > 16 or columns > 64:
        return False
    if columns <= (8 if max(dim, dim_v) > 128 else 16):
        return True
    # else prefill wins while all its tiles run at once and keys are few
    return k[1] >= 2048 or (group > 1 and batch * heads >= 512)


def as_decode(operands, static):
    """Operands and static parameters of decoding for a dense call that `decodes`."""
    k, lengths = operands["k"], operands["kv_lengths"]
    if lengths.shape == (0,):
        lengths = np.full(operands["q"].shape[:1], k.shape[1], np.int32)
    same = ("q", "k", "v", "k_scale", "v_scale", "slopes", "sinks")
    maps = dict.fromkeys(("rows", "page_table", "layer"), np.zeros((0,), np.float32))
    kept = ("scale", "softcap", "window_left", "window_right", "exact")
    return (
        {name: operands[name] for name in same} | maps | {"kv_lengths": lengths},
        {name: static[name] for name in kept} | {"layer_stride": k.shape[0]},
    )


def copies(operands, static):
    """Whether a dense call copies 8-bit keys and values to arrays of q's dtype.

    Prefill kernels widen a tile of keys for every tile of queries that reads it, which costs more
    than doing it once where those are many (cuda/cache/copied.h).
    """
    q, k, v = (operands[name] for name in "qkv")
    if not all(isinstance(size, int) for size in q.shape + k.shape + v.shape):  # symbolic
        return False
    if static["layout"] != _layout.SEPARATE or q.dtype.itemsize != 2:
        return False
    if not k.dtype.itemsize == v.dtype.itemsize == 1:
        return False
    batch, len_q, heads, _ = q.shape
    readers = -(-len_q // 128) * (heads // k.shape[2]) * (batch // max(k.shape[0], 1))
    size = sum(math.prod(x.shape) * q.dtype.itemsize for x in _copies_of(operands))
    extras = ("k_scale", "v_scale", "slopes", "bias")
    plain = static["scale"] > 0 and not static["softcap"]
    plain = plain and all(operands[name].shape == (0,) for name in extras)
    as_bytes = plain and has_fp8_keys(operands)
    as_bytes = as_bytes and _jax_fa.multiplies_bytes(k.shape[-1], v.shape[-1])
    least = _READERS_OF_BYTES if as_bytes else _READERS_OF_COPIES
    return readers >= least and size <= _MOST_COPIED_BYTES


def _prefill_scratch(operands, static):
    """What launches count, and a call's copies of keys and values."""
    if not copies(operands, static):
        absent = jax.ShapeDtypeStruct((0,), np.float32)
        return [jax.ShapeDtypeStruct((_jax_fa.taken_counts,), np.int32), absent, absent]
    ints, _ = _copy_scratch(operands)
    return [jax.ShapeDtypeStruct((_jax_fa.taken_counts + ints,), np.int32), *_copies_of(operands)]


def _copies_of(operands):
    """Copies of keys and values in q's dtype, with place for some tokens more."""
    _, tokens = _copy_scratch(operands)
    return [
        jax.ShapeDtypeStruct((x.shape[0], tokens, *x.shape[2:]), operands["q"].dtype)
        for x in (operands["k"], operands["v"])
    ]


def _copy_scratch(operands):
    return _jax_fa.copy_scratch(*operands["k"].shape, operands["v"].shape[-1])


def _decode_scratch(operands):
    """Partial results of the splits, whose number depends on shapes alone."""
    q, v = operands["q"], operands["v"]
    batch, len_q, heads_q, dim = q.shape
    _, _, heads_kv, dim_v = v.shape
    splits = _jax_fa.decode_splits(
        batch, len_q, heads_q, heads_kv, dim, dim_v, cache_length(operands),
        decode_key_bytes(operands), has_groups(operands),
    )  # fmt: skip
    rows = (splits, batch * len_q, heads_q) if splits > 1 else (0,)
    o = (*rows, dim_v) if splits > 1 else (0,)
    return [jax.ShapeDtypeStruct(shape, np.float32) for shape in (o, rows)]


def _backward_scratch(operands, static):
    """Two floats for each query and head, and a float32 dq where that is summed."""
    q, o, lse = operands["q"], operands["o"], operands["lse"]
    packed = "q_start" in operands
    size = _jax_fa.dq_sum_size(
        batch=operands["q_start"].shape[0] if packed else q.shape[0],
        len_q=q.shape[0 if packed else 1],
        total_q=q.shape[0] if packed else 0,
        heads_q=q.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=o.shape[-1],
        element_bytes=q.dtype.itemsize,
        deterministic=static["deterministic"],
    )
    shapes = (math.prod(lse.shape), 2), (size,)
    return [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]


def _hybrid_scratch(operands, split_size):
    """Partial results of the rows that are decoded in parts, which the device chooses."""
    _, heads_q, dim = operands["q"].shape
    _, _, heads_kv, dim_v = operands["v"].shape
    batch = operands["kv_lengths"].shape[0]
    columns, rows = 0, 0
    if operands["q"].dtype != np.float32:
        columns, _ = _jax_fa.packed_scratch(
            batch, heads_q, heads_kv, dim, dim_v, cache_length(operands), split_size
        )
        rows = batch + 1 if columns else 0
    return [
        jax.ShapeDtypeStruct((columns, dim_v), np.float32),
        jax.ShapeDtypeStruct((columns,), np.float32),
        jax.ShapeDtypeStruct((rows, 2), np.int32),
    ]


def cache_length(operands):
    """Tokens that a row of a cache holds."""
    table = operands["page_table"].shape
    return operands["k"].shape[1] * (table[1] if len(table) == 2 else 1)


def decode_key_bytes(operands):
    """Bytes of a cache's element; 0 for what only the general decode kernels read."""
    k, v = operands["k"], operands["v"]
    pages = len(operands["page_table"].shape) == 2
    whole = not pages or k.shape[1] % 16 == 0
    plain = k.dtype == v.dtype and all(x.shape[-1] * x.dtype.itemsize % 16 == 0 for x in (k, v))
    plain = plain and (k.dtype.itemsize > 1 or _have_whole_groups(operands))
    return k.dtype.itemsize if whole and plain else 0


def prefill_key_bytes(operands):
    """Bytes of an element of k and v; 0 for quantized ones that only the portable kernels read."""
    sizes = {operands[name].dtype.itemsize for name in "kv"}
    known = len(sizes) == 1 and (1 not in sizes or _have_whole_groups(operands))
    return sizes.pop() if known else 0


def has_groups(operands):
    """Whether a key or a value of a head has several scales."""
    return any(operands[name].shape[-1] > 1 for name in ("k_scale", "v_scale"))


def has_fp8_keys(operands):
    """Whether Hopper's prefill kernel may multiply keys as they are stored (cuda/sm90/tiles.h)."""
    q, k, v = (operands[name].dtype for name in "qkv")
    suits = k.name.startswith("float8") and v.itemsize == 1 and not has_groups(operands)
    return q.name == "bfloat16" and suits


def _have_whole_groups(operands):
    """Whether no 16 elements of k or v have several scales."""

    def group(name):
        scale = operands.get(f"{name}_scale")
        groups = 1 if scale is None or scale.shape == (0,) else scale.shape[-1]
        return operands[name].shape[-1] // groups

    return all(group(name) % 16 == 0 for name in "kv")


def _attributes(static):
    """Static parameters as FFI attributes: the width of each must match its handler's."""

    def attribute(name, value):
        if name == "layout":
            return np.int32(_LAYOUTS.index(value))
        if name == "dropout_rate":
            return np.float64(value)  # no bit of its mask is rounded away
        if isinstance(value, bool):
            return np.bool_(value)
        return np.float32(value) if isinstance(value, float) else np.int32(value)

    return {name: attribute(name, value) for name, value in static.items()}
