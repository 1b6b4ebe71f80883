"""Attention over whole sequences: dense, packed in one buffer, and variable lengths."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from . import _checks, _layout, _primitives, _sharding
from ._quantize import QuantizedArray


class Static(NamedTuple):
    """What the kernels of a call are chosen by; hashable, so that custom_vjp takes it."""

    scale: float
    softcap: float
    window_left: int
    window_right: int
    top_left: bool
    dropout_rate: float
    dropout_heads: bool
    exact: bool
    implementation: str | None
    deterministic: bool

    def forward(self):
        static = self._asdict()
        del static["deterministic"]
        return static


def flash_attention(
    q, k, v, *, scale=None, causal=False, window=None, softcap=None, alibi_slopes=None, sinks=None,
    bias=None, q_lengths=None, kv_lengths=None, dropout_rate=0.0, dropout_rng=None,
    broadcast_dropout=False, return_lse=False, deterministic=False, implementation=None,
):  # fmt: skip
    """Attention `softmax(scale * q k^T + ...) v` without the matrix of scores.

        score[i, j] = scale * <q_i, k_j>
        score       = softcap * tanh(score / softcap)             if softcap
        score      -= alibi_slopes[n] * |i + S' - T' - j|         if alibi_slopes
        score      += bias[b, n, i, j]                            if bias
        out_i       = sum_j softmax_j(score) v_j

    over the keys `j < S'` that query `i` sees; `T'` and `S'` are the row's own lengths. Query head
    n reads key head `n // (N // K)`. Accumulation is float32, float64 for float64 inputs. On CUDA
    products of float32 are rounded to TF32, except under `jax.default_matmul_precision("highest")`.

    Args:
      q: Queries `[B, T, N, H]`, float16, bfloat16, float32 or float64.
      k: Keys `[B, S, K, H]` of q's dtype, or a `QuantizedArray`; `N % K == 0`. On CUDA many queries
        over 8-bit keys and values read a copy of them, rounded to q's dtype (see `explain`).
      v: Values `[B, S, K, Hv]`, as k.
      scale: Multiplies the scores; `H ** -0.5` if None.
      causal: Whether query i sees only keys `j <= i + S' - T'` (aligned bottom-right).
      window: None, `w` or `(left, right)`, where None is unbounded: query i sees only keys with
        `-left <= j - (i + S' - T') <= right`.
      softcap: None, or what bounds the scores, > 0 (Gemma 2).
      alibi_slopes: `[N]` or `[B, N]` float: ALiBi (Press et al. 2022). Its gradient is 0.
      sinks: `[N]` or `[B, N]` float: a score of no key, in the softmax's denominator only.
      bias: `[B, N, T, S]` float, any axis may be 1; -inf hides a key.
      q_lengths: int32 `[B]`: rows at or past it give out 0 and lse -inf. None: T.
      kv_lengths: int32 `[B]`: keys at or past it are not seen and may hold anything. None: S.
      dropout_rate: Probability in `[0, 1)` with which an attention probability is dropped, to a
        multiple of `2**-15`. Which ones follows from the key and their position (Philox4x32-7,
        Salmon et al. 2011); any three are dropped independently of each other.
      dropout_rng: A JAX random key, needed if dropout_rate > 0.
      broadcast_dropout: Whether all rows and heads drop the same probabilities.
      return_lse: Whether to return lse too.
      deterministic: Whether gradients must be the same bits in every run. Else, for 16-bit inputs
        on CUDA, dq is summed in float32 in an order that changes; dk, dv and those of sinks and
        bias have one order in any case.
      implementation: None (the CUDA kernel on CUDA, the reference elsewhere), "cuda", "reference".

    Returns:
      out `[B, T, N, Hv]` of q's dtype, or `(out, lse)` with lse `[B, N, T]` float32 (float64 for
      float64): `log sum_j exp(score[i, j])`, without dropout. A query that sees no key gives out 0
      and lse -inf, or the sink where there is one. Both are differentiable, once, in reverse mode.

    Raises:
      ValueError: for shapes, dtypes or parameters that are wrong for any attention.
      NotImplementedError: on CUDA, for what no kernel covers.

    Sources: Dao, FlashAttention-2, 2023; Milakov and Gimelshein, Online normalizer calculation for
    softmax, 2018.
    """
    q, k, v = (_checks.as_array(x) for x in (q, k, v))
    return _dense(
        _layout.SEPARATE, (q, k, v), scale=scale, causal=causal, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, bias=bias, q_lengths=q_lengths,
        kv_lengths=kv_lengths, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout, return_lse=return_lse, deterministic=deterministic,
        implementation=implementation,
    )  # fmt: skip


def flash_attention_kvpacked(q, kv, **options):
    """`flash_attention` of keys and values in one buffer, which is read in place.

    Args:
      q: Queries `[B, T, N, H]`.
      kv: Keys and values `[B, S, 2, K, H]`.
      **options: As for `flash_attention`.

    Returns:
      As `flash_attention`. The gradient of kv is one buffer too.
    """
    q, kv = jnp.asarray(q), jnp.asarray(kv)
    _checks.shape("kv", kv, (None, None, 2, None, None), form="[B, S, 2, K, H]")
    return _dense(_layout.KV_PACKED, (q, kv), **options)


def flash_attention_qkvpacked(qkv, **options):
    """`flash_attention` of queries, keys and values in one buffer, which is read in place.

    Args:
      qkv: `[B, T, 3, N, H]`.
      **options: As for `flash_attention`.

    Returns:
      As `flash_attention`. The gradient of qkv is one buffer too.
    """
    qkv = jnp.asarray(qkv)
    _checks.shape("qkv", qkv, (None, None, 3, None, None), form="[B, T, 3, N, H]")
    return _dense(_layout.QKV_PACKED, (qkv,), **options)


def _dense(
    layout, buffers, *, scale=None, causal=False, window=None, softcap=None, alibi_slopes=None,
    sinks=None, bias=None, q_lengths=None, kv_lengths=None, dropout_rate=0.0, dropout_rng=None,
    broadcast_dropout=False, return_lse=False, deterministic=False, implementation=None,
    top_left=False,
):  # fmt: skip
    """Checks the arguments of a dense call and makes it."""
    q, k, v = jax.eval_shape(ft.partial(_layout.split, layout), *_operands(layout, buffers))
    _checks.queries("q", q, 4, "[B, T, N, H]")
    batch, len_q, heads, dim = q.shape
    k_heads, _ = _checks.keys("k", k, q, (batch, None), heads, dim, f"[{batch}, S, K, {dim}]")
    len_kv = k.shape[1]
    form = f"[{batch}, {len_kv}, K, Hv]"
    v_heads, _ = _checks.keys("v", v, q, (batch, len_kv), heads, None, form)
    _checks.same_heads(k_heads, v_heads)
    rate = _checks.dropout(dropout_rate, dropout_rng)
    left, right = _checks.window(window, causal)
    static = Static(
        _checks.scale_factor(scale, dim),
        _checks.positive("softcap", softcap),
        left,
        right,
        top_left,
        rate,
        not broadcast_dropout,
        _checks.exact(q),
        _checks.implementation(implementation),
        bool(deterministic),
    )
    form = f"[{batch}]"
    extras = {
        "slopes": _checks.per_head("alibi_slopes", alibi_slopes, batch, heads),
        "sinks": _checks.per_head("sinks", sinks, batch, heads),
        "bias": _checks.bias(bias, batch, heads, len_q, len_kv),
        "q_lengths": _checks.int32("q_lengths", q_lengths, (batch,), form=form),
        "kv_lengths": _checks.int32("kv_lengths", kv_lengths, (batch,), form=form),
        "seeds": _seeds(rate, dropout_rng, batch, broadcast_dropout),
    }

    def call(operands):
        return _attend(form, static, *operands)

    form = Form("jax_fa_fwd", "jax_fa_fwd_bwd", layout, (("layout", layout),))
    axes = "BT3NH" if layout == _layout.QKV_PACKED else "BTNH"
    operands = (buffers, extras)
    o, lse = _sharding.run(call, operands, buffers[0], axes, ("BTNH", "BNT"))
    return (o, lse) if return_lse else o


def _seeds(rate, rng, batch, broadcast):
    if not rate:
        return None
    rows = 1 if broadcast else batch
    return jnp.broadcast_to(jax.random.bits(rng, (rows, 2), jnp.uint32), (batch, 2))


def _operands(layout, buffers):
    """q, k and v as operands of a primitive, from the layout's buffers."""
    if layout == _layout.QKV_PACKED:
        return buffers * 3
    if layout == _layout.KV_PACKED:
        return (*buffers, buffers[1])
    return buffers


