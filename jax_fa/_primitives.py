"""One JAX primitive per operation: abstract evaluation, batching, and a lowering per platform.

A primitive carries the name of its FFI handler in cuda/ffi.cc, which is what the jaxpr and the HLO
print (but a jax_fa_fwd of few queries lowers to the handler of jax_fa_decode). Elsewhere than on
CUDA, and for the names in REFERENCE_ONLY everywhere, it lowers to the function of that name in
`_reference`; so do gradients that no kernel covers.

Operands, each with the way it behaves under vmap (`Kind`):

  q, o, do          dense `[B, T, N, H]` or packed `[total, N, H]`
  lse, dlse         dense `[B, N, T, 1]` or packed `[N, total, 1]`: of the rank of q, so that
                    `q.update` makes their type
  k, v              dense `[B_x, S, K, H]`, packed `[total_k, K, H]`, caches `[X, S, K, H]` or pools
                    `[P, page, K, H]`; each dense one has its own B_x, which divides B, and batch
                    row b reads row b % B_x
  k_scale, v_scale  float32 `[B_x | X | P, K, S | page, G]`, packed `[K, total_k, G]`, any axis but
                    the last may be 1
  slopes, sinks     float32 `[B, N]`
  bias              `[B_x, N | 1, T | 1, S | 1]`
  *_lengths, counts int32 `[B]`
  *_start           int32 `[B]`: where a row's tokens begin in a packed array
  rows, page_table  int32 `[B]`, `[B, max_pages]`: rows or pages of a cache that batch row b reads
  layer             int32 `[1]` or `[B]`
  seeds             uint32 `[B, 2]`

Absent optional operands have shape `[0]`.
"""

import functools as ft

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from . import _batching, _jax_fa, _layout, _lowering, _reference
from ._batching import Kind, Operation

# Primitives without a handler: they lower to the reference on every platform.
REFERENCE_ONLY = frozenset()


_Q_PACKED = {"q_start": Kind.Q_START, "q_length": Kind.ROW}
_K_PACKED = {"k_start": Kind.K_START, "k_length": Kind.ROW}
_PER_HEAD = {"slopes": Kind.ROW, "sinks": Kind.ROW}


def _keys(kind, scale_kind=None):
    scale_kind = scale_kind or kind
    return {"k": kind, "v": kind, "k_scale": scale_kind, "v_scale": scale_kind}


_CACHE_MAPS = {"rows": Kind.ROW_MAP, "page_table": Kind.PAGE_MAP, "layer": Kind.LAYER}

_FWD = {
    "q": Kind.ROW,
    **_keys(Kind.KEYS),
    **_PER_HEAD,
    "bias": Kind.KEYS,
    "q_lengths": Kind.ROW,
    "kv_lengths": Kind.ROW,
    "seeds": Kind.ROW,
}
_VARLEN = {
    "q": Kind.TOKENS,
    **_keys(Kind.PACKED_KEYS, Kind.PACKED_KEYS_1),
    **_PER_HEAD,
    "seeds": Kind.ROW,
    **_Q_PACKED,
    **_K_PACKED,
}


def _is_absent(x):
    return x.shape == (0,)


def _lse_dtype(q):
    return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)


def _attention_avals(q, v):
    """o and lse of queries of q's form: `[..., T, N, H]` to lse `[..., N, T, 1]`."""
    *lead, len_q, heads, _ = q.shape
    o = q.update(shape=(*lead, len_q, heads, v[-1]))
    return [o, q.update(shape=(*lead, heads, len_q, 1), dtype=_lse_dtype(q))]


def _fwd_avals(x, static):
    """A packed qkv has rank 5, as have its results: `[B, T, 1, N, Hv]` and `[B, N, T, 1, 1]`."""
    q = x["q"]
    if static["layout"] == _layout.QKV_PACKED:
        batch, len_q, _, heads, dim = q.shape
        lse = q.update(shape=(batch, heads, len_q, 1, 1), dtype=_lse_dtype(q))
        return [q.update(shape=(batch, len_q, 1, heads, dim)), lse]
    return _attention_avals(q, x["v"].shape)


def _fwd_bwd_avals(x, static):
    """dq, dk, dv in the layout's buffers, with the queries' batch, then dsinks and dbias."""
    q = x["q"]
    batch = q.shape[0]
    buffers = {_layout.QKV_PACKED: "", _layout.KV_PACKED: "k"}.get(static["layout"], "kv")
    grads = [x[i].update(shape=(batch, *x[i].shape[1:]), dtype=q.dtype) for i in buffers]
    bias = x["bias"]
    dbias = bias if _is_absent(bias) else bias.update(shape=(batch, *bias.shape[1:]))
    return [q, *grads, x["sinks"], dbias]


def _varlen_bwd_avals(x, static):
    q = x["q"]
    return [q, *(x[name].update(dtype=q.dtype) for name in ("k", "v")), x["sinks"]]


