"""Chunks of keys or values: contiguous, cached and paged, dequantized as they are read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Keys(NamedTuple):
    """Keys or values: `load(start)` gives the positions `start + arange(chunk)`."""

    load: Any  # start -> [B_x, chunk, K, H], float, B_x divides B
    live: Any  # start -> [B_x or B, chunk] bool, False where the array may hold anything; or None
    length: int


def absent(x):
    """Absent optional operands have shape [0]."""
    return None if x.shape == (0,) else x


def by_layer(x, stride):
    """x `[L * stride, ...]` as `[L, stride, ...]`, or as it is where stride is None.

    Layers stay an axis of their own in reads and writes: merging them behind a loop's carry makes
    XLA's CPU backend copy the whole cache.
    """
    return x if stride is None else x.reshape(-1, stride, *x.shape[1:])


def at_layer(index, stride):
    """The index of row or page `index` of x in `by_layer(x, stride)`."""
    return (index,) if stride is None else (index // stride, index % stride)


def row_of_token(start, length, total):
    """Row `[total]` of each packed token and whether it belongs to one; starts never decrease."""
    token = jnp.arange(total, dtype=jnp.int32)
    row = jnp.searchsorted(start, token, side="right").astype(jnp.int32) - 1
    row = jnp.clip(row, 0, start.shape[0] - 1)
    inside = (token >= start[row]) & (token < start[row] + length[row])
    return row, inside


def in_some_row(start, length, total):
    """Whether each packed token belongs to a row; rows in any order, which may share tokens."""
    edges = jnp.zeros((total + 1,), jnp.int32).at[start].add(1, mode="drop")
    edges = edges.at[start + length].add(-1, mode="drop")
    return jnp.cumsum(edges)[:total] > 0


def _dequantize_chunk(x, scale, dtype):
    """x `[b, s, K, H]` times scale `[b', K or 1, s or 1, G]`; of b and b' one divides the other."""
    x = x.astype(dtype)
    if scale is None:
        return x
    rows = max(x.shape[0], scale.shape[0])
    x, scale = (jnp.tile(y, (rows // y.shape[0], 1, 1, 1)) for y in (x, scale))
    *shape, dim = x.shape
    groups = scale.shape[-1]
    scale = jnp.swapaxes(scale, 1, 2).astype(dtype)[..., None]
    return (x.reshape(*shape, groups, dim // groups) * scale).reshape(x.shape)


def slice_axis(x, axis, start, size):
    """`size` elements of x along axis; an axis of size 1 stays as it is."""
    return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)


def dense_keys(x, scale, chunk, dtype, live=None):
    """x `[B_x, S, K, H]`, scale `[B_s, K or 1, S or 1, G]` or None, with batches of their own."""

    def load(start):
        part = None if scale is None else slice_axis(scale, 2, start, chunk)
        return _dequantize_chunk(lax.dynamic_slice_in_dim(x, start, chunk, 1), part, dtype)

    return Keys(load, live, x.shape[1])


def cached_keys(x, scale, chunk, dtype, live, stride, slots):
    """x `[X, S, K, H]` read at row `slots` `[B]`."""

    def rows_of(x, start, axis, size):
        if x.shape[0] == 1:
            return slice_axis(x, axis, start, size)
        starts = [jnp.zeros_like(start)] * x.ndim
        sizes = [1, *x.shape[1:]]
        if x.shape[axis] > 1:
            starts[axis], sizes[axis] = start, size
        x = by_layer(x, stride)
        sizes = [1] * (x.ndim - len(sizes)) + sizes

        def row(slot):
            part = lax.dynamic_slice(x, [*at_layer(slot, stride), *starts[1:]], sizes)
            return part.reshape(sizes[-3:])

        return jax.vmap(row)(slots)

    def load(start):
        part = None if scale is None else rows_of(scale, start, 2, chunk)
        values = rows_of(x, start, 1, chunk)
        return _dequantize_chunk(values, part, dtype)

    return Keys(load, live, x.shape[1])


def paged_keys(x, scale, chunk, dtype, live, stride, table, layer_row):
    """x `[P, page, K, H]` read through table `[B, max_pages]`; chunk is a multiple of page."""
    page = x.shape[1]

    def load(start):
        pages = lax.dynamic_slice_in_dim(table, start // page, chunk // page, 1)
        pages = jnp.clip(pages + layer_row, 0, x.shape[0] - 1)

        def gather(x):
            return by_layer(x, stride)[at_layer(pages, stride)]  # [B, pages, ...]

        values = gather(x).reshape(*table.shape[:1], chunk, *x.shape[2:])
        part = None
        if scale is not None:
            part = gather(scale) if scale.shape[0] > 1 else scale[:, None]
            b, n, heads, slots, groups = part.shape
            part = jnp.broadcast_to(part, (b, chunk // page, heads, page, groups))
            part = jnp.moveaxis(part, 2, 1).reshape(b, heads, chunk, groups)
        return _dequantize_chunk(values, part, dtype)

    return Keys(load, live, table.shape[1] * page)
