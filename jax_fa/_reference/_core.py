"""Attention block of queries by chunk of keys with the online softmax (Milakov and Gimelshein 2018;
Dao 2023), so that no array of len_q x len_kv exists. Accumulation is float32 (float64 for float64
queries).

One core serves dense, packed and cached keys. It sees queries `[B, T, N, H]`, each with an interval
`[lo, hi)` of visible key positions, and a function that loads a chunk of keys.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._dropout import dropout_keep
from ._keys import slice_axis

# Elements of one block of scores, and of one gathered chunk of keys: 16 MiB of float32.
BLOCK = 1 << 22


class Queries(NamedTuple):
    """What the core knows about each query besides q itself; the axis T may be 1."""

    lo: Any  # [B, T] first visible key position
    hi: Any  # [B, T] end of the visible key positions; lo >= hi: none
    center: Any  # [B, T] the query's own key position (its diagonal), for ALiBi
    valid: Any  # [B, T] False: the result is 0 and -inf even with a sink
    index: Any  # [B, T] position within the row, for dropout and bias
    first: Any  # [B, T] key position of the row's key 0, for dropout
    slopes: Any  # [B, T, N] or None
    sinks: Any  # [B, T, N] or None
    seeds: Any  # [B, T, 2] or None


class Score(NamedTuple):
    """Static parameters of the map from q.k to the softmax's logits, and of dropout."""

    scale: float
    softcap: float
    dropout_rate: float
    dropout_heads: bool  # False: all heads drop the same probabilities


def acc_dtype(x):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def einsum(spec, x, y):
    return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)


