"""Reference of the append to a cache: rotary, quantize, scatter."""

import jax.numpy as jnp

from .._quantize import apply_scale, cast, group_amax, is_quantized_dtype, scale_of
from .._rotary import rotate
from ._keys import absent, at_layer, by_layer, row_of_token


def _tokens(total, new_start, counts, lengths):
    """Row, position in the cache and whether it is one of the row's, of each new token."""
    batch = lengths.shape[0]
    token = jnp.arange(total, dtype=jnp.int32)
    if absent(new_start) is None:
        row, index = token // (total // batch), token % (total // batch)
        inside = True if absent(counts) is None else index < counts[row]
    else:
        row, inside = row_of_token(new_start, counts, total)
        index = token - new_start[row]
    return row, lengths[row] + index, inside


def _write(cache, scale, x, given, at, slot, stride):
    """Quantizes or casts x `[n, K, H]` into rows `at` and positions `slot` of a cache."""

    def put(cache, x, *index):
        split = by_layer(cache, stride).at[(*at_layer(at, stride), *index)]
        return split.set(x, mode="drop").reshape(cache.shape)

    if not is_quantized_dtype(cache.dtype):
        return put(cache, x.astype(cache.dtype), slot), scale
    x = x.astype(jnp.float32)
    if absent(scale) is None:
        values = cast(x, cache.dtype)
    elif given:
        per_token = jnp.broadcast_to(scale, (cache.shape[0], *scale.shape[1:]))
        per_token = per_token[jnp.clip(at, 0, cache.shape[0] - 1), :, 0]  # [n, K or 1, G]
        values = apply_scale(x, per_token, cache.dtype)
    else:
        amax = group_amax(x, scale.shape[-1])  # [n, K, G]
        if scale.shape[1] == 1:
            amax = amax.max(1, keepdims=True)
        fresh = scale_of(amax, cache.dtype)
        values = apply_scale(x, fresh, cache.dtype)
        scale = put(scale, fresh, slice(None), slot)
    return put(cache, values, slot), scale


def append(
    k, v, k_scale, v_scale, k_new, v_new, new_start, counts, lengths, rows, page_table, layer,
    cos, sin, **static,
):  # fmt: skip
    if k_new.shape[0] == 0:
        return [k, v, k_scale, v_scale]
    row, position, inside = _tokens(k_new.shape[0], new_start, counts, lengths)
    if absent(cos) is not None:
        at = jnp.minimum(position, cos.shape[0] - 1)
        k_new = rotate(k_new, cos[at][:, None], sin[at][:, None], static["interleaved"])
    size = k.shape[1]
    if absent(page_table) is None:
        slots = absent(rows)
        dest = row % static["layer_stride"] if slots is None else slots[row]
        slot, inside = position, inside & (position < size)
    else:
        page = position // size
        inside = inside & (page < page_table.shape[1])
        dest = page_table[row, jnp.minimum(page, page_table.shape[1] - 1)]
        slot = position % size
    inside = inside & (dest >= 0) & (dest < static["row_limit"])
    if absent(layer) is not None:
        dest = dest + jnp.broadcast_to(layer, lengths.shape)[row] * static["layer_stride"]
    dest = jnp.where(inside, dest, k.shape[0])  # out of bounds: dropped
    stride = None if absent(layer) is None else static["layer_stride"]
    k, k_scale = _write(k, k_scale, k_new, static["scale_given"], dest, slot, stride)
    v, v_scale = _write(v, v_scale, v_new, static["scale_given"], dest, slot, stride)
    return [k, v, k_scale, v_scale]