def key_operands(k, v):
    """Operands of keys and values, plain or quantized."""
    operands = {}
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, QuantizedArray):
            operands |= {name: x.values, f"{name}_scale": x.scale}
        else:
            operands[name] = x
    return operands


class Form(NamedTuple):
    """Which primitives a call binds, and with what besides `Static`; hashable as that is."""

    forward: str
    backward: str
    layout: str
    params: tuple[tuple[str, object], ...]


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(form, static, buffers, extras):
    """o and lse; the layout's buffers and everything else by operand name."""
    q, k, v = _operands(form.layout, buffers)
    operands = {"q": q, **key_operands(k, v), **extras}
    o, lse = _primitives.bind(form.forward, operands, **dict(form.params), **static.forward())
    if form.layout == _layout.QKV_PACKED:
        return o[:, :, 0], lse[..., 0, 0]
    return o, lse[..., 0]


def _attend_fwd(form, static, buffers, extras):
    o, lse = _attend(form, static, buffers, extras)
    o, lse = checkpoint_name(o, "jax_fa_out"), checkpoint_name(lse, "jax_fa_lse")
    return (o, lse), (buffers, extras, o, lse)


def _attend_bwd(form, static, residuals, cotangents):
    buffers, extras, o, lse = residuals
    do, dlse = cotangents
    q, k, v = _operands(form.layout, buffers)
    operands = {
        "q": q, **key_operands(k, v), **extras,
        "o": o, "lse": lse[..., None], "do": do, "dlse": dlse[..., None],
    }  # fmt: skip
    results = _primitives.bind(form.backward, operands, **dict(form.params), **static._asdict())
    # the buffers', then those of sinks and bias
    grads, (dsinks, *dbias) = results[: len(buffers)], results[len(buffers) :]
    grads = tuple(
        None if isinstance(x, QuantizedArray) else dx for x, dx in zip(buffers, grads, strict=True)
    )
    dextras = dict.fromkeys(extras)
    if extras["sinks"] is not None:
        dextras["sinks"] = dsinks
    if extras.get("bias") is not None:
        shared = extras["bias"].shape[0] == 1
        dextras["bias"] = dbias[0].sum(0, keepdims=True) if shared else dbias[0]
    return grads, dextras