def cdiv(a, b):
    return -(-a // b)


def block_size(batch, len_q, heads, chunk):
    """Queries in a block, so that a block of scores has about BLOCK elements."""
    return max(1, min(len_q, 1 << int(math.log2(max(16, BLOCK // (batch * heads * chunk))))))


def _pick(x, start, size, axis=1):
    """Block of an operand along its T axis, unless that axis is broadcast."""
    return None if x is None else slice_axis(x, axis, start, size)


def score(q, k, rows, bias, positions, start, params):
    """Logits `[B, N, T, chunk]` of one block, -inf where not visible, and dlogit/d(q.k)."""
    batch, len_q, heads_q, dim = q.shape
    rows_k, _, heads_kv, _ = k.shape
    q = q.reshape(batch // rows_k, rows_k, len_q, heads_kv, heads_q // heads_kv, dim)
    s = einsum("rbtkgh,bskh->rbkgts", q, k)
    s = s.reshape(batch, heads_q, len_q, k.shape[1]) * params.scale
    slope = params.scale
    if params.softcap:
        capped = jnp.tanh(s / params.softcap)
        slope = params.scale * (1 - capped * capped)
        s = params.softcap * capped
    at = positions[None, None]
    if rows.slopes is not None:
        distance = jnp.abs(rows.center[..., None] - at).astype(s.dtype)
        s = s - jnp.swapaxes(rows.slopes, 1, 2)[..., None].astype(s.dtype) * distance[:, None]
    if bias is not None:
        s = (s.reshape(-1, *bias.shape[:1], *s.shape[1:]) + bias[None]).reshape(s.shape)
    visible = (at >= rows.lo[..., None]) & (at < rows.hi[..., None]) & (at >= start)
    return jnp.where(visible[:, None], s, -jnp.inf), slope


def bias_block(bias, query, len_q, start, chunk, dtype):
    if bias is None:
        return None
    return slice_axis(slice_axis(bias, 2, query, len_q), 3, start, chunk).astype(dtype)


def keep_block(rows, positions, heads, params):
    """Dropout multiplier `[B, N, T, chunk]`."""
    head = jnp.arange(heads if params.dropout_heads else 1, dtype=jnp.int32)[None, :, None, None]
    seeds = rows.seeds[:, None, :, None]
    keep = dropout_keep(
        (seeds[..., 0], seeds[..., 1]),
        head,
        rows.index[:, None, :, None],
        positions[None, None, None] - rows.first[:, None, :, None],
        params.dropout_rate,
    )
    return jnp.where(keep, 1 / (1 - params.dropout_rate), 0.0)


def chunk_of(keys, chunk, index):
    """Start of a chunk inside the array and its positions: the last chunk is moved back."""
    begin = index * chunk
    start = jnp.minimum(begin, keys.length - chunk)
    return begin, start, start + jnp.arange(chunk, dtype=jnp.int32)


def load_chunk(keys, start):
    """A chunk, 0 where the array may hold anything (NaN included)."""
    x = keys.load(start)
    if keys.live is None:
        return x
    live = keys.live(start)
    x = x[None] if live.shape[0] != x.shape[0] else x  # rows of one array with lengths of their own
    live = live.reshape(-1, *x.shape[-4:-2], 1, 1) if x.ndim == 5 else live[..., None, None]
    return jnp.where(live, x, jnp.zeros_like(x, shape=())).reshape(-1, *x.shape[-3:])


def take_rows(rows, start, size):
    return Queries(*(_pick(x, start, size) for x in rows))


def pad_queries(x, axis, size):
    if x is None or x.shape[axis] == 1:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)


def attend(q, keys, values, rows, bias, chunk, params):
    """Returns o `[B, T, N, Hv]` and lse `[B, N, T]` in q's accumulation dtype.

    q `[B, T, N, H]`; bias `[B_b, N or 1, T or 1, S or 1]` or None.
    """
    batch, len_q, heads_q, _ = q.shape
    acc = acc_dtype(q)
    dim_v = jax.eval_shape(values.load, jnp.int32(0)).shape[-1]
    block = block_size(batch, len_q, heads_q, chunk)
    count = cdiv(len_q, block)
    if count > 1 and len_q % block:
        padded = count * block
        rows = Queries(*(pad_queries(x, 1, padded) for x in rows))
        bias = None if bias is None else pad_queries(bias, 2, padded)
        q = pad_queries(q, 1, padded)

    def one_block(i):
        query = i * block
        q_block = lax.dynamic_slice_in_dim(q, query, block, 1).astype(acc)
        r = take_rows(rows, query, block)
        q_block = jnp.where(r.valid[..., None, None], q_block, 0)

        def step(c, carry):
            m, total, o = carry
            begin, start, positions = chunk_of(keys, chunk, c)
            bias_part = bias_block(bias, query, block, start, chunk, acc)
            k, v = load_chunk(keys, start), load_chunk(values, start)
            s, _ = score(q_block, k, r, bias_part, positions, begin, params)
            m_new = jnp.maximum(m, s.max(-1))
            m_safe = jnp.where(m_new == -jnp.inf, 0, m_new)
            p = jnp.exp(s - m_safe[..., None])
            shrink = jnp.exp(m - m_safe)
            total = total * shrink + p.sum(-1)
            if params.dropout_rate:
                p = p * keep_block(r, positions, heads_q, params).astype(acc)
            rows_v, _, heads_kv, _ = v.shape
            p = p.reshape(batch // rows_v, rows_v, heads_kv, -1, block, chunk)
            pv = einsum("rbkgts,bskh->rbkgth", p, v).reshape(o.shape)
            return m_new, total, o * shrink[..., None] + pv

        # Carries start from an operand, so that they vary over the mesh axes that it varies over.
        zero = jnp.swapaxes(q_block[..., 0] * 0, 1, 2)
        zero = jnp.where(jnp.isnan(zero), 0, zero)
        if r.sinks is None:
            m, total = zero - jnp.inf, zero
        else:
            m, total = zero + jnp.swapaxes(r.sinks, 1, 2).astype(acc), zero + 1
        o = jnp.broadcast_to(zero[..., None], (*zero.shape, dim_v))
        first, last = chunk_bounds(r, chunk, keys.length)
        m, total, o = lax.fori_loop(first, last, step, (m, total, o))
        some = r.valid[:, None] & ((total > 0) | jnp.isnan(total))
        total = jnp.where(some, total, 1)
        lse = jnp.where(some, m + jnp.log(total), -jnp.inf)
        o = jnp.where(some[..., None], o / total[..., None], 0)
        return jnp.swapaxes(o, 1, 2), lse

    if count == 1:
        return one_block(jnp.int32(0))
    o, lse = lax.map(one_block, jnp.arange(count, dtype=jnp.int32))
    o = jnp.moveaxis(o, 0, 1).reshape(batch, count * block, heads_q, dim_v)
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads_q, count * block)
    return o[:, :len_q], lse[..., :len_q]


def chunk_bounds(rows, chunk, length):
    """Chunks that some query of the block sees, as a half-open range."""
    some = rows.lo < rows.hi
    first = jnp.min(jnp.where(some, rows.lo, length)) // chunk
    last = cdiv(jnp.minimum(length, jnp.max(jnp.where(some, rows.hi, 0))), chunk)
    return first.astype(jnp.int32), last.astype(jnp.int32)
