"""Attention over a cache: a few new tokens a row, mixed batches, and merging of partial results."""

import jax.numpy as jnp

from . import _checks, _primitives, _sharding
from ._attention import key_operands
from ._quantize import QuantizedArray
from ._rotary import at_least_float32


def decode_attention(
    q, k, v, kv_lengths, *, page_table=None, batch_index=None, layer=None, scale=None, window=None,
    softcap=None, alibi_slopes=None, sinks=None, shared_prefix_pages=0, return_lse=False,
    implementation=None,
):  # fmt: skip
    """Attention of the last T tokens of each row over its cache, causal among themselves.

    Args:
      q: Queries `[B, N, H]`, or `[B, T, N, H]`: tokens `kv_lengths - T` to `kv_lengths - 1`.
      k: Cached keys of q's dtype, or a `QuantizedArray`: contiguous `[X, S, K, H]`, or with
        `page_table` a pool `[P, page, K, H]`; with `layer` one more axis in front, of the layers.
      v: Cached values, as k.
      kv_lengths: int32 `[B]`: tokens in each row's cache, those of q included.
      page_table: int32 `[B, max_pages]`: key j of row b is token `j % page` of page
        `page_table[b, j // page]`. Entries past a row's length may hold anything.
      batch_index: int32 `[B]`: the row of a contiguous cache that each query row reads; row
        `b % X` if None.
      layer: int32 scalar: the layer of a stacked cache.
      shared_prefix_pages: How many pages all rows begin with, the same ones (an int), as those of a
        system prompt: they are read once for all rows. A row that does not hold all of them before
        its new tokens gets arbitrary numbers. Needs a `page_table`, no `window` and no
        `alibi_slopes`.
      scale, window, softcap, alibi_slopes, sinks, return_lse, implementation: As for
        `flash_attention`.

    Returns:
      out, shaped as q with the values' head dim, or `(out, lse)` with lse `[B, N, T]`, or `[B, N]`
      for 3-D queries. A query that sees no key gives 0 and -inf, or the sink.

    Raises:
      ValueError, NotImplementedError: As for `flash_attention`. It has no gradient.

    Source: Dao et al., Flash-Decoding, 2023; Juravsky et al., Hydragen, 2024 (shared prefixes).
    """
    q = jnp.asarray(q)
    single = q.ndim == 3
    if single:
        q = q[:, None]
    _checks.queries("q", q, 4, "[B, N, H] or [B, T, N, H]")
    batch, len_q, heads, dim = q.shape
    pages = _checks.bound("shared_prefix_pages", shared_prefix_pages)
    if pages:
        _check_prefix(pages, page_table, batch_index, window, alibi_slopes)
    if pages and batch > 1:
        same = dict(layer=layer, scale=scale, softcap=softcap, implementation=implementation)
        prefix, rest = _split_prefix(pages, k, kv_lengths, page_table)
        packed, starts = q.reshape(-1, heads, dim), jnp.array([0, batch * len_q], jnp.int32)
        o, lse = hybrid_attention(
            packed, k, v, starts, **prefix, causal=False, return_lse=True, **same
        )
        o, lse = o.reshape(batch, len_q, heads, -1), lse.reshape(heads, batch, len_q)
        parts = [(o, jnp.swapaxes(lse, 0, 1))]
        parts += [decode_attention(q, k, v, **rest, sinks=sinks, return_lse=True, **same)]
        o, lse = merge_attention(*zip(*parts, strict=True))
        if single:
            o, lse = o[:, 0], lse[..., 0]
        return (o, lse) if return_lse else o
    operands, static = _cache_call(
        q, k, v, kv_lengths, batch, page_table, batch_index, layer, scale, True, window, softcap,
        alibi_slopes, sinks, implementation,
    )  # fmt: skip

    def call(operands):
        o, lse = _primitives.bind("jax_fa_decode", cache_operands(operands), **static)
        return o, lse[..., 0]

    o, lse = _sharding.run(call, operands, q, "BTNH", ("BTNH", "BNT"))
    if single:
        o, lse = o[:, 0], lse[..., 0]
    return (o, lse) if return_lse else o


