"""Flax: an `attention_fn` for linen and nnx, and an NNX attention layer over a real cache."""

import contextlib
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np

try:
    from flax import nnx
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ModuleNotFoundError("jax_fa.flax needs Flax: pip install flax", name="flax") from error

from . import QuantizedArray, apply_rotary, decode_attention, flash_attention, hybrid_attention


def attention_fn(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    broadcast_dropout=True,
    dropout_rng=None,
    dropout_rate=0.0,
    deterministic=False,
    dtype=None,
    precision=None,
    module=None,
    promote_dtype=None,
    is_causal=False,
    rope=None,
    input_positions=None,
    force_fp32_for_softmax=False,
    einsum_dot_general=None,
    qk_attn_weights_einsum=None,
    attn_weights_value_einsum=None,
):
    """Attention for `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`.

        layer = nnx.MultiHeadAttention(..., attention_fn=jax_fa.flax.attention_fn)

    Computes what Flax's own `dot_product_attention` computes, of both flavours, except that a query
    whose mask hides every key gets 0 (there: the mean of the values), and that dropout draws other
    random bits. Every name that linen or nnx passes is a parameter: linen drops what has none.

    Args:
      query: `[batch..., T, N, H]`, any number of batch axes.
      key: `[batch..., S, K, H]`; K divides N.
      value: As `key`.
      bias: Added to the scores; broadcasts to `[batch..., N, T, S]`.
      mask: bool or numbers, which hide a key where they are 0; broadcasts to `[batch..., N, T, S]`.
        An axis of size 1 stays so: a mask of padding costs no array of T x S.
      broadcast_dropout: Whether all batch rows and heads drop the same weights.
      dropout_rng: A key. Needed for dropout.
      dropout_rate: Share of the weights that are dropped unless `deterministic`.
      deterministic: Turns dropout off.
      dtype: Computes in this dtype. Default: that of the inputs.
      precision: Of the products, for float32 inputs: "highest" rounds none of them to TF32. None:
        `jax.default_matmul_precision`. 16-bit inputs accumulate in float32 whatever it is.
      module: Must be None: the weights, which it would sow, are never formed.
      promote_dtype: Takes `(query, key, value)` and `dtype=`; replaces the cast to `dtype`.
      is_causal: Whether query i sees only keys j <= i (top-left, as in `jax.nn`).
      rope: A module such as `nnx.RoPE`, applied to queries and keys.
      input_positions: `[batch..., T]` for `rope`.
      force_fp32_for_softmax: No effect: the softmax is always float32.
      einsum_dot_general: Must be None, as the next two: there is no einsum to replace.
      qk_attn_weights_einsum: Must be None.
      attn_weights_value_einsum: Must be None.

    Returns:
      `[batch..., T, N, H]` in the dtype of the computation.

    Raises:
      NotImplementedError: for what needs the attention weights or an einsum.
      ValueError: for shapes that do not fit; for dropout without a key; for positions without rope.
    """
    if module is not None:
        raise NotImplementedError(
            "attention weights are never formed and cannot be sown (sow_weights=True); "
            "Flax's own attention_fn can"
        )
    einsums = einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum
    if any(einsum is not None for einsum in einsums):
        raise NotImplementedError(
            "einsum_dot_general, qk_attn_weights_einsum and attn_weights_value_einsum must be "
            "None: attention is one kernel without an einsum to replace"
        )
    if deterministic:
        dropout_rate = 0.0
    if dropout_rate > 0.0 and dropout_rng is None:
        raise ValueError(f"dropout_rng must be a key for {dropout_rate=}, got None")
    if rope is not None:
        query, key = (_apply_rope(rope, x, input_positions) for x in (query, key))
    elif input_positions is not None:
        raise ValueError("input_positions must come with rope, got rope=None")

    promote = promote_dtype or _promote_dtype
    query, key, value = promote((query, key, value), dtype=dtype)
    batch = query.shape[:-3]
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value))
    bias = _bias(bias, mask, batch, q.dtype)
    window = None
    if is_causal:
        # Flax aligns the first query with the first key, flash_attention the last with the last.
        len_q = q.shape[1]
        k, v = k[:, :len_q], v[:, :len_q]
        if bias is not None and bias.shape[-1] > 1:
            bias = bias[..., :len_q]
        window = (None, len_q - k.shape[1])
    with _matmul_precision(precision):
        out = flash_attention(
            q,
            k,
            v,
            window=window,
            bias=bias,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=broadcast_dropout,
        )
    return out.reshape(*batch, *out.shape[1:])


