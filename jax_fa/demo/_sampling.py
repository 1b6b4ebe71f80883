"""Tokens from a model: the jitted steps, how a token is chosen, and the loop around them."""

import dataclasses
import functools as ft
import time

import jax
import jax.numpy as jnp

import jax_fa

_PAGE_SIZE = 64
_SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Samples from the k most likely tokens; 0: from all.
      top_p: Samples from the fewest most likely tokens whose probabilities sum to p (Holtzman et
        al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def __call__(self, logits, key):
        """Token ids int32 `[B]` from float32 logits `[B, vocab_size]`."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        count = min(self.top_k or logits.shape[-1], logits.shape[-1])
        logits, tokens = jax.lax.top_k(logits / self.temperature, count)
        # Tokens come sorted: one stays if those before it do not reach top_p.
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        chosen = jax.random.categorical(key, jnp.where(before < self.top_p, logits, -jnp.inf))
        return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def create_cache(config, batch, max_length, kind="contiguous", dtype=None):
    """An empty cache for a `Llama` of `config`.

    Args:
      config: A `LlamaConfig`.
      batch: Number of rows.
      max_length: Tokens that a row can hold.
      kind: "contiguous", or "paged": a pool of pages, of which each row gets its share in advance.
      dtype: Of keys and values: a float dtype, int8, float8_e4m3fn or float8_e5m2. Default: that of
        the model. 8-bit ones have a scale for each head of each token.

    Returns:
      A `jax_fa.KVCache` or a `jax_fa.PagedKVCache`.

    Raises:
      ValueError: for another kind.
    """
    sizes = batch, config.kv_heads, config.head_dim
    options = dict(layers=config.layers, dtype=jnp.dtype(dtype or config.dtype))
    if kind == "contiguous":
        return jax_fa.KVCache.create(batch, max_length, *sizes[1:], **options)
    if kind != "paged":
        raise ValueError(f"kind must be 'contiguous' or 'paged', got {kind!r}")
    pages = -(-max_length // _PAGE_SIZE)
    cache = jax_fa.PagedKVCache.create(
        batch * pages, _PAGE_SIZE, batch, pages, *sizes[1:], **options
    )
    table = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
    return dataclasses.replace(cache, page_table=table)


@ft.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def prefill_step(model, tokens, counts, cache, key, *, sampling):
    """The first token after each prompt: `(int32 [B], cache)`.

    Args:
      model: A `Llama`.
      tokens: int32 `[B, T]`, the prompts, padded at their ends.
      counts: int32 `[B]`, the tokens of each prompt.
      cache: An empty cache; donated.
      key: A JAX random key.
      sampling: A `Sampling`.
    """
    logits, cache = model.extend(tokens, cache, counts, cache_is_empty=True)
    return _sample(logits, cache, key, sampling), cache


@ft.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def decode_step(model, tokens, cache, key, *, sampling):
    """The token after int32 `[B]` tokens: `(int32 [B], cache)`; arguments as `prefill_step`."""
    logits, cache = model.extend(tokens[:, None], cache)
    return _sample(logits, cache, key, sampling), cache


def _sample(logits, cache, key, sampling):
    return sampling(logits, jax.random.fold_in(key, cache.lengths[0]))


def padded_length(length, most):
    """A power of two, or `most`: prompts of few lengths reach the compiler."""
    return min(most, max(_SHORTEST, 1 << (length - 1).bit_length()))


class Generation:
    """One answer to one prompt: iterating over it yields token ids as they come.

    Args:
      model: A `Llama`.
      prompt: Token ids.
      max_tokens: Yields at most so many; fewer where the model's context ends.
      stop: The token id that ends the answer, not yielded; None: none does.
      sampling: A `Sampling`.
      seed: Of the random numbers.
      cache: "contiguous" or "paged".
      kv_dtype: As `dtype` of `create_cache`.

    Attributes:
      prefill_seconds: Time from the prompt to its first token.
      steps: Decoding steps so far; each made one more token, `stop` included.
      decode_seconds: Time that they took.

    Raises:
      ValueError: for a prompt of no tokens, or of as many as the model's context or more.
    """

    def __init__(
        self,
        model,
        prompt,
        max_tokens,
        *,
        stop=None,
        sampling=Sampling(),
        seed=0,
        cache="contiguous",
        kv_dtype=None,
    ):
        context = model.config.max_length
        if not 0 < len(prompt) < context:
            raise ValueError(
                f"the prompt must have 1 to {context - 1} tokens, because the model's context is "
                f"{context}, got {len(prompt)}"
            )
        self.max_tokens = min(max_tokens, context - len(prompt))
        self.prefill_seconds = self.decode_seconds = 0.0
        self.steps = 0
        self._model, self._stop = model, stop
        padding = padded_length(len(prompt), context) - len(prompt)
        self._tokens = jnp.array([[*prompt, *[0] * padding]], jnp.int32)
        self._counts = jnp.array([len(prompt)], jnp.int32)
        self._key = jax.random.key(seed)
        capacity = padded_length(len(prompt) + self.max_tokens, context)
        self._create_cache = ft.partial(create_cache, model.config, 1, capacity, cache, kv_dtype)
        self._prefill = ft.partial(prefill_step, sampling=sampling)
        self._decode = ft.partial(decode_step, sampling=sampling)

    def compile(self):
        """Compiles both steps ahead of time, so that the seconds hold no compilation."""
        empty = jax.eval_shape(self._create_cache)
        sampling = self._prefill.keywords["sampling"]
        first = jax.ShapeDtypeStruct((1,), jnp.int32)
        prompt = self._model, self._tokens, self._counts, empty, self._key
        self._prefill = prefill_step.lower(*prompt, sampling=sampling).compile()
        step = self._model, first, empty, self._key
        self._decode = decode_step.lower(*step, sampling=sampling).compile()

    def __iter__(self):
        cache = self._create_cache()
        start = time.perf_counter()
        token, cache = self._prefill(self._model, self._tokens, self._counts, cache, self._key)
        value = int(token[0])
        first = time.perf_counter()
        self.prefill_seconds = first - start
        for remaining in reversed(range(self.max_tokens)):
            if value == self._stop:
                return
            if remaining:
                # Runs on the device while the caller handles the token before it.
                token, cache = self._decode(self._model, token, cache, self._key)
            yield value
            if remaining:
                value = int(token[0])
                self.steps += 1
                self.decode_seconds = time.perf_counter() - first
