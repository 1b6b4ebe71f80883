"""Small caches of every kind, which tests of append and of attention share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa

HEADS, DIM, BATCH, LENGTH, PAGE, PAGES = 2, 8, 3, 24, 8, 11
TABLE = np.array([[4, 0, 9], [2, 7, 1], [10, 3, 5]], np.int32)
QUANTIZED = [
    ("int8", "head", None), ("int8", "token", None), ("int8", "group", 4), ("int8", "tensor", None),
    ("float8_e4m3fn", "head", None), ("float8_e4m3fn", None, None), ("float8_e5m2", "group", 2),
    ("float8_e5m2", "tensor", None),
]  # fmt: skip
PLAIN = ["float32", "float16", "bfloat16"]


def create(kind, *, layers=None, batch=BATCH, length=LENGTH, heads=HEADS, dim=DIM, dtype="float32",
           **options):  # fmt: skip
    if options.get("granularity") == "tensor":
        options |= {"k_scale": 0.03, "v_scale": 0.02}
    if kind == "contiguous":
        return jax_fa.KVCache.create(
            batch, length, heads, dim, layers=layers, dtype=dtype, **options
        )
    cache = jax_fa.PagedKVCache.create(
        PAGES, PAGE, batch, length // PAGE, heads, dim, layers=layers, dtype=dtype, **options
    )
    return dataclasses.replace(cache, page_table=jnp.asarray(TABLE[:batch]))


def with_garbage(cache, rng, lengths):
    """Every element a number of its own, so that any write shows."""

    def fill(x):
        return jnp.asarray(rng.standard_normal(x.shape), x.dtype)

    return dataclasses.replace(
        cache, k=jax.tree.map(fill, cache.k), v=jax.tree.map(fill, cache.v),
        lengths=jnp.asarray(lengths, jnp.int32),
    )  # fmt: skip
