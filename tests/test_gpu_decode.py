"""Decode by the kernels against the float64 oracle (`pytest -m gpu`)."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import DTYPES, QUANTIZED, check_decode, filled, same_bits

import jax_fa

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_decode_head_dims(head_dim, dtype, kind, rng):
    cache, wide, maps = filled(rng, kind, 3, 350, 2, head_dim, dtype)
    q = cases.normal(rng, 3, 1, 8, head_dim, dtype=jnp.dtype(dtype))
    check_decode(q, cache, wide, jnp.array([350, 0, 129], jnp.int32), maps, dtype)


@pytest.mark.parametrize("len_q", [1, 3, 16])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_decode_tokens_and_groups(len_q, group, rng):
    cache, wide, maps = filled(rng, "contiguous", 2, 239, 2, 64, "bfloat16")
    q = cases.normal(rng, 2, len_q, 2 * group, 64, dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([239, 7], jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("feature", cases.DECODE_FEATURES)
def test_decode_features(feature, kind, rng):
    cache, wide, maps = filled(rng, kind, 3, 217, 2, 64, "bfloat16", page=8)
    q = cases.normal(rng, 3, 2, 8, 64, dtype=jnp.bfloat16)
    options = cases.options_of((feature,), rng, cases.Shape(3, 2, 217, 8, 2, 64))
    check_decode(q, cache, wide, jnp.array([217, 1, 63], jnp.int32), maps, "bfloat16", **options)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype, granularity, size", QUANTIZED)
def test_decode_quantized(dtype, granularity, size, kind, rng):
    for head_dim, q_dtype in ((64, "bfloat16"), (128, "float16")):
        cache, wide, maps = filled(rng, kind, 2, 300, 2, head_dim, dtype, granularity, size)
        q = cases.normal(rng, 2, 1, 8, head_dim, dtype=jnp.dtype(q_dtype))
        check_decode(q, cache, wide, jnp.array([300, 65], jnp.int32), maps, q_dtype)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("group, len_q", [(1, 1), (3, 4), (8, 4)])
def test_decode_over_scales_of_groups(group, len_q, size, kind, rng):
    for rows, dtype in ((2, "int8"), (150, "float8_e4m3fn")):  # few rows, and more than run at once
        cache, _, maps = filled(rng, kind, rows, 139, 2, 128, dtype, "group", size)
        spread = [2.0 ** rng.integers(-10, 1, x.scale.shape) for x in cache]
        cache = [jax_fa.QuantizedArray(x.values, x.scale * s) for x, s in zip(cache, spread)]
        wide = [reference.dequantize(x.values, x.scale) for x in cache]
        q = cases.normal(rng, rows, len_q, 2 * group, 128, dtype=jnp.bfloat16)
        lengths = jnp.asarray(rng.integers(0, 140, rows), jnp.int32).at[0].set(139)
        check_decode(q, cache, wide, lengths, maps, "bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_decode_over_groups_of_keys_or_of_values_alone(dtype, rng):
    for sizes in ((32, None), (None, 16)):
        k, v = (cases.normal(rng, 3, 217, 2, 64) for _ in "kv")
        cache = [
            jax_fa.quantize(x, dtype, "group" if size else "head", size)
            for x, size in zip((k, v), sizes)
        ]
        wide = [reference.dequantize(x.values, x.scale) for x in cache]
        q = cases.normal(rng, 3, 1, 8, 64, dtype=jnp.float16)
        check_decode(q, cache, wide, jnp.array([217, 0, 33], jnp.int32), {}, "float16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode_of_a_long_row_is_split_and_deterministic(kind, dtype, rng):
    cache, wide, maps = filled(rng, kind, 1, 20011, 2, 64, dtype, page=64)
    q = cases.normal(rng, 1, 1, 8, 64, dtype=jnp.bfloat16)
    lengths = jnp.array([20011], jnp.int32)
    call, actual = check_decode(q, cache, wide, lengths, maps, "bfloat16")
    for _ in range(3):
        same_bits(call(q, cache, lengths, maps), actual)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows, splits", [(1, 8), (2, 4), (4, 2)])
def test_decode_of_few_rows_in_clusters(rows, splits, dtype, kind, rng):
    cache, wide, maps = filled(rng, kind, rows, 1511, 8, 128, dtype)
    q = cases.normal(rng, rows, 3, 16, 128, dtype=jnp.bfloat16)
    lengths = jnp.array([1511, 700, 3, 0], jnp.int32)[:rows]

    def attend(q):
        return jax_fa.decode_attention(q, *cache, lengths, **maps)

    (plan,) = jax_fa.explain(attend, q, device="h200")
    assert (plan.warps, plan.splits) == (8, splits)
    for options in ({}, {"window": 900, "softcap": 20.0}):
        call, actual = check_decode(q, cache, wide, lengths, maps, "bfloat16", **options)
        same_bits(call(q, cache, lengths, maps), actual)
    for length in (0, 17):  # parts without keys
        check_decode(q, cache, wide, jnp.full(rows, length, jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize(
    "dtype, dim, rows, tokens",
    [
        ("bfloat16", 64, 34, 600),
        ("bfloat16", 128, 34, 600),
        ("bfloat16", 256, 100, 900),
        ("int8", 128, 34, 600),
    ],
)
def test_decode_of_many_rows_in_pairs_of_blocks(dtype, dim, rows, tokens, kind, rng):
    cache, wide, maps = filled(rng, kind, rows, tokens, 4, dim, dtype)
    q = cases.normal(rng, rows, 1, 8, dim, dtype=jnp.bfloat16)
    lengths = jnp.array(rng.integers(0, tokens, rows), jnp.int32).at[:3].set((0, 5, tokens))

    def attend(q):
        return jax_fa.decode_attention(q, *cache, lengths, **maps)

    (plan,) = jax_fa.explain(attend, q, device="h200")
    assert (plan.warps, plan.splits) == (2, 2)
    for options in ({}, {"window": 400, "softcap": 20.0}):
        call, actual = check_decode(q, cache, wide, lengths, maps, "bfloat16", **options)
        same_bits(call(q, cache, lengths, maps), actual)


@pytest.mark.parametrize("page", [1, 8, 16, 128])
def test_decode_page_sizes(page, rng):
    cache, wide, maps = filled(rng, "paged", 2, 300, 2, 64, "bfloat16", page=page)
    q = cases.normal(rng, 2, 1, 8, 64, dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([300, 65], jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_decode_layers(kind, rng):
    for dtype in ("bfloat16", "int8"):
        cache, wide, maps = filled(rng, kind, 2, 139, 2, 64, dtype, layers=3)
        q = cases.normal(rng, 2, 1, 8, 64, dtype=jnp.bfloat16)
        check_decode(q, cache, wide, jnp.array([139, 65], jnp.int32), maps, "bfloat16")


def test_decode_batch_index(rng):
    cache, wide, _ = filled(rng, "contiguous", 4, 139, 2, 64, "bfloat16")
    maps = {"batch_index": jnp.array([3, 0, 3], jnp.int32)}
    q = cases.normal(rng, 3, 1, 8, 64, dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([139, 65, 2], jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_decode_and_hybrid_poison(kind, dtype, rng):
    lengths = np.array([139, 0, 70], np.int32)
    cache, _, maps = filled(rng, kind, 3, 144, 2, 64, dtype)
    q = cases.normal(rng, 3, 1, 8, 64, dtype=jnp.bfloat16)
    cu, packed = cases.cu_seqlens([30, 0, 1]), cases.normal(rng, 40, 8, 64, dtype=jnp.bfloat16)

    @jax.jit
    def call(q, packed, cache, maps):
        return (
            jax_fa.decode_attention(q, *cache, lengths, return_lse=True, **maps),
            jax_fa.hybrid_attention(packed, *cache, cu, lengths, return_lse=True, **maps),
        )

    live = np.zeros(cache[0].shape[:2], bool)
    table = np.asarray(maps.get("page_table", np.zeros((3, 0), np.int32))).copy()
    for b, n in enumerate(lengths):
        for j in range(n):
            live[(table[b, j // 16], j % 16) if kind == "paged" else (b, j)] = True
        table[b, -(-n // 16) :] = [1 << 30, -1, -(1 << 31)][b]

    def poison(x):
        if isinstance(x, jax_fa.QuantizedArray):
            scale = jnp.where(live[:, None, :, None], x.scale, jnp.nan)
            bits = jnp.where(
                live[..., None, None], jax.lax.bitcast_convert_type(x.values, jnp.int8), -1
            )
            return jax_fa.QuantizedArray(jax.lax.bitcast_convert_type(bits, x.values.dtype), scale)
        return jnp.where(live[..., None, None], x, jnp.nan)

    dirty_maps = {"page_table": jnp.asarray(table)} if kind == "paged" else {}
    dirty = call(q, packed.at[31:].set(jnp.nan), tuple(map(poison, cache)), dirty_maps)
    same_bits(dirty, call(q, packed, cache, maps))
