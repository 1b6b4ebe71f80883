"""Hybrid batches by the kernels against the float64 oracle (`pytest -m gpu`)."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import DTYPES, QUANTIZED, check, check_hybrid, filled, same_bits

import jax_fa

pytestmark = pytest.mark.gpu

MIXES = [[1, 1, 1, 1], [70, 1, 0, 129], [0, 0, 200, 1], [8, 9, 2, 131]]


@pytest.mark.parametrize("lengths_q", MIXES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"])
def test_hybrid(dtype, kind, lengths_q, rng):
    cache, wide, maps = filled(rng, kind, 4, 240, 2, 64, dtype)
    lengths = jnp.array([100, 239, 201, 130], jnp.int32)
    q_dtype = dtype if dtype in DTYPES else "bfloat16"
    q = cases.normal(rng, sum(lengths_q) + 7, 8, 64, dtype=jnp.dtype(q_dtype))
    cu = cases.cu_seqlens(lengths_q)

    @jax.jit
    def call(q, cache, maps):
        return jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps)

    check_hybrid(call(q, cache, maps), q, wide, cu, lengths, maps)


# Rows of up to 512 keys are decoded whole, longer ones divided on the device.
@pytest.mark.parametrize("length", [217, 617])
@pytest.mark.parametrize("feature", [*cases.DECODE_FEATURES, "full"])
def test_hybrid_features(feature, length, rng):
    cache, wide, maps = filled(rng, "paged", 3, length, 2, 128, "bfloat16", page=32)
    options = (
        {"causal": False}
        if feature == "full"
        else cases.options_of((feature,), rng, cases.Shape(3, 2, length, 8, 2, 128))
    )
    cu, q = cases.cu_seqlens([1, 66, 3]), cases.normal(rng, 70, 8, 128, dtype=jnp.bfloat16)
    lengths = jnp.array([length, 100, 2], jnp.int32)
    actual = jax.jit(
        lambda q, cache: jax_fa.hybrid_attention(
            q, *cache, cu, lengths, return_lse=True, **maps, **options
        )
    )(q, cache)
    factor = 3 if feature == "softcap" else 2
    check_hybrid(actual, q, wide, cu, lengths, maps, factor, **options)


def random_mix(rng, batch, total, length):
    """cu_seqlens and lengths of a cache, of rows that are empty, decode, verify or prefill."""
    kinds = [np.zeros(batch, int), np.ones(batch, int), rng.integers(2, 40, batch),
             rng.integers(1, total, batch)]  # fmt: skip
    counts = np.choose(rng.integers(4, size=batch), kinds)
    ends = np.minimum(np.cumsum(counts), total)
    lengths = np.minimum(np.diff(ends, prepend=0) + rng.integers(0, length, batch), length)
    return cases.cu_seqlens(np.diff(ends, prepend=0)), lengths.astype(np.int32)


def run_hybrid(q, cache, cu, lengths, maps, **options):
    return jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps, **options)


@pytest.mark.parametrize("length", [300, 700])
@pytest.mark.parametrize("heads", [2, 6, 16, 40])
@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 16), ("paged", 3)])
def test_hybrid_of_random_mixes(kind, page, heads, length, rng):
    batch, total = 37, 300
    cache, wide, maps = filled(rng, kind, batch, length, 2, 64, "bfloat16", page=page)
    q = cases.normal(rng, total, heads, 64, dtype=jnp.bfloat16)
    call = jax.jit(lambda *args: run_hybrid(*args))  # compiled for these shapes alone
    for _ in range(4):
        cu, lengths = random_mix(rng, batch, total, length)
        # a row that is longer than its cache sees nothing before its first keys
        check_hybrid(call(q, cache, cu, lengths, maps), q, wide, cu, lengths, maps)
    assert call._cache_size() == 1


@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 8), ("paged", 256)])
def test_hybrid_layers_and_page_sizes(kind, page, rng):
    cache, wide, maps = filled(rng, kind, 3, 300, 2, 128, "bfloat16", page=page, layers=3)
    q = cases.normal(rng, 230, 8, 128, dtype=jnp.bfloat16)
    cu, lengths = cases.cu_seqlens([150, 1, 70]), np.array([200, 300, 71], np.int32)
    actual = jax.jit(run_hybrid)(q, cache, cu, lengths, maps)
    check_hybrid(actual, q, wide, cu, lengths, maps)


@pytest.mark.parametrize(
    "kind, page, layers, length",
    [("paged", 16, 2, 700), ("paged", 24, None, 500), ("paged", 12, None, 500),
     ("contiguous", 0, 3, 700)],
)  # fmt: skip
@pytest.mark.parametrize("dtype, granularity, size", QUANTIZED)
def test_hybrid_over_quantized_keys(dtype, granularity, size, kind, page, layers, length, rng):
    cache, wide, maps = filled(
        rng, kind, 9, length, 2, 128, dtype, granularity, size, page=page, layers=layers
    )
    q = cases.normal(rng, 300, 8, 128, dtype=jnp.float16)
    cu, lengths = random_mix(rng, 9, 300, length)
    actual = jax.jit(run_hybrid)(q, cache, cu, lengths, maps)
    check_hybrid(actual, q, wide, cu, lengths, maps)


@pytest.mark.parametrize("page", [16, 24, 128])
@pytest.mark.parametrize("granularity", [None, "head"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_hybrid_over_keys_that_stay_bytes(dtype, granularity, page, rng):
    cache, wide, maps = filled(
        rng, "paged", 9, 500, 2, 128, dtype, granularity, page=page, layers=2
    )
    q = cases.normal(rng, 300, 8, 128, dtype=jnp.bfloat16)
    cu, lengths = random_mix(rng, 9, 300, 500)
    call = jax.jit(run_hybrid)
    actual = call(q, cache, cu, lengths, maps)
    check_hybrid(actual, q, wide, cu, lengths, maps)
    same_bits(call(q, cache, cu, lengths, maps), actual)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_shared_prefixes(dtype, rng):
    cache, wide, maps = filled(rng, "paged", 5, 900, 2, 128, dtype)
    table = maps["page_table"]
    table = table.at[:, :20].set(table[:1, :20])
    maps = {"page_table": table}
    lengths = np.array([900, 321, 333, 640, 500], np.int32)
    q = cases.normal(rng, 5, 2, 8, 128, dtype=jnp.bfloat16)
    decoded = np.maximum(lengths, 322)  # two tokens behind the prefix

    @jax.jit
    def decode(q, cache, lengths, maps):
        return jax_fa.decode_attention(
            q, *cache, lengths, shared_prefix_pages=20, return_lse=True, **maps
        )

    check(
        decode(q, cache, decoded, maps),
        lambda rounded: reference.decode(q, *wide, decoded, rounded=rounded, **maps),
        "bfloat16",
    )
    packed = cases.normal(rng, 400, 8, 128, dtype=jnp.bfloat16)
    cu = cases.cu_seqlens([1, 1, 8, 300, 77])
    actual = run_hybrid(packed, cache, cu, lengths, maps, shared_prefix_pages=20)
    check_hybrid(actual, packed, wide, cu, lengths, maps)


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 3, 64]], ids=str)
def test_hybrid_of_long_rows_is_split_and_deterministic(counts, rng):
    cache, wide, maps = filled(rng, "paged", 3, 20011, 2, 128, "bfloat16")
    q = cases.normal(rng, sum(counts), 8, 128, dtype=jnp.bfloat16)
    cu, lengths = cases.cu_seqlens(counts), np.array([20011, 17, 9000], np.int32)
    call = jax.jit(run_hybrid)
    first = call(q, cache, cu, lengths, maps)
    check_hybrid(first, q, wide, cu, lengths, maps)
    same_bits(call(q, cache, cu, lengths, maps), first)
    order = np.array([2, 0, 1])
    tokens = np.concatenate([np.arange(cu[b], cu[b + 1]) for b in order])
    again = call(
        q[tokens], cache, cases.cu_seqlens(np.array(counts)[order]), lengths[order],
        {"page_table": maps["page_table"][order]},
    )  # fmt: skip
    same_bits(again, (first[0][tokens], first[1][:, tokens]))


def test_hybrid_with_a_split_size_has_the_bits_of_any_batch(rng):
    cache, _, maps = filled(rng, "contiguous", 4, 5000, 2, 64, "bfloat16")
    q = cases.normal(rng, 40, 8, 64, dtype=jnp.bfloat16)
    call = jax.jit(lambda q, cu, n: run_hybrid(q, cache, cu, n, maps, split_size=256))
    lengths = np.array([4711, 5000, 30, 999], np.int32)
    whole = call(q, cases.cu_seqlens([1, 2, 20, 1]), lengths)
    for others in ([1, 0, 0, 0], [1, 2, 30, 7]):
        part = call(q, cases.cu_seqlens(others), np.array([4711, 5000, 200, 7], np.int32))
        same_bits((part[0][:1], part[1][:, :1]), (whole[0][:1], whole[1][:, :1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 16)])
def test_vmap_over_caches(kind, page, dtype, rng):
    """Each lane reads its own, in rows that decode and in rows that prefill."""
    lanes = [filled(rng, kind, 3, 240, 2, 64, dtype, page=page) for _ in range(2)]
    q = cases.normal(rng, 2, 77, 8, 64, dtype=jnp.bfloat16)
    cu, lengths = cases.cu_seqlens([1, 70, 3]), jnp.array([100, 239, 7], jnp.int32)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *((cache, maps) for cache, _, maps in lanes))
    call = jax.vmap(lambda q, of: run_hybrid(q, of[0], cu, lengths, of[1]))
    out, lse = jax.jit(call)(q, stacked)
    for i, (_, wide, maps) in enumerate(lanes):
        check_hybrid((out[i], lse[i]), q[i], wide, cu, lengths, maps)
