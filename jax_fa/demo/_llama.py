"""A Llama in Flax NNX on jax_fa: one set of layers for training, prefill and decoding."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
from flax import nnx

from jax_fa.flax import CachedAttention, rotary_tables


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama.

    `dtype` is that of its computation, and of its weights if `param_dtype` is None.
    """

    vocab_size: int
    layers: int
    features: int
    hidden_features: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    rotary_base: float
    norm_epsilon: float
    dtype: str = "float32"
    param_dtype: str | None = None

    def dtypes(self):
        return dict(dtype=self.dtype, param_dtype=self.param_dtype or self.dtype)

    def linear(self):
        """What all projections have in common."""
        # On a GPU, XLA would round the factors of a float32 product to TF32.
        precision = "highest" if self.dtype == "float32" else None
        return dict(precision=precision, **self.dtypes())


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x ** 2) + epsilon)` over the last axis, in float32."""

    def __init__(self, config):
        self.scale = nnx.Param(jnp.ones((config.features,), config.dtypes()["param_dtype"]))
        self.epsilon = config.norm_epsilon

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.broadcast_to(self.scale[...].astype(jnp.float32), y.shape)
        return (scale * y).astype(x.dtype)


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, SwiGLU)."""

    def __init__(self, config, *, rngs):
        size = config.features, config.hidden_features
        self.gate = nnx.Linear(*size, use_bias=False, rngs=rngs, **config.linear())
        self.up = nnx.Linear(*size, use_bias=False, rngs=rngs, **config.linear())
        self.down = nnx.Linear(*reversed(size), use_bias=False, rngs=rngs, **config.linear())

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype, table, tokens):
    """Rows `[..., T, features]` of a table `[vocab_size, features]`, in `dtype`.

    Its gradient is a product that sums in float32: XLA's scatter-add of many tokens to few rows
    takes most of a step on a GPU (https://github.com/jax-ml/jax/issues/38806). It costs as much as
    the logits do, which is little beside the rest where the vocabulary is small.
    """
    return table[tokens].astype(dtype)


def _look_up_fwd(dtype, table, tokens):
    # Of the table, only the shape and the dtype.
    return _look_up(dtype, table, tokens), (tokens, table[:, :0])


def _look_up_bwd(dtype, residuals, gradient):
    tokens, table = residuals
    chosen = jax.nn.one_hot(tokens, table.shape[0], dtype=dtype)
    precision = "highest" if dtype == jnp.float32 else None
    sums = jnp.einsum(
        "...v,...d->vd", chosen, gradient, precision=precision, preferred_element_type=jnp.float32
    )
    return sums.astype(table.dtype), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Block(nnx.Module):
    def __init__(self, config, attention, *, rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = attention(
            config.features,
            config.heads,
            config.kv_heads,
            config.head_dim,
            rngs=rngs,
            **config.linear(),
        )
        self.mlp_norm = RMSNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x, cache=None, **attention):
        y, cache = self.attention(self.attention_norm(x), cache, **attention)
        x += y
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """Decoder with rotary embedding, grouped-query attention and tied input and output embeddings.

    The weights of all layers are stacked, `[layers, ...]`, and a scan goes over them: one layer is
    compiled, however many there are.

    Args:
      config: A `LlamaConfig`.
      attention: The class of the attention layers.
      rngs: Initializes the weights.

    Source: Touvron et al., LLaMA, 2023.
    """

    def __init__(self, config, attention=CachedAttention, *, rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.features, rngs=rngs, **config.dtypes())
        self.blocks = nnx.split_rngs(splits=config.layers)(
            nnx.vmap(lambda rngs: Block(config, attention, rngs=rngs))
        )(rngs)
        self.norm = RMSNorm(config)

    def __call__(self, tokens, lengths=None, *, remat=None):
        """Logits of whole sequences: for training, or to score a text.

        Args:
          tokens: int32 `[B, T]`.
          lengths: int32 `[B]`, the tokens of each row; what follows them is padding. Default: T.
          remat: Wraps the function of a layer, as `jax.checkpoint` does: what the backward pass
            computes again. Default: nothing.

        Returns:
          float32 `[B, T, vocab_size]`; arbitrary for padding.
        """
        x, _ = self._layers(tokens, counts=lengths, remat=remat)
        return self._logits(x)

    def extend(self, tokens, cache, counts=None, *, cache_is_empty=False, last=True):
        """Logits of the token that follows each row, after appending `tokens` to the cache.

        Args:
          tokens: int32 `[B, T]`, the next tokens of each row: a prompt, a part of it, one token.
          cache: A `jax_fa.KVCache` or `jax_fa.PagedKVCache` with `layers=config.layers`. Donate it.
          counts: int32 `[B]`, how many of the T tokens each row has. Default: all.
          cache_is_empty: Whether no row holds tokens yet (a Python bool): the prompt's keys are
            then read as they are computed, not back from the cache.
          last: Whether only what follows a row's last token is wanted (a Python bool), not what
            follows each.

        Returns:
          `(logits, cache)`: float32 `[B, vocab_size]`, or `[B, T, vocab_size]` unless `last`;
          arbitrary for padding.
        """
        batch, length = tokens.shape
        x, cache = self._layers(tokens, cache, counts=counts, cache_is_empty=cache_is_empty)
        if counts is None:
            counts = jnp.full((batch,), length, jnp.int32)
        cache = cache.advance(counts)
        if not last:
            return self._logits(x), cache
        x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
        return self._logits(x)[:, 0], cache

    def extend_packed(self, tokens, cu_seqlens, cache, *, split_size=None):
        """As `extend`, for rows of any number of new tokens: prompts' chunks beside single tokens.

        Args:
          tokens: int32 `[total]`: row b brings `cu_seqlens[b] : cu_seqlens[b + 1]`; those
            past the last row are padding.
          cu_seqlens: int32 `[B + 1]`.
          cache: As for `extend`. Donate it.
          split_size: As for `jax_fa.hybrid_attention`.

        Returns:
          `(logits, cache)`: float32 `[B, vocab_size]`, arbitrary for rows of no new tokens.
        """
        x, cache = self._layers(tokens, cache, cu_seqlens=cu_seqlens, split_size=split_size)
        last = jnp.maximum(cu_seqlens[1:] - 1, 0)
        return self._logits(x[last]), cache.advance(cu_seqlens[1:] - cu_seqlens[:-1])

    def _layers(self, tokens, cache=None, remat=None, **attention):
        rotary = rotary_tables(
            self.config.max_length, self.config.head_dim, self.config.rotary_base
        )
        block, weights = nnx.split(self.blocks)

        def layer(carry, xs):
            weights, index = xs
            x, cache = carry
            return nnx.merge(block, weights)(
                x, cache, layer=index, rotary=rotary, **attention
            ), None

        layers = weights, jnp.arange(self.config.layers, dtype=jnp.int32)
        layer = layer if remat is None else remat(layer)
        x = _look_up(jnp.dtype(self.config.dtype), self.embed.embedding[...], tokens)
        (x, cache), _ = jax.lax.scan(layer, (x, cache), layers)
        return self.norm(x), cache

    def _logits(self, x):
        return jnp.einsum(
            "...d,vd->...v",
            x,
            self.embed.embedding[...].astype(x.dtype),
            precision=self.config.linear()["precision"],
            preferred_element_type=jnp.float32,
        )