def hybrid_attention(
    q, k, v, cu_seqlens_q, kv_lengths, *, page_table=None, batch_index=None, layer=None,
    split_size=None, scale=None, causal=True, window=None, softcap=None, alibi_slopes=None,
    sinks=None, shared_prefix_pages=0, return_lse=False, implementation=None,
):  # fmt: skip
    """Attention of any number of new tokens a row over a shared cache: prefill beside decoding.

    Args:
      q: Packed queries `[total_q, N, H]`: row b has tokens `cu_seqlens_q[b] : cu_seqlens_q[b + 1]`,
        the last ones of its `kv_lengths[b]`.
      k, v: Caches, as for `decode_attention`.
      cu_seqlens_q: int32 `[B + 1]`, starting at 0, never decreasing; tokens past the last row are
        padding.
      kv_lengths: int32 `[B]`: tokens in each row's cache, the new ones included.
      page_table, batch_index, layer: As for `decode_attention`.
      split_size: Keys of a row that are summed together, at most (at least 64, and more where the
        batch's partial results would not fit 96 MB), so that a row's result has the same bits
        whatever else is in the batch. None: the sums may depend on the other rows' lengths, not
        on their order.
      causal: Whether new tokens see only keys up to themselves.
      shared_prefix_pages: As for `decode_attention`; not with `split_size`.
      scale, window, softcap, alibi_slopes, sinks, return_lse, implementation: As for
        `flash_attention`.

    Returns:
      out `[total_q, N, Hv]`, or `(out, lse)` with lse `[N, total_q]`; 0 and -inf for padding.

    Raises:
      ValueError, NotImplementedError: As for `flash_attention`. It has no gradient.
    """
    q = jnp.asarray(q)
    _checks.queries("q", q, 3, "[total_q, N, H]")
    cu_seqlens_q = _checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q)
    batch = cu_seqlens_q.shape[0] - 1
    pages = _checks.bound("shared_prefix_pages", shared_prefix_pages)
    if pages:
        _check_prefix(pages, page_table, batch_index, window, alibi_slopes, split_size)
    if pages and batch > 1:
        same = dict(layer=layer, scale=scale, softcap=softcap)
        same |= dict(implementation=implementation, return_lse=True)
        prefix, rest = _split_prefix(pages, k, kv_lengths, page_table)
        starts = cu_seqlens_q[::batch]  # of one row that has all tokens
        parts = [
            hybrid_attention(q, k, v, starts, **prefix, causal=False, **same),
            hybrid_attention(q, k, v, cu_seqlens_q, **rest, causal=causal, sinks=sinks, **same),
        ]
        o, lse = merge_attention(*zip(*parts, strict=True), packed=True)
        return (o, lse) if return_lse else o
    operands, static = _cache_call(
        q, k, v, kv_lengths, batch, page_table, batch_index, layer, scale, causal, window, softcap,
        alibi_slopes, sinks, implementation,
    )  # fmt: skip
    if split_size is not None and (not isinstance(split_size, int) or split_size < 1):
        raise ValueError(f"split_size must be a positive int or None, got {split_size!r}")
    static["split_size"] = split_size or 0
    operands |= {
        "q_start": cu_seqlens_q[:-1],
        "q_length": cu_seqlens_q[1:] - cu_seqlens_q[:-1],
    }

    def call(operands):
        o, lse = _primitives.bind("jax_fa_hybrid", cache_operands(operands), **static)
        return o, lse[..., 0]

    o, lse = _sharding.run(call, operands, q, "TNH", ("TNH", "NT"))
    return (o, lse) if return_lse else o


def _cache_call(
    q, k, v, kv_lengths, batch, page_table, batch_index, layer, scale, causal, window, softcap,
    alibi_slopes, sinks, implementation,
):  # fmt: skip
    """Checks what decode and hybrid share; returns what `cache_operands` takes, and the rest."""
    heads, dim = q.shape[-2:]
    k, v = (_checks.as_array(x) for x in (k, v))
    form = cache_form(page_table, layer)
    lead = (None,) * (2 if layer is None else 3)
    k_heads, _ = _checks.keys("k", k, q, lead, heads, dim, f"{form}K, {dim}] with {layer=}")
    v_heads, _ = _checks.keys("v", v, q, k.shape[:-2], heads, None, f"{form}K, Hv] as k")
    _checks.same_heads(k_heads, v_heads)
    layer_stride = k.shape[-4]
    operands = {
        "q": q,
        "k": k,
        "v": v,
        "slopes": _checks.per_head("alibi_slopes", alibi_slopes, batch, heads),
        "sinks": _checks.per_head("sinks", sinks, batch, heads),
        "kv_lengths": _checks.int32("kv_lengths", kv_lengths, (batch,), form=f"[{batch}]"),
        **cache_maps(k, batch, page_table, batch_index, layer),
    }
    left, right = _checks.window(window, causal)
    static = {
        "scale": _checks.scale_factor(scale, dim),
        "softcap": _checks.positive("softcap", softcap),
        "window_left": left,
        "window_right": right,
        "exact": _checks.exact(q),
        "layer_stride": layer_stride,
        "implementation": _checks.implementation(implementation),
    }
    return operands, static


def _check_prefix(pages, page_table, batch_index, window, alibi_slopes, split_size=None):
    if page_table is None:
        raise ValueError("shared_prefix_pages needs a page_table, got None")
    if batch_index is not None:
        raise ValueError("batch_index must be None with a page_table, which maps rows itself")
    table = jnp.shape(page_table)
    if len(table) != 2 or pages >= table[1]:
        raise ValueError(f"page_table must be [B, max_pages > {pages}], got {table}")
    if window is not None or alibi_slopes is not None:
        raise NotImplementedError(
            "shared_prefix_pages with window or alibi_slopes: the prefix lies at another distance "
            "from each row's queries; without them it is covered"
        )
    if split_size is not None:
        raise NotImplementedError(
            "shared_prefix_pages with split_size: queries of all rows share the tiles of the "
            "prefix, so that their bits depend on one another; without it it is covered"
        )


