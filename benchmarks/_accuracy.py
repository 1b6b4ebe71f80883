"""Errors of 8-bit caches: of attention, of a language model's loss, of its greedy tokens."""

import concurrent.futures
import functools as ft
import itertools
from typing import NamedTuple

import _machine
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_fa
from jax_fa import demo
from jax_fa.flax import rotary_tables

PROMPTS = (
    "What is the capital of France, and why is it famous?",
    "Write a Python function that returns the n-th Fibonacci number.",
)
_QUERIES = 16  # that read the cache
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


class Cache(NamedTuple):
    """How a cache holds its numbers."""

    dtype: str
    granularity: str | None = None
    group_size: int | None = None

    @property
    def name(self):
        size = f" {self.group_size}" if self.group_size else ""
        return f"{self.granularity or 'none'}{size}" if self.quantized else ""

    @property
    def quantized(self):
        return self.dtype in _LARGEST

    def of(self, x):
        """`x` as it lies in the cache."""
        if not self.quantized:
            return x.astype(self.dtype)
        return jax_fa.quantize(x, self.dtype, self.granularity, self.group_size)


CACHES = [
    Cache("bfloat16"),
    *(
        Cache(dtype, granularity, 32 if granularity == "group" else None)
        for dtype in _LARGEST
        for granularity in (None, "tensor", "token", "head", "group")
        if (dtype, granularity) != ("int8", None)
    ),
]
SHORT_CACHES = [cache for cache in CACHES if cache.granularity in (None, "head")]


def relative(got, want):
    """||got - want|| / ||want|| of everything."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def cosine(got, want):
    """Mean over rows of the cosine of the angle between them; rows are the last axis."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1)
    return float(((got * want).sum(-1) / norms).mean())


@ft.partial(jax.jit, static_argnames="implementation")
def attend(q, k, v, implementation="reference"):
    """The last tokens of rows that fill their caches."""
    lengths = jnp.full((q.shape[0],), k.shape[-3], jnp.int32)
    return jax_fa.decode_attention(q, k, v, lengths, implementation=implementation)


def attention_errors(q, k, v, cache):
    """Errors of attention over a cache of float32 k and v, as a row of a table.

    Each row of the batch is quantized apart from the others; the errors are means over them.
    """
    want = attend(q, k, v)
    kept = [jax.vmap(cache.of)(x) for x in (k, v)]
    wide = kept if cache.quantized else [x.astype(jnp.float32) for x in kept]
    got = attend(q, *wide)
    errors = list(map(relative, got, want))
    row = {**cache._asdict(), "relative": float(np.mean(errors)), "cosine": cosine(got, want)}
    if len(errors) > 1:
        row["worst"] = max(errors)
    if _machine.gpu() is not None:
        q = q.astype(jnp.bfloat16)
        got, want = attend(q, *kept, implementation="cuda"), attend(q.astype(jnp.float32), *wide)
        row["kernel"] = float(np.mean(list(map(relative, got, want))))
    return row


def _normal(key, shape):
    return jax.random.normal(key, shape, jnp.float32)


def _student(key, shape):
    return jax.random.t(key, 3.0, shape, jnp.float32)


def _outlier(key, shape):
    """One channel is 20 times as large."""
    return _normal(key, shape).at[..., 5].multiply(20.0)


# Keys and values.
DISTRIBUTIONS = {
    "normal": (_normal, _normal),
    "Student t, 3 degrees": (_student, _student),
    "one channel of the keys x 20": (_outlier, _normal),
}


def random_inputs(name, length, heads, kv_heads, dim=128):
    """q `[1, T, N, H]`, k and v `[1, S, K, H]`, float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    of_keys, of_values = DISTRIBUTIONS[name]
    shape = (1, length, kv_heads, dim)
    q = _normal(keys[0], (1, _QUERIES, heads, dim))
    return q, of_keys(keys[1], shape), of_values(keys[2], shape)


def each(function, items):
    """`[function(item) for item in items]`; on a GPU, where compiling takes longest, at once."""
    with concurrent.futures.ThreadPoolExecutor(1 if _machine.gpu() is None else 8) as pool:
        return list(pool.map(function, items))


def random_part(lengths, caches, **heads):
    """Errors over random keys and values."""

    def row(item):
        name, length, cache = item
        errors = attention_errors(*random_inputs(name, length, **heads), cache)
        return {"data": name, "keys": length, **errors}

    return each(row, list(itertools.product(DISTRIBUTIONS, lengths, caches)))


def text_tokens(tokenizer, count):
    """The first tokens of Python's own documentation, int32 `[count]`."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return np.asarray(tokenizer.encode(text[: 8 * count])[:count], np.int32)


