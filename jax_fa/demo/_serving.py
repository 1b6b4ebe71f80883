"""Continuous batching on the device: one compiled step over a paged cache for every mix of rows."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa

from ._sampling import Generation, Sampling
from ._scheduler import Request, Step

PAGE_SIZE = 64
# Keys of a row that are summed together: fixed, so that a row's bits do not depend on the others.
_SPLIT_SIZE = 256


def create_requests(config, prompts, max_tokens, seed=0):
    """`Request`s whose answers are those of a `Generation` of each prompt.

    Args:
      config: The `LlamaConfig` of the model.
      prompts: Token ids of each.
      max_tokens: Of an answer, at most; fewer where the model's context ends.
      seed: Of the first; each has one more than that before it.

    Raises:
      ValueError: for a prompt of no tokens, or of as many as the model's context or more.
    """
    context = config.max_length
    requests = []
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(
                f"prompt {i + 1} must have 1 to {context - 1} tokens, because the model's context "
                f"is {context}, got {len(prompt)}"
            )
        requests.append(Request(prompt, min(max_tokens, context - len(prompt)), seed + i))
    return requests


@ft.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("cache",))
def serving_step(model, step, cache, previous, *, sampling):
    """The token after each row's: `(int32 [rows], cache)`.

    Args:
      model: A `Llama`.
      step: A `Step`; where a row brings a chunk that does not end its prompt, its token is
        arbitrary.
      cache: A `jax_fa.PagedKVCache`; donated.
      previous: int32 `[rows]`: what the step before gave; any at the first.
      sampling: A `Sampling`. A row's random numbers are those of a `Generation` of its seed.
    """
    cache = dataclasses.replace(cache, page_table=step.page_table, lengths=step.lengths)
    tokens = jnp.where(step.tokens < 0, previous[-1 - step.tokens], step.tokens)
    logits, cache = model.extend_packed(tokens, step.cu_seqlens, cache, split_size=_SPLIT_SIZE)

    def sample(logits, seed, length):
        return sampling(logits[None], jax.random.fold_in(jax.random.key(seed), length))[0]

    return jax.vmap(sample)(logits, step.seeds, cache.lengths), cache


class Serving:
    """Runs the steps of a `Scheduler`.

    A request's tokens have the same bits whatever else is in the batch: attention sums keys by
    position, the scheduler divides prompts by position, and all else computes each packed token
    by itself, in arrays of one shape.

    Args:
      model: A `Llama`.
      sizes: The `Sizes` of a step.
      stop: The token id that ends an answer, not part of it; None: none does.
      sampling: A `Sampling`.
      kv_dtype: As `dtype` of `create_cache`.
    """

    def __init__(self, model, sizes, *, stop=None, sampling=Sampling(), kv_dtype=None):
        config = model.config
        self.sizes, self.stop = sizes, stop
        self._model, self._sampling, self._kv_dtype = model, sampling, kv_dtype
        self._create_cache = ft.partial(
            jax_fa.PagedKVCache.create,
            sizes.pages,
            sizes.page_size,
            sizes.rows,
            sizes.max_pages,
            config.kv_heads,
            config.head_dim,
            layers=config.layers,
            dtype=jnp.dtype(kv_dtype or config.dtype),
        )
        self._step = ft.partial(serving_step, sampling=sampling)

    def compile(self):
        """Compiles the step ahead of time."""
        sizes = self.sizes
        shapes = (sizes.rows + sizes.chunk,), (sizes.rows + 1,), (sizes.rows,)
        table = sizes.rows, sizes.max_pages
        step = Step(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in (*shapes, table, shapes[-1])))
        empty = jax.eval_shape(self._create_cache)
        previous = jax.ShapeDtypeStruct(shapes[-1], jnp.int32)
        step = serving_step.lower(self._model, step, empty, previous, sampling=self._sampling)
        self._step = step.compile()

    def generation(self, request):
        """The `Generation` of a request: by itself, in steps of a batch of one."""
        return Generation(
            self._model,
            request.prompt,
            request.max_tokens,
            stop=self.stop,
            sampling=self._sampling,
            seed=request.seed,
            kv_dtype=self._kv_dtype,
        )

    def run(self, scheduler):
        """Yields, after each step, the answers that it completed, as `Scheduler.commit`.

        The device has the next step before the host waits for the tokens of one. However it ends,
        all pages of the scheduler are free then.
        """
        cache, tokens = self._create_cache(), jnp.zeros(self.sizes.rows, jnp.int32)
        pending = None  # tokens of the step that was not committed
        try:
            while (step := scheduler.plan()) is not None or scheduler.awaits:
                if step is not None:
                    tokens, cache = self._step(self._model, step, cache, tokens)
                if pending is not None:
                    yield scheduler.commit(np.asarray(pending))
                pending = None if step is None else tokens
        finally:
            scheduler.cancel()
