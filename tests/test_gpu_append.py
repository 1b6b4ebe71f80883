"""The append kernel against the reference, and that it writes in place (`pytest -m gpu`)."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import DTYPES, QUANTIZED, new_cache, same_bits

import jax_fa

pytestmark = pytest.mark.gpu

STORED = [*((d, None, None) for d in DTYPES), *QUANTIZED]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype, granularity, size", STORED)
def test_append_equals_the_reference(dtype, granularity, size, kind, rng):
    cos, sin = (cases.normal(rng, 64, 16) for _ in "cs")
    for layers, form, rotary in (
        (None, "all", None),
        (2, "counts", (cos, sin)),
        (None, "packed", (cos, sin)),
    ):
        cache = new_cache(kind, layers, dtype, granularity, size)
        cache = dataclasses.replace(
            cache, lengths=jnp.array([40, 0, 13], jnp.int32)
        )  # row 0 overflows
        k, v = (cases.normal(rng, 3, 17, 2, 64, dtype=jnp.bfloat16) for _ in "kv")
        options = {"counts": jnp.array([17, 3, 0], jnp.int32)} if form == "counts" else {}
        if form == "packed":
            k, v = (x.reshape(51, 2, 64) for x in (k, v))
            options = {"cu_seqlens": jnp.array([0, 20, 20, 45], jnp.int32)}

        def append(implementation):
            @jax.jit
            def call(cache, k, v):
                return cache.append(
                    k, v, layer=None if layers is None else 1, rotary=rotary,  # noqa: B023
                    implementation=implementation, interleaved=form == "packed", **options,  # noqa: B023
                )  # fmt: skip

            return call(cache, k, v)  # noqa: B023

        check_caches(append(None), append("reference"), dtype, rotary is not None)


SHAPES = [  # heads, head dim, rotary dim, interleaved
    (3, 96, 96, False), (5, 40, 40, True), (8, 128, 128, False), (1, 8, 8, True),
    (2, 256, 64, False), (2, 64, 20, False), (2, 64, 12, True), (1, 512, 512, False),
]  # fmt: skip


@pytest.mark.parametrize("stored", [("bfloat16", None, None), ("int8", "head", None)], ids=str)
@pytest.mark.parametrize("heads, dim, rotary_dim, interleaved", SHAPES)
def test_append_of_many_tokens(heads, dim, rotary_dim, interleaved, stored, rng):
    check_many(heads, dim, rotary_dim, interleaved, stored, rng)


@pytest.mark.parametrize("dim, size", [(96, 32), (96, 24), (128, 128), (256, 8)])
def test_append_of_groups(dim, size, rng):
    check_many(3, dim, dim, False, ("int8", "group", size), rng)


def check_many(heads, dim, rotary_dim, interleaved, stored, rng):
    """Enough tokens for blocks that own several."""
    dtype, granularity, size = stored
    cache = jax_fa.KVCache.create(
        3, 2112, heads, dim, dtype=dtype, granularity=granularity, group_size=size
    )
    cache = dataclasses.replace(cache, lengths=jnp.array([0, 7, 30], jnp.int32))  # row 2 overflows
    k, v = (cases.normal(rng, 3, 2100, heads, dim, dtype=jnp.bfloat16) for _ in "kv")
    rotary = tuple(cases.normal(rng, 2112, rotary_dim // 2) for _ in "cs")

    def append(implementation):
        @jax.jit
        def call(cache, k, v):
            return cache.append(
                k, v, rotary=rotary, interleaved=interleaved, implementation=implementation
            )

        return call(cache, k, v)

    check_caches(append(None), append("reference"), dtype, rotary=True)


def check_caches(kernel, expected, dtype, rotary):
    same_bits(kernel.lengths, expected.lengths)
    same_bits(kernel.v, expected.v)
    if not rotary:
        same_bits(kernel.k, expected.k)
        return
    for x, y in zip(jax.tree.leaves(kernel.k), jax.tree.leaves(expected.k), strict=True):
        x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
        # rotary may round differently: a step of bfloat16, then of the cache's dtype
        differ = x != y
        assert differ.mean() < 0.02
        np.testing.assert_allclose(x, y, rtol=0.13, atol=1 if dtype == "int8" else 0.02)


def moves(hlo, shapes):
    import re

    found = []
    for shape in shapes:
        pattern = rf"= \w+\[{','.join(map(str, shape))}\]\S* (copy|convert|transpose|copy-start)\("
        found += [line.strip()[:160] for line in hlo.splitlines() if re.search(pattern, line)]
    return found


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "float8_e4m3fn", "float8_e5m2"])
def test_append_in_place(dtype, kind, layers, heads, rng):
    cache = new_cache(kind, layers, dtype, "head", None, heads)
    new = cases.normal(rng, 3, 1, heads, 64, dtype=jnp.bfloat16)

    def append(cache, new, layer):
        return cache.append(new, new, layer=None if layers is None else layer)

    compiled = jax.jit(append, donate_argnums=0).lower(cache, new, jnp.int32(0)).compile()
    arrays = jax.tree.leaves((cache.k, cache.v))
    shapes = {x.shape for x in arrays} | {
        (x.shape[0] * x.shape[1], *x.shape[2:]) for x in arrays if x.ndim == 5
    }
    assert not moves(compiled.as_text(), shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < sum(x.nbytes for x in arrays) / 4
    # without donation the caller's arrays stay
    before = [np.array(x) for x in arrays]
    jax.jit(append)(cache, new, jnp.int32(0))
    for x, y in zip(arrays, before):
        assert np.asarray(x).tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_scan_carries_a_stacked_cache_in_place(dtype, rng):
    cache = jax_fa.KVCache.create(2, 256, 2, 64, layers=3, dtype=dtype)
    q, new = (cases.normal(rng, 2, n, 64, dtype=jnp.bfloat16) for n in (8, 2))

    def step(cache, q):
        def layer(carry, i):
            cache, q = carry
            cache = cache.append(new[:, None], new[:, None], layer=i)
            q = jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths + 1, layer=i)
            return (cache, q), None

        (cache, q), _ = jax.lax.scan(layer, (cache, q), jnp.arange(3, dtype=jnp.int32))
        return cache.advance(1), q

    compiled = jax.jit(step, donate_argnums=0).lower(cache, q).compile()
    shapes = {x.shape for x in jax.tree.leaves((cache.k, cache.v))}
    assert not moves(compiled.as_text(), shapes | {(x[0] * x[1], *x[2:]) for x in shapes})
    cache, out = compiled(cache, q)
    same_bits(out, jnp.repeat(new.astype(jnp.bfloat16), 4, 1)) if dtype == "bfloat16" else None