_attend.defvjp(_attend_fwd, _attend_bwd)


def flash_attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, *, max_seqlen_q, max_seqlen_k, scale=None, causal=False,
    window=None, softcap=None, alibi_slopes=None, sinks=None, dropout_rate=0.0, dropout_rng=None,
    return_lse=False, deterministic=False, implementation=None,
):  # fmt: skip
    """`flash_attention` of rows of different lengths, packed without padding.

    Row b has the queries `cu_seqlens_q[b] : cu_seqlens_q[b + 1]` and the keys
    `cu_seqlens_k[b] : cu_seqlens_k[b + 1]`. Tokens past the last row may hold anything.

    Args:
      q: Queries `[total_q, N, H]`.
      k: Keys `[total_k, K, H]`, or a `QuantizedArray` with scale `[K, total_k, G]`.
      v: Values `[total_k, K, Hv]`, as k.
      cu_seqlens_q: int32 `[B + 1]`, starting at 0, never decreasing.
      cu_seqlens_k: int32 `[B + 1]`, likewise.
      max_seqlen_q: An upper bound on the queries of a row.
      max_seqlen_k: An upper bound on the keys of a row.
      scale, causal, window, softcap, alibi_slopes, sinks, dropout_rate, dropout_rng, return_lse,
        deterministic, implementation: As for `flash_attention`.

    Returns:
      out `[total_q, N, Hv]`, or `(out, lse)` with lse `[N, total_q]`; 0 and -inf past the last row.

    Raises:
      ValueError, NotImplementedError: As for `flash_attention`.
    """
    q, k, v = (_checks.as_array(x) for x in (q, k, v))
    _checks.queries("q", q, 3, "[total_q, N, H]")
    _, heads, dim = q.shape
    k_heads, _ = _checks.keys("k", k, q, (None,), heads, dim, f"[total_k, K, {dim}]")
    total_k = k.shape[0]
    v_heads, _ = _checks.keys("v", v, q, (total_k,), heads, None, f"[{total_k}, K, Hv]")
    _checks.same_heads(k_heads, v_heads)
    cu_seqlens_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    batch = cu_seqlens_q.shape[0] - 1
    cu_seqlens_k = _checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, batch)
    rate = _checks.dropout(dropout_rate, dropout_rng)
    left, right = _checks.window(window, causal)
    static = Static(
        _checks.scale_factor(scale, dim),
        _checks.positive("softcap", softcap),
        left,
        right,
        False,
        rate,
        True,
        _checks.exact(q),
        _checks.implementation(implementation),
        bool(deterministic),
    )
    params = (
        ("max_len_q", _checks.bound("max_seqlen_q", max_seqlen_q)),
        ("max_len_kv", _checks.bound("max_seqlen_k", max_seqlen_k)),
    )
    form = Form("jax_fa_varlen_fwd", "jax_fa_varlen_bwd", _layout.SEPARATE, params)
    extras = {
        "slopes": _checks.per_head("alibi_slopes", alibi_slopes, batch, heads),
        "sinks": _checks.per_head("sinks", sinks, batch, heads),
        "seeds": _seeds(rate, dropout_rng, batch, False),
        "q_start": cu_seqlens_q[:-1],
        "q_length": cu_seqlens_q[1:] - cu_seqlens_q[:-1],
        "k_start": cu_seqlens_k[:-1],
        "k_length": cu_seqlens_k[1:] - cu_seqlens_k[:-1],
    }

    def call(operands):
        return _attend(form, static, *operands)

    o, lse = _sharding.run(call, ((q, k, v), extras), q, "TNH", ("TNH", "NT"))
    return (o, lse) if return_lse else o