def _split_prefix(pages, k, kv_lengths, page_table):
    """Arguments of a call over the first pages, and of one over what follows them in each row."""
    page_table, kv_lengths = jnp.asarray(page_table), jnp.asarray(kv_lengths)

    def split(operands):
        page_table, kv_lengths = operands
        length = jnp.array(pages * k.shape[-3], kv_lengths.dtype)
        longest = jnp.argmax(kv_lengths)  # it has the pages, if any row has: others may be idle
        shared = jnp.where(kv_lengths[longest] < length, 0, length)[None]
        behind = jnp.maximum(kv_lengths - length, 0)
        return page_table[longest][None, :pages], shared, page_table[:, pages:], behind

    results = ["1P", "1", "BP", "B"]  # pages are not sharded
    operands = page_table, kv_lengths
    names = "page_table", "kv_lengths"
    parts = _sharding.run(split, operands, page_table, "BM", results)
    return dict(zip(names, parts[:2])), dict(zip(names, parts[2:]))


def cache_form(page_table, layer):
    """How the shape of a cache's array begins, for messages."""
    return ("[" if layer is None else "[L, ") + ("X, S, " if page_table is None else "P, page, ")


def cache_operands(operands):
    """Operands of a primitive from those with caches k and v as callers have them."""
    k, v = operands["k"], operands["v"]
    if operands["layer"] is not None:
        k, v = _merge_layers(k), _merge_layers(v)
    return operands | key_operands(k, v)


def _merge_layers(x):
    """[L, X, ...] as [L * X, ...], which moves nothing but a scale that layers or rows share."""
    if isinstance(x, QuantizedArray):
        scale = x.scale
        if scale is not None and scale.shape[:2] != (1, 1):
            scale = jnp.broadcast_to(scale, (*x.shape[:2], *scale.shape[2:]))
        scale = None if scale is None else _merge_layers(scale)
        return QuantizedArray(_merge_layers(x.values), scale)
    return x.reshape(-1, *x.shape[2:])


def cache_maps(k, batch, page_table, batch_index, layer):
    """The operands that say which rows or pages of a cache with keys k a batch row reads."""
    layer_stride = k.shape[-4]
    page_table = _checks.int32(
        "page_table", page_table, (batch, None), form=f"[{batch}, max_pages]"
    )
    batch_index = _checks.int32("batch_index", batch_index, (batch,), form=f"[{batch}]")
    if page_table is not None and batch_index is not None:
        raise ValueError("batch_index must be None with a page_table, which maps rows itself")
    if page_table is None and batch_index is None and (not layer_stride or batch % layer_stride):
        raise ValueError(
            f"the batch must be a multiple of the cache's {layer_stride} rows without batch_index, "
            f"got {batch}"
        )
    if layer is not None:
        layer = _checks.layer(layer, k.shape[0])[None]
    return {"rows": batch_index, "page_table": page_table, "layer": layer}


def merge_attention(outs, lses, *, packed=False):
    """Attention over the union of disjoint key sets, from its results over each.

    Args:
      outs: `[parts, B, T, N, H]`, `[parts, B, N, H]`, or packed `[parts, total_q, N, H]`; or a
        sequence of arrays.
      lses: `[parts, B, N, T]`, `[parts, B, N]`, or packed `[parts, N, total_q]`, float.
      packed: Whether the results are packed, as those of varlen and hybrid are.

    Returns:
      out and lse without the axis of parts; 0 and -inf where all parts are -inf.

    Raises:
      ValueError: for shapes that do not fit.
    """
    outs, lses = jnp.asarray(outs), jnp.asarray(lses)
    rank = 4 if packed else 5
    if outs.ndim not in (4, rank):
        raise ValueError(f"outs must be [parts, .., N, H], got {outs.shape}")
    moved = packed or outs.ndim == 5  # lse has tokens behind heads
    weights = jnp.swapaxes(lses, -1, -2) if moved else lses
    if weights.shape != outs.shape[:-1]:
        raise ValueError(f"lses must fit outs {outs.shape} with {packed=}, got {lses.shape}")
    acc = at_least_float32(lses.dtype)
    weights = weights.astype(acc)
    top = weights.max(0)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(weights - top[None])
    total = weights.sum(0)
    parts = jnp.where(weights[..., None] == 0, 0, outs.astype(acc)) * weights[..., None]
    some = jnp.where(total == 0, 1, total)
    out = parts.sum(0) / some[..., None]
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(some))
    return out.astype(outs.dtype), jnp.swapaxes(lse, -1, -2) if moved else lse