@ft.partial(jax.jit, static_argnames="queries")
def layers_of(model, tokens, queries):
    """What each layer's attention reads of a text `[T]`.

    Returns:
      q `[L, queries, N, H]`, its last queries, and k and v `[L, T, K, H]`, float32.
    """
    config = model.config
    length = tokens.shape[0]
    rotary = rotary_tables(config.max_length, config.head_dim, config.rotary_base)
    positions = jnp.arange(length, dtype=jnp.int32)
    block, weights = nnx.split(model.blocks)

    def layer(x, weights):
        block_of_layer = nnx.merge(block, weights)
        attention, normed = block_of_layer.attention, block_of_layer.attention_norm(x)
        q = jax_fa.apply_rotary(attention.query(normed), *rotary, positions)
        k = jax_fa.apply_rotary(attention.key(normed), *rotary, positions)
        of_layer = q[0, -queries:], k[0], attention.value(normed)[0]
        return block_of_layer(x, rotary=rotary)[0], of_layer

    _, of_layers = jax.lax.scan(layer, model.embed(tokens[None]), weights)
    return jax.tree.map(lambda x: x.astype(jnp.float32), of_layers)


def model_part(model, tokens):
    """Errors over the model's own keys and values: means over the layers, and the worst one's."""
    read = layers_of(model, jnp.asarray(tokens), queries=_QUERIES)

    def row(cache):
        data = {"data": "SmolLM2 on text", "keys": len(tokens)}
        return data | attention_errors(*read, cache)

    return each(row, CACHES)


@ft.partial(jax.jit, donate_argnames="cache")
def score(model, tokens, targets, cache):
    """-log p of each target `[T]` after the tokens `[T]`, the likeliest token, and the cache."""
    logits, cache = model.extend(tokens[None], cache, last=False)
    scores = jax.nn.log_softmax(logits[0])
    loss = -jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    return loss, scores.argmax(-1), cache


def losses(model, tokens, cache, chunk):
    """-log p of `tokens[1:]`, and the likeliest ones, each read from the cache in chunks.

    A chunk's keys and values are appended, quantized, before its queries attend to them.
    """
    out = []
    for start in range(0, len(tokens) - 1, chunk):
        piece = jnp.asarray(tokens[start : start + chunk + 1])
        *result, cache = score(model, piece[:-1], piece[1:], cache)
        out.append(result)
    return tuple(np.concatenate(x) for x in zip(*out, strict=True))


def create_cache(config, length, cache, largest):
    """An empty `KVCache`; `largest` key and value, for scales of a whole tensor."""
    options = {}
    if cache.quantized:
        options = dict(granularity=cache.granularity, group_size=cache.group_size)
        if cache.granularity == "tensor":
            scales = (float(x) / _LARGEST[cache.dtype] for x in largest)
            options |= dict(zip(("k_scale", "v_scale"), scales, strict=True))
    sizes = 1, length, config.kv_heads, config.head_dim
    dtype = jnp.dtype(cache.dtype)
    return jax_fa.KVCache.create(*sizes, layers=config.layers, dtype=dtype, **options)


def perplexity_part(model, tokens, chunk=512, caches=CACHES):
    """Perplexity of a text through each cache."""
    _, *largest = (jnp.abs(x).max() for x in layers_of(model, jnp.asarray(tokens), queries=1))
    length = -(-len(tokens) // chunk) * chunk

    def run(cache):
        empty = create_cache(model.config, length, cache, largest)
        return losses(model, tokens, empty, chunk)

    caches = [Cache("float32"), *caches]
    results = each(run, caches)
    (exact, likeliest), *_ = results
    return [
        {
            **cache._asdict(),
            "tokens": len(loss),
            "perplexity": float(np.exp(loss.mean())),
            "divergence": float(np.abs(loss - exact).mean()),
            "same_likeliest": float((first == likeliest).mean()),
        }
        for cache, (loss, first) in zip(caches, results, strict=True)
    ]


def generate_part(model, tokenizer, count=128):
    """Greedy answers with each dtype of the cache: how they differ from those with bfloat16."""

    def run(dtype):
        prompts = map(tokenizer.encode_chat, PROMPTS)
        return [list(demo.Generation(model, ids, count, kv_dtype=dtype)) for ids in prompts]

    dtypes = ["bfloat16", "float32", *_LARGEST]
    answers = dict(zip(dtypes, each(run, dtypes), strict=True))
    rows = []
    for dtype in dtypes[1:]:
        for prompt, x, y in zip(PROMPTS, answers[dtype], answers["bfloat16"], strict=True):
            differ = np.flatnonzero(np.not_equal(x, y))
            first = int(differ[0]) if len(differ) else None
            cache = Cache(dtype, "head" if dtype in _LARGEST else None, None)
            row = {**cache._asdict(), "prompt": prompt, "tokens": len(x), "differ": len(differ)}
            rows.append(row | {"first": first, "text": tokenizer.decode(x)})
    return rows