OPERATIONS = {
    op.name: op
    for op in [
        Operation("jax_fa_fwd", _FWD, (Kind.ROW, Kind.ROW), _fwd_avals, batch="q"),
        Operation(
            "jax_fa_fwd_bwd",
            {**_FWD, "o": Kind.ROW, "lse": Kind.ROW, "do": Kind.ROW, "dlse": Kind.ROW},
            (Kind.ROW,) * 5,
            _fwd_bwd_avals,
            batch="q",
        ),
        Operation(
            "jax_fa_varlen_fwd",
            _VARLEN,
            (Kind.TOKENS, Kind.TOKENS_1),
            lambda x, static: _attention_avals(x["q"], x["v"].shape),
            batch="q_start",
        ),
        Operation(
            "jax_fa_varlen_bwd",
            {
                **_VARLEN,
                "o": Kind.TOKENS,
                "lse": Kind.TOKENS_1,
                "do": Kind.TOKENS,
                "dlse": Kind.TOKENS_1,
            },
            (Kind.TOKENS, Kind.PACKED_KEYS, Kind.PACKED_KEYS, Kind.ROW),
            _varlen_bwd_avals,
            batch="q_start",
        ),
        Operation(
            "jax_fa_decode",
            {
                "q": Kind.ROW,
                **_keys(Kind.CACHE),
                **_PER_HEAD,
                "kv_lengths": Kind.ROW,
                **_CACHE_MAPS,
            },
            (Kind.ROW, Kind.ROW),
            lambda x, static: _attention_avals(x["q"], x["v"].shape),
            batch="kv_lengths",
        ),
        Operation(
            "jax_fa_hybrid",
            {
                "q": Kind.TOKENS,
                **_keys(Kind.CACHE),
                **_PER_HEAD,
                **_Q_PACKED,
                "kv_lengths": Kind.ROW,
                **_CACHE_MAPS,
            },
            (Kind.TOKENS, Kind.TOKENS_1),
            lambda x, static: _attention_avals(x["q"], x["v"].shape),
            batch="kv_lengths",
        ),
        Operation(
            "jax_fa_append",
            {
                **_keys(Kind.CACHE),
                "k_new": Kind.TOKENS,
                "v_new": Kind.TOKENS,
                "new_start": Kind.Q_START,
                "counts": Kind.ROW,
                "lengths": Kind.ROW,
                **_CACHE_MAPS,
                "cos": Kind.TABLE,
                "sin": Kind.TABLE,
            },
            (Kind.CACHE,) * 4,
            lambda x, static: [x[name] for name in ("k", "v", "k_scale", "v_scale")],
            batch="lengths",
            aliases={0: 0, 1: 1, 2: 2, 3: 3},
        ),
    ]
}


def _primitive(op):
    p = Primitive(op.name)
    p.multiple_results = True
    p.def_impl(ft.partial(xla.apply_primitive, p))

    def abstract_eval(*avals, **static):
        return op.abstract_eval(dict(zip(op.operands, avals)), static)

    p.def_abstract_eval(abstract_eval)
    reference = getattr(_reference, op.name.removeprefix("jax_fa_"))
    has_kernel = op.name not in REFERENCE_ONLY
    mlir.register_lowering(p, _lowering.reference_rule(op.name, reference, has_kernel))
    if has_kernel:
        decode = OPERATIONS["jax_fa_decode"] if op.name == "jax_fa_fwd" else None
        rule = _lowering.cuda_rule(op, reference, decode)
        mlir.register_lowering(p, rule, platform="cuda")
    batching.primitive_batchers[p] = ft.partial(_batching.batch, op, p)
    ad.primitive_jvps[p] = ft.partial(_no_derivative, op.name)
    return p


def _no_derivative(name, primals, tangents, **static):
    if name in ("jax_fa_decode", "jax_fa_hybrid", "jax_fa_append"):
        raise NotImplementedError(
            f"{name} has no derivative: caches are for inference; use flash_attention to train"
        )
    raise NotImplementedError(
        f"{name} has no derivative: attention has first derivatives in reverse mode only"
    )


for _name, _handler in _jax_fa.handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")

PRIMITIVES = {name: _primitive(op) for name, op in OPERATIONS.items()}


def absent(dtype=np.float32):
    """The operand that stands for an optional one that is not given."""
    return jnp.zeros((0,), dtype)


def bind(name, operands, **static):
    """Binds a primitive: operands by name (those not given, or None, are absent)."""
    op = OPERATIONS[name]
    unknown = operands.keys() - op.operands.keys()
    assert not unknown, f"{name} has no operands {unknown}"
    present = {key: x for key, x in operands.items() if x is not None}
    args = [present[key] if key in present else absent() for key in op.operands]
    return PRIMITIVES[name].bind(*args, **static)


# What `jax.export` needs to let this library's custom calls pass.
DISABLED_EXPORT_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(name)
    for name in OPERATIONS
    if name not in REFERENCE_ONLY
)
