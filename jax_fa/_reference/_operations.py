"""The reference of every primitive: from its operands to the core.

Functions carry the names of the primitives without `jax_fa_`; `_primitives` lists their operands.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .. import _layout
from ._backward import attend_bwd
from ._core import BLOCK, Queries, Score, acc_dtype, attend, cdiv
from ._keys import absent, cached_keys, dense_keys, in_some_row, paged_keys, row_of_token

CHUNK = 512
_WIDEST = 1 << 29  # a window that is wider than any length, and overflows with none


def _interval(index, len_q, len_kv, static):
    """lo, hi, center and validity of query `index` of rows with those lengths."""
    left, right = (min(static[name], _WIDEST) for name in ("window_left", "window_right"))
    center = index if static.get("top_left") else index + len_kv - len_q
    hi = len_kv if right < 0 else jnp.minimum(len_kv, center + right + 1)
    lo = jnp.zeros_like(center) if left < 0 else jnp.maximum(0, center - left)
    hi = jnp.broadcast_to(hi, center.shape)
    valid = index < len_q
    return jnp.where(valid, lo, 0), jnp.where(valid, hi, 0), center, valid


def _per_row(x):
    """[B, ...] as [B, 1, ...] or None."""
    x = absent(x)
    return None if x is None else x[:, None]


def _within(lengths, most):
    """Lengths as kernels take them: none is below 0 or past the array."""
    return jnp.clip(lengths, 0, most)


def _rows(batch, len_q, q_lengths, len_kv, static, slopes, sinks, seeds):
    index = jnp.broadcast_to(jnp.arange(len_q, dtype=jnp.int32), (batch, len_q))
    q_lengths = len_q if absent(q_lengths) is None else _within(q_lengths, len_q)[:, None]
    lo, hi, center, valid = _interval(index, q_lengths, len_kv, static)
    first = jnp.zeros_like(index)
    per_row = (_per_row(x) for x in (slopes, sinks, seeds))
    return Queries(lo, hi, center, valid, index, first, *per_row)


def _chunk(length, row_elements=1):
    """Keys in a chunk: CHUNK, fewer where a chunk's rows would be large."""
    return max(1, min(length, CHUNK, max(16, BLOCK // max(1, row_elements))))


def _params(static):
    return Score(
        float(static["scale"]),
        float(static["softcap"]),
        static.get("dropout_rate", 0.0),
        static.get("dropout_heads", True),
    )


def _no_keys(q, dim_v, sinks_row):
    """o and lse of queries that see no key."""
    batch, len_q, heads_q, _ = q.shape
    acc = acc_dtype(q)
    lse = jnp.full((batch, heads_q, len_q), -jnp.inf, acc)
    if sinks_row is not None:
        lse = jnp.broadcast_to(jnp.swapaxes(sinks_row, 1, 2).astype(acc), lse.shape)
    return jnp.zeros((batch, len_q, heads_q, dim_v), acc), lse


def _dense(q, k, v, k_scale, v_scale, slopes, sinks, bias, q_lengths, kv_lengths, seeds, static):
    """Arguments of the core for the dense primitives."""
    q, k, v = _layout.split(static["layout"], q, k, v)
    batch, len_q = q.shape[:2]
    len_kv = k.shape[1]
    acc = acc_dtype(q)
    chunk = _chunk(len_kv)
    lengths = absent(kv_lengths)
    live = None
    if lengths is not None:
        lengths = _within(lengths, len_kv)

        def live(start):
            return (start + jnp.arange(chunk, dtype=jnp.int32))[None] < lengths[:, None]

        len_kv = lengths[:, None]
    rows = _rows(batch, len_q, q_lengths, len_kv, static, slopes, sinks, seeds)
    keys = dense_keys(k, absent(k_scale), chunk, acc, live)
    values = dense_keys(v, absent(v_scale), chunk, acc, live)
    return q, keys, values, rows, absent(bias), chunk, _params(static)


def fwd(q, k, v, *operands, **static):
    """[B, T, N, H] over [B_x, S, K, H]; see `_primitives` for the operands."""
    q_, k_, v_ = _layout.split(static["layout"], q, k, v)
    if 0 in (*q_.shape, *k_.shape):
        rows = _rows(*q_.shape[:2], operands[5], 0, static, *operands[2:4], operands[7])
        o, lse = _no_keys(q_, v_.shape[-1], rows.sinks)
        lse = jnp.where(rows.valid[:, None], lse, -jnp.inf)
    else:
        o, lse = attend(*_dense(q, k, v, *operands, static))
    if static["layout"] == _layout.QKV_PACKED:
        o, lse = o[:, :, None], lse[..., None]
    return [o.astype(q.dtype), lse[..., None]]


def fwd_bwd(q, k, v, *operands, **static):
    *operands, o, lse, do, dlse = operands
    q_, k_, v_ = _layout.split(static["layout"], q, k, v)
    core = _dense(q, k, v, *operands, static)
    batch = q_.shape[0]
    sinks, bias = core[3].sinks, core[4]
    if 0 in (*q_.shape, *k_.shape):
        dq, dk, dv = (jnp.zeros((batch, *x.shape[1:]), q.dtype) for x in (q_, k_, v_))
        dsinks = None if sinks is None else jnp.where(lse > -jnp.inf, dlse, 0)[..., 0].sum(-1)
        dbias = None if bias is None else jnp.zeros((batch, *bias.shape[1:]), q.dtype)
    else:
        dq, dk, dv, dsinks, dbias = attend_bwd(*core, o, lse[..., 0], do, dlse[..., 0])
        dsinks = None if dsinks is None else dsinks.sum(1)
    grads = _layout.join(static["layout"], *(x.astype(q.dtype) for x in (dq, dk, dv)))
    dsinks = operands[3] if dsinks is None else dsinks.astype(sinks.dtype)
    dbias = operands[4] if dbias is None else dbias.astype(bias.dtype)
    return [*grads, dsinks, dbias]


def _packed(q, k, v, k_scale, v_scale, slopes, sinks, seeds, starts, static):
    """Arguments of the core for the packed primitives: one row of all tokens."""
    q_start, q_length, k_start, k_length = starts
    total_q, total_k = q.shape[0], k.shape[0]
    acc = acc_dtype(q)
    chunk = _chunk(total_k)
    row, inside = row_of_token(q_start, q_length, total_q)
    index = jnp.arange(total_q, dtype=jnp.int32) - q_start[row]
    lo, hi, center, valid = _interval(index, q_length[row], k_length[row], static)
    first = k_start[row]
    valid = valid & inside
    lo, hi = (jnp.where(valid, x + first, 0) for x in (lo, hi))
    per_token = (None if absent(x) is None else x[row][None] for x in (slopes, sinks, seeds))
    rows = Queries(*(x[None] for x in (lo, hi, center + first, valid, index, first)), *per_token)
    key_inside = in_some_row(k_start, k_length, total_k)

    def live(start):
        return lax.dynamic_slice_in_dim(key_inside, start, chunk)[None]

    scales = (None if absent(x) is None else x[None] for x in (k_scale, v_scale))
    keys, values = (
        dense_keys(x[None], scale, chunk, acc, live) for x, scale in zip((k, v), scales)
    )
    return q[None], keys, values, rows, None, chunk, _params(static)


def _outside(q, dim_v):
    """o and lse of packed queries none of which lies in a row."""
    o, lse = _no_keys(q[None], dim_v, None)
    return [o[0].astype(q.dtype), lse[0][..., None]]


def varlen_fwd(q, k, v, k_scale, v_scale, slopes, sinks, seeds, *starts, **static):
    if 0 in (*q.shape, *starts[0].shape):
        return _outside(q, v.shape[-1])
    core = _packed(q, k, v, k_scale, v_scale, slopes, sinks, seeds, starts, static)
    if k.shape[0] == 0:
        o, lse = _no_keys(core[0], v.shape[-1], core[3].sinks)
        lse = jnp.where(core[3].valid[:, None], lse, -jnp.inf)
    else:
        o, lse = attend(*core)
    return [o[0].astype(q.dtype), lse[0][..., None]]


def varlen_bwd(q, k, v, k_scale, v_scale, slopes, sinks, seeds, *operands, **static):
    *starts, o, lse, do, dlse = operands
    if 0 in (*q.shape, *starts[0].shape):
        return [*(jnp.zeros(x.shape, q.dtype) for x in (q, k, v)), jnp.zeros_like(sinks)]
    core = _packed(q, k, v, k_scale, v_scale, slopes, sinks, seeds, starts, static)
    row, inside = row_of_token(*starts[:2], q.shape[0])
    if k.shape[0] == 0:
        dq, dk, dv = (jnp.zeros(x.shape, q.dtype) for x in (q, k, v))
        dsinks = jnp.where(lse > -jnp.inf, dlse, 0)[..., 0].T[None]
    else:
        dq, dk, dv, dsinks, _ = attend_bwd(
            *core, o[None], lse[None, ..., 0], do[None], dlse[None, ..., 0]
        )
        dq, dk, dv = dq[0], dk[0], dv[0]
    if absent(sinks) is None:
        dsinks = sinks
    else:
        part = jnp.where(inside[:, None], dsinks[0], 0).astype(sinks.dtype)
        dsinks = jnp.zeros_like(sinks).at[row].add(part)
    return [*(x.astype(q.dtype) for x in (dq, dk, dv)), dsinks]


def _layer_row(layer, batch, stride):
    """First row or page `[B]` of each batch row's layer."""
    if absent(layer) is None:
        return jnp.zeros((batch,), jnp.int32)
    return jnp.broadcast_to(layer * stride, (batch,))


def _capacity(k, page_table):
    """Keys that a row of a cache holds."""
    return k.shape[1] * (1 if absent(page_table) is None else page_table.shape[1])


def _cache(k, v, k_scale, v_scale, lengths, rows, page_table, layer, chunk_rows, acc, static):
    """Loaders over a contiguous or paged cache for `[B]` rows, and their chunk."""
    batch = lengths.shape[0]
    layer_row = _layer_row(layer, batch, static["layer_stride"])
    stride = None if absent(layer) is None else static["layer_stride"]
    elements = chunk_rows * k.shape[2] * k.shape[3]
    if absent(page_table) is None:
        chunk = _chunk(k.shape[1], elements)
        slots = absent(rows)
        if slots is None:
            slots = jnp.arange(batch, dtype=jnp.int32) % static["layer_stride"]
        make, where = cached_keys, (slots + layer_row,)
    else:
        page = k.shape[1]
        pages = min(page_table.shape[1], max(1, _chunk(1 << 30, elements) // page))
        chunk = pages * page
        make, where = paged_keys, (page_table, layer_row[:, None])

    def live(start):
        return (start + jnp.arange(chunk, dtype=jnp.int32))[None] < lengths[:, None]

    return chunk, *(
        make(x, absent(scale), chunk, acc, live, stride, *where)
        for x, scale in ((k, k_scale), (v, v_scale))
    )


def decode(q, k, v, k_scale, v_scale, slopes, sinks, kv_lengths, rows, page_table, layer, **static):
    batch, len_q = q.shape[:2]
    acc = acc_dtype(q)
    empty = jnp.zeros((0,), jnp.int32)
    kv_lengths = _within(kv_lengths, _capacity(k, page_table))
    queries = _rows(batch, len_q, empty, kv_lengths[:, None], static, slopes, sinks, empty)
    chunk, keys, values = _cache(
        k, v, k_scale, v_scale, kv_lengths, rows, page_table, layer, batch, acc, static
    )
    if 0 in (*q.shape, *k.shape, keys.length):
        o, lse = _no_keys(q, v.shape[-1], queries.sinks)
    else:
        o, lse = attend(q, keys, values, queries, None, chunk, _params(static))
    return [o.astype(q.dtype), lse[..., None]]


def hybrid(
    q, k, v, k_scale, v_scale, slopes, sinks, q_start, q_length, kv_lengths, rows, page_table,
    layer, **static,
):  # fmt: skip
    """Tiles of tokens of one row, which share its keys: blocks of them go through the core."""
    if 0 in (*q.shape, *q_start.shape):
        return _outside(q, v.shape[-1])
    total, batch = q.shape[0], q_start.shape[0]
    kv_lengths = _within(kv_lengths, _capacity(k, page_table))
    acc = acc_dtype(q)
    size = 1 << (max(1, min(total // batch, 64)).bit_length() - 1)
    block = 64 // size
    count = cdiv(min(total, total // size + batch), block)
    ends = jnp.cumsum(cdiv(q_length, size), dtype=jnp.int32)
    first = ends - cdiv(q_length, size)
    tile = jnp.arange(count * block, dtype=jnp.int32)
    row = jnp.searchsorted(ends, tile, side="right").astype(jnp.int32)
    row = jnp.minimum(row, batch - 1)
    index = (tile - first[row])[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    lo, hi, center, valid = _interval(
        index, q_length[row][:, None], kv_lengths[row][:, None], static
    )
    layer = _layer_row(layer, batch, 1)
    slots = absent(rows)
    if slots is None:
        slots = jnp.arange(batch, dtype=jnp.int32) % static["layer_stride"]

    def per_tile(x):
        return None if absent(x) is None else x[row]

    tiles = dict(
        q=q[jnp.minimum(q_start[row][:, None] + index, total - 1)], lo=lo, hi=hi, center=center,
        valid=valid, slopes=per_tile(slopes), sinks=per_tile(sinks),
        lengths=jnp.where(valid.any(-1), kv_lengths[row], 0), rows=slots[row],
        pages=per_tile(page_table), layer=layer[row],
    )  # fmt: skip
    tiles = jax.tree.map(lambda x: x.reshape(count, block, *x.shape[1:]), tiles)
    empty = jnp.zeros((0,), jnp.int32)

    def one_block(t):
        zero = jnp.zeros_like(t["lo"])
        one = (t[name] for name in ("lo", "hi", "center", "valid"))
        extra = (None if t[name] is None else t[name][:, None] for name in ("slopes", "sinks"))
        queries = Queries(*one, zero, zero, *extra, None)
        pages = empty if t["pages"] is None else t["pages"]
        chunk, keys, values = _cache(
            k, v, k_scale, v_scale, t["lengths"], t["rows"], pages, t["layer"], block, acc, static
        )
        if 0 in (*k.shape, keys.length):
            o, lse = _no_keys(t["q"], v.shape[-1], queries.sinks)
            lse = jnp.where(queries.valid[:, None], lse, -jnp.inf)
        else:
            o, lse = attend(t["q"], keys, values, queries, None, chunk, _params(static))
        return o, jnp.swapaxes(lse, 1, 2)

    row, inside = row_of_token(q_start, q_length, total)
    at = first[row] * size + jnp.arange(total, dtype=jnp.int32) - q_start[row]
    o, lse = (x.reshape(-1, *x.shape[3:])[at] for x in lax.map(one_block, tiles))
    o = jnp.where(inside[:, None, None], o, 0)
    lse = jnp.where(inside[:, None], lse, -jnp.inf).T
    return [o.astype(q.dtype), lse[..., None]]