class CachedAttention(nnx.Module):
    """Grouped-query self-attention with rotary embedding; the same layer trains and decodes.

        attention = CachedAttention(576, 9, 3, rngs=nnx.Rngs(0))
        y, _ = attention(x, rotary=rotary)                      # training: causal, no cache
        y, cache = attention(x, cache, rotary=rotary)           # appends T tokens, attends to all
        y, cache = attention(x, cache, cu_seqlens=cu_seqlens)   # packed: prefill beside decoding

    The cache is an argument and a result, so that a jitted step donates it, and a scan over layers
    carries one stacked cache in place.

    Args:
      features: Of the input and the output.
      heads: Query heads, N.
      kv_heads: Key and value heads, K, which divides N. Default: N.
      head_dim: H. Default: `features // heads`.
      window: None, or how far a token sees back: an int, or `(left, right)` as `flash_attention`.
      softcap: As `flash_attention`.
      dropout_rate: Share of the attention weights dropped in calls with a `dropout_rng`.
      use_bias: Whether the four projections add a bias.
      dtype: Of the computation. Default: that of the input and the weights.
      param_dtype: Of the weights.
      precision: Of the projections, as in `nnx.Linear`.
      rngs: Initializes the weights.

    Source: Ainslie et al., GQA, 2023; Su et al., RoFormer, 2021.
    """

    def __init__(
        self,
        features,
        heads,
        kv_heads=None,
        head_dim=None,
        *,
        window=None,
        softcap=None,
        dropout_rate=0.0,
        use_bias=False,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = features // heads if head_dim is None else head_dim
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
        self.window, self.softcap = window, softcap
        self.dropout_rate = dropout_rate
        linear = ft.partial(
            nnx.LinearGeneral,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        self.query = linear(features, (heads, head_dim))
        self.key = linear(features, (kv_heads, head_dim))
        self.value = linear(features, (kv_heads, head_dim))
        self.out = linear((heads, head_dim), features, axis=(-2, -1))

    def __call__(
        self,
        x,
        cache=None,
        *,
        rotary=None,
        counts=None,
        layer=None,
        cache_is_empty=False,
        dropout_rng=None,
        cu_seqlens=None,
        split_size=None,
    ):
        """Attends causally: each token to itself and to what precedes it, in `x` or the cache.

        Args:
          x: `[B, T, features]`, or packed `[total, features]` with `cu_seqlens` and a cache.
          cache: None, or a `jax_fa.KVCache` or `jax_fa.PagedKVCache` of B rows, of any dtype, that
            gets the keys and values of `x`.
          rotary: None, or `(cos, sin)`, each `[max_position, R / 2]`: see `rotary_tables`.
          counts: int32 `[B]`: how many of the T tokens each row has, the rest being padding.
            Default: all.
          layer: int32 scalar: the layer of a cache with `layers=`. The model calls
            `cache.advance(counts)` after its last layer.
          cache_is_empty: Whether no row of the cache holds tokens yet (a Python bool). Attention
            then reads the keys and values of `x` unquantized, not from the cache, which is faster
            for a prompt. No effect on packed tokens.
          dropout_rng: A key turns dropout on. Not with a cache.
          cu_seqlens: int32 `[B + 1]`: where each row's tokens begin in a packed `x`; tokens past
            the last row are padding. Each row has any number of them, 0 included.
          split_size: Of packed tokens, as `hybrid_attention`.

        Returns:
          `(y, cache)`: as `x`, arbitrary for padding, and the new cache (None without).

        Raises:
          ValueError: for shapes that do not fit, for dropout with a cache, and for packed tokens
            without one.
        """
        if cu_seqlens is not None and cache is None:
            raise ValueError("cache must be given with cu_seqlens, got None")
        q, k, v = self.query(x), self.key(x), self.value(x)
        if cache is None:
            o = self._attend_new(q, k, v, rotary, counts, dropout_rng)
            return self.out(o), None
        if dropout_rng is not None:
            raise ValueError("dropout_rng must be None with a cache: dropout is for training")
        lengths = cache.lengths
        cache = cache.append(k, v, counts, layer=layer, rotary=rotary, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            o = self._attend_packed(q, cache, lengths, rotary, cu_seqlens, layer, split_size)
        elif cache_is_empty:
            o = self._attend_new(q, k, v, rotary, counts)
        else:
            o = self._attend_cache(q, cache, lengths, rotary, counts, layer)
        return self.out(o), cache

    def _attend_new(self, q, k, v, rotary, counts, dropout_rng=None):
        """Attention of the T tokens among themselves."""
        if rotary is not None:
            positions = jnp.arange(q.shape[1], dtype=jnp.int32)
            q, k = (apply_rotary(x, *rotary, positions) for x in (q, k))
        return flash_attention(
            q,
            k,
            v,
            causal=True,
            q_lengths=counts,
            kv_lengths=counts,
            window=self.window,
            softcap=self.softcap,
            dropout_rate=0.0 if dropout_rng is None else self.dropout_rate,
            dropout_rng=dropout_rng,
        )

    def _attend_cache(self, q, cache, lengths, rotary, counts, layer):
        """Attention of the T tokens, already appended at `lengths`, to all of the cache."""
        batch, len_q, heads, head_dim = q.shape
        if rotary is not None:
            positions = lengths[:, None] + jnp.arange(len_q, dtype=jnp.int32)[None]
            q = apply_rotary(q, *rotary, positions)
        dtype, q = q.dtype, q.astype(_query_dtype(q.dtype, cache.k))
        options = self._cache_options(cache, layer)
        added = len_q if counts is None else counts
        # Tokens past the capacity were dropped: no kernel may read them.
        kv_lengths = jnp.minimum(lengths + added, cache.capacity)
        if len_q == 1 or (counts is None and len_q <= _MAX_DECODE_TOKENS):
            return decode_attention(q, cache.k, cache.v, kv_lengths, **options).astype(dtype)
        if counts is None:
            counts = jnp.full((batch,), len_q, jnp.int32)
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        # Where each token lies among the rows' tokens, packed; padding lies nowhere.
        token = jnp.arange(len_q, dtype=jnp.int32)[None]
        at = jnp.where(token < counts[:, None], (ends - counts)[:, None] + token, batch * len_q)
        packed = jnp.zeros((batch * len_q, heads, head_dim), q.dtype).at[at].set(q, mode="drop")
        starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
        o = hybrid_attention(packed, cache.k, cache.v, starts, kv_lengths, **options)
        return o.at[at].get(mode="fill", fill_value=0).astype(dtype)

    def _attend_packed(self, q, cache, lengths, rotary, cu_seqlens, layer, split_size):
        """Attention of packed tokens, already appended at `lengths`, to all of the cache."""
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        if rotary is not None:
            token = jnp.arange(q.shape[0], dtype=jnp.int32)
            row = (token[:, None] >= ends[None]).sum(-1, dtype=jnp.int32)
            positions = token + jnp.take(lengths - starts, row, mode="clip")
            q = apply_rotary(q, *rotary, positions)
        dtype, q = q.dtype, q.astype(_query_dtype(q.dtype, cache.k))
        kv_lengths = jnp.minimum(lengths + ends - starts, cache.capacity)
        options = self._cache_options(cache, layer)
        return hybrid_attention(
            q, cache.k, cache.v, cu_seqlens, kv_lengths, split_size=split_size, **options
        ).astype(dtype)

    def _cache_options(self, cache, layer):
        return dict(
            page_table=getattr(cache, "page_table", None),
            layer=layer,
            window=self.window,
            softcap=self.softcap,
        )


# Tokens of a row that decode kernels take at once.
_MAX_DECODE_TOKENS = 16


def rotary_tables(max_position, dim, base=10000.0):
    """cos and sin of `position * base ** (-2 i / dim)` (Su et al., RoFormer, 2021).

    Args:
      max_position: Number of positions.
      dim: R, how many dims of a head are rotated; even.
      base: Of the wavelengths.

    Returns:
      `(cos, sin)`, each float32 `[max_position, R / 2]`, as constants of a traced function.
    """
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(max_position)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _query_dtype(dtype, keys):
    """The dtype in which queries read a cache: the kernels take one dtype, or 16 and 8 bits."""
    if not isinstance(keys, QuantizedArray):
        return keys.dtype
    return jnp.bfloat16 if dtype == jnp.float32 else dtype


def _promote_dtype(arrays, *, dtype):
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(x.astype(dtype) for x in arrays)


def _apply_rope(rope, x, positions):
    """`rope` takes `[..., T, H]` with positions `[..., T]`; x is `[batch..., T, N, H]`."""
    return jax.vmap(rope, in_axes=(-2, None), out_axes=-2)(x, positions)


def _bias(bias, mask, batch, dtype):
    """One bias `[B | 1, N | 1, T | 1, S | 1]` for both, -inf where the mask hides; or None."""
    if mask is None:
        return None if bias is None else _flatten_batch(bias, batch)
    visible = _flatten_batch(mask, batch).astype(bool)
    bias = jnp.zeros((1, 1, 1, 1), dtype) if bias is None else _flatten_batch(bias, batch)
    return jnp.where(visible, bias, jnp.array(-jnp.inf, bias.dtype))


def _flatten_batch(x, batch):
    """`[batch..., n, t, s]` as `[B, n, t, s]`, or `[1, n, t, s]` if it is the same for all rows."""
    rank = len(batch) + 3
    if x.ndim > rank:
        raise ValueError(f"mask and bias must have at most {rank} axes, got {x.shape}")
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if math.prod(x.shape[:-3]) > 1:
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])


def _matmul_precision(precision):
    """The context in which products have a `precision` as `jax.lax.dot_general` takes it."""
    if precision is None:
        return contextlib.nullcontext()
    parts = precision if isinstance(precision, (tuple, list)) else (precision,)
    exact = any(str(part).lower() in _EXACT for part in parts)
    return jax.default_matmul_precision("highest" if exact else "tensorfloat32")


_EXACT = ("highest", "float32", "f32_f32_f32")
