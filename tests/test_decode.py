"""Attention over caches: decode, hybrid and merge against the float64 oracle."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from caches import (
    BATCH,
    DIM,
    HEADS,
    LENGTH,
    PAGE,
    PAGES,
    PLAIN,
    QUANTIZED,
    TABLE,
    create,
    with_garbage,
)
from reference import assert_close

import jax_fa


def filled(rng, kind, lengths, layers=None, dtype="float32", granularity="head", size=None):
    """A cache full of numbers, and its arrays as float64 for the oracle."""
    cache = with_garbage(create(kind, layers=layers), rng, lengths)
    if dtype in PLAIN:
        k, v = (x.astype(dtype) for x in (cache.k, cache.v))
        wide = k, v
    else:
        k, v = (jax_fa.quantize(x, dtype, granularity, size) for x in (cache.k, cache.v))
        wide = [reference.dequantize(x.values, x.scale) for x in (k, v)]
    return dataclasses.replace(cache, k=k, v=v), [reference.as_float64(x) for x in wide]


def maps_of(cache, layer):
    maps = {} if layer is None else {"layer": layer}
    return maps | ({"page_table": cache.page_table} if hasattr(cache, "page_table") else {})


def check(actual, expected, tolerance=5e-6):
    assert_close(actual[0], expected[0], tolerance, "out")
    assert_close(actual[1], expected[1], tolerance, "lse", relative=1e-6)


STORED = [("float32", None, None), *QUANTIZED]


@pytest.mark.parametrize(
    "kind, layer", [("contiguous", None), ("contiguous", 1), ("paged", None), ("paged", 1)]
)
@pytest.mark.parametrize("dtype, granularity, size", STORED)
def test_decode_and_hybrid(kind, layer, dtype, granularity, size, rng):
    lengths = np.array([17, 0, 24], np.int32)
    cache, (k, v) = filled(rng, kind, lengths, layer and 2, dtype, granularity, size)
    maps = maps_of(cache, layer)
    q = cases.normal(rng, BATCH, 3, 4, DIM)
    cu = cases.cu_seqlens([3, 0, 4])
    packed = cases.normal(rng, 9, 4, DIM)

    @jax.jit
    def call(q, packed, cache):
        shared = {"return_lse": True, **maps_of(cache, layer)}
        decode = jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths, **shared)
        hybrid = jax_fa.hybrid_attention(packed, cache.k, cache.v, cu, cache.lengths, **shared)
        return decode, hybrid

    decode, hybrid = call(q, packed, cache)
    check(decode, reference.decode(q, k, v, lengths, **maps))
    check(hybrid, reference.hybrid(packed, k, v, cu, lengths, **maps))
    assert (decode[0][1] == 0).all() and (decode[1][1] == -jnp.inf).all()
    assert (hybrid[0][7:] == 0).all() and (hybrid[1][:, 7:] == -jnp.inf).all()


@pytest.mark.parametrize("feature", cases.DECODE_FEATURES)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_decode_and_hybrid_features(kind, feature, rng):
    lengths = np.array([2, 19, 24], np.int32)  # the first row has fewer tokens than queries
    cache, (k, v) = filled(rng, kind, lengths)
    maps = maps_of(cache, None)
    shape = cases.Shape(BATCH, 4, LENGTH, 4, HEADS, DIM)
    options = cases.options_of((feature,), rng, shape)
    if feature == "window":
        options["window"] = (5, None)
    q = cases.normal(rng, BATCH, 4, 4, DIM)
    check(
        jax_fa.decode_attention(q, cache.k, cache.v, lengths, return_lse=True, **maps, **options),
        reference.decode(q, k, v, lengths, **maps, **options),
    )
    cu, packed = cases.cu_seqlens([1, 5, 7]), cases.normal(rng, 13, 4, DIM)
    for causal in (True, False):
        check(
            jax_fa.hybrid_attention(
                packed, cache.k, cache.v, cu, lengths, causal=causal, return_lse=True,
                **maps, **options,
            ),
            reference.hybrid(packed, k, v, cu, lengths, causal=causal, **maps, **options),
        )  # fmt: skip


def test_hybrid_split_size_is_a_parameter_of_the_result_only(rng):
    cache, (k, v) = filled(rng, "contiguous", [17, 3, 24])
    cu, q = cases.cu_seqlens([3, 0, 4]), cases.normal(rng, 7, 4, DIM)
    actual = jax_fa.hybrid_attention(
        q, cache.k, cache.v, cu, cache.lengths, split_size=8, return_lse=True
    )
    check(actual, reference.hybrid(q, k, v, cu, cache.lengths))


def test_hybrid_of_more_tiles_than_run_at_once(rng):
    """47 tokens are five tiles of 16, of which four run at once; 43 more are padding."""
    cache, (k, v) = filled(rng, "contiguous", [24, 9, 20])
    cu, q = cases.cu_seqlens([24, 3, 20]), cases.normal(rng, 90, 4, DIM)
    actual = jax_fa.hybrid_attention(q, cache.k, cache.v, cu, cache.lengths, return_lse=True)
    check(actual, reference.hybrid(q, k, v, cu, cache.lengths))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decode_dtypes(dtype, rng):
    cache, (k, v) = filled(rng, "contiguous", [17, 1, 24], dtype=dtype)
    q = cases.normal(rng, BATCH, 1, 4, DIM, dtype=jnp.dtype(dtype))
    out, lse = jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths, return_lse=True)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    expected = reference.decode(q, k, v, cache.lengths)
    assert_close(out, expected[0], 2e-2 if dtype == "bfloat16" else 3e-3)
    assert_close(lse, expected[1], 2e-5)


def test_decode_of_one_token_drops_its_axis(rng):
    cache, _ = filled(rng, "contiguous", [17, 1, 24])
    q = cases.normal(rng, BATCH, 4, DIM)
    one = jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths, return_lse=True)
    four = jax_fa.decode_attention(q[:, None], cache.k, cache.v, cache.lengths, return_lse=True)
    assert one[0].shape == (BATCH, 4, DIM) and one[1].shape == (BATCH, 4)
    np.testing.assert_array_equal(one[0], four[0][:, 0])
    np.testing.assert_array_equal(one[1], four[1][..., 0])


def test_batch_index_maps_query_rows_to_cache_rows(rng):
    cache, (k, v) = filled(rng, "contiguous", [17, 5, 24])
    index = jnp.array([2, 2, 0, 1, 2], jnp.int32)
    lengths = jnp.array([24, 9, 3, 0, 1], jnp.int32)
    q = cases.normal(rng, 5, 2, 4, DIM)
    actual = jax_fa.decode_attention(
        q, cache.k, cache.v, lengths, batch_index=index, return_lse=True
    )
    check(actual, reference.decode(q, k, v, lengths, batch_index=index))
    cu, packed = cases.cu_seqlens([2, 0, 3, 1, 1]), cases.normal(rng, 7, 4, DIM)
    actual = jax_fa.hybrid_attention(
        packed, cache.k, cache.v, cu, lengths, batch_index=index, return_lse=True
    )
    check(actual, reference.hybrid(packed, k, v, cu, lengths, batch_index=index))


def test_rows_of_a_smaller_cache_repeat_without_batch_index(rng):
    cache, (k, v) = filled(rng, "contiguous", [17, 5, 24])
    lengths = jnp.array([24, 9, 3, 0, 1, 17], jnp.int32)
    q = cases.normal(rng, 6, 1, 4, DIM)
    actual = jax_fa.decode_attention(q, cache.k, cache.v, lengths, return_lse=True)
    check(actual, reference.decode(q, k, v, lengths))


def test_shared_and_permuted_pages(rng):
    cache, (k, v) = filled(rng, "paged", [20, 17, 24])
    table = jnp.array([[4, 0, 9], [4, 0, 1], [9, 4, 0]], jnp.int32)  # a shared prefix
    q = cases.normal(rng, BATCH, 2, 4, DIM)
    actual = jax_fa.decode_attention(
        q, cache.k, cache.v, cache.lengths, page_table=table, return_lse=True
    )
    check(actual, reference.decode(q, k, v, cache.lengths, page_table=table))
    order = rng.permutation(PAGES)  # the same tokens elsewhere give the same bits
    moved = jnp.asarray(np.argsort(order)[np.asarray(table)], jnp.int32)
    again = jax_fa.decode_attention(
        q, cache.k[order], cache.v[order], cache.lengths, page_table=moved, return_lse=True
    )
    for x, y in zip(again, actual):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_poison_and_garbage_past_lengths_never_spread(kind, dtype, rng):
    lengths = np.array([17, 0, 9], np.int32)
    cache, _ = filled(rng, kind, lengths, dtype=dtype)
    q, packed, cu = (
        cases.normal(rng, BATCH, 2, 4, DIM),
        cases.normal(rng, 6, 4, DIM),
        cases.cu_seqlens([2, 0, 3]),
    )
    poisoned = dataclasses.replace(cache)
    live = np.zeros(cache.k.shape[:2], bool)
    for b, n in enumerate(lengths):
        for j in range(n):
            live[(b, j) if kind == "contiguous" else (TABLE[b, j // PAGE], j % PAGE)] = True

    def poison(x):
        if isinstance(x, jax_fa.QuantizedArray):
            scale = jnp.where(live[:, None, :, None], x.scale, jnp.nan)
            return jax_fa.QuantizedArray(x.values, scale)
        return jnp.where(live[..., None, None], x, jnp.nan)

    poisoned = dataclasses.replace(cache, k=poison(cache.k), v=poison(cache.v))
    if kind == "paged":
        table = jnp.array([[4, 0, 9], [-7, 1 << 30, -1], [10, 3, -(1 << 31)]], jnp.int32)
        poisoned = dataclasses.replace(poisoned, page_table=table)

    @jax.jit
    def call(q, packed, cache):
        maps = maps_of(cache, None)
        return (
            jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths, return_lse=True, **maps),
            jax_fa.hybrid_attention(
                packed, cache.k, cache.v, cu, cache.lengths, return_lse=True, **maps
            ),
        )

    clean, dirty = call(q, packed, cache), call(q, packed.at[5:].set(jnp.nan), poisoned)
    for x, y in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        np.testing.assert_array_equal(x, y)


def test_prefill_then_decode_equals_attention_over_the_whole(rng):
    q, k, v = cases.qkv(rng, cases.Shape(BATCH, 12, 12, 4, HEADS, DIM))
    whole = jax_fa.flash_attention(q, k, v, causal=True)
    for kind in ("contiguous", "paged"):
        cache = create(kind).append(k[:, :9], v[:, :9])
        maps = maps_of(cache, None)
        first = jax_fa.decode_attention(q[:, :9], cache.k, cache.v, cache.lengths, **maps)
        assert_close(first, whole[:, :9], 2e-6)
        for t in range(9, 12):
            cache = cache.append(k[:, t : t + 1], v[:, t : t + 1])
            one = jax_fa.decode_attention(q[:, t], cache.k, cache.v, cache.lengths, **maps)
            assert_close(one, whole[:, t], 2e-6)


@pytest.mark.parametrize("rows", [0, 2])
def test_empty_batches(rows):
    k = jnp.zeros((3, 9, 2, 8))
    zeros = jnp.zeros((rows,), jnp.int32)
    index = zeros
    q = jnp.ones((rows, 0 if rows else 2, 4, 8))
    out, lse = jax_fa.decode_attention(q, k, k, zeros, batch_index=index, return_lse=True)
    assert out.shape == q.shape and lse.shape == (rows, 4, q.shape[1])
    for total in (0, 3):
        out, lse = jax_fa.hybrid_attention(
            jnp.ones((total, 4, 8)), k, k, jnp.zeros((rows + 1,), jnp.int32), zeros,
            batch_index=index, return_lse=True,
        )  # fmt: skip
        assert (out == 0).all() and lse.shape == (4, total) and (lse == -jnp.inf).all()
    no_pages = jnp.zeros((2, 0), jnp.int32)
    sinks = jnp.arange(4.0)
    out, lse = jax_fa.decode_attention(
        jnp.ones((2, 4, 8)), k, k, jnp.zeros((2,), jnp.int32), page_table=no_pages, sinks=sinks,
        return_lse=True,
    )  # fmt: skip
    assert (out == 0).all() and (lse == sinks[None]).all()


def test_lengths_past_the_capacity_read_no_further(rng):
    cache, (k, v) = filled(rng, "contiguous", [24, 24, 24])
    q = cases.normal(rng, BATCH, 4, DIM)
    lengths = jnp.array([24, 1 << 30, 24], jnp.int32)
    out = jax_fa.decode_attention(q, cache.k, cache.v, lengths)
    expected = reference.decode(q[:, None], k, v, np.array([24] * 3))[0][:, 0]
    assert_close(out, expected, 5e-6)


# --- shared prefixes ---


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": True}])
@pytest.mark.parametrize("dtype, layers", [("float32", None), ("int8", 2)])
@pytest.mark.parametrize("tokens", [None, 3])
def test_a_shared_prefix_changes_nothing(tokens, dtype, layers, options, rng):
    lengths = np.array([19, 24, 11 if tokens else 9], np.int32)
    cache, wide = filled(rng, "paged", lengths, layers, dtype)
    table = jnp.asarray(TABLE).at[:, 0].set(TABLE[0, 0])
    maps = {"page_table": table} | ({} if layers is None else {"layer": jnp.int32(1)})
    options = {"sinks": cases.normal(rng, 4)} if "sinks" in options else options
    q = cases.normal(rng, *((3,) if tokens is None else (3, tokens)), 4, DIM)

    @jax.jit
    def decode(q, cache, lengths, maps):
        return jax_fa.decode_attention(
            q, cache.k, cache.v, lengths, shared_prefix_pages=1, return_lse=True, **maps, **options
        )

    out, lse = decode(q, cache, lengths, maps)
    four = q if tokens else q[:, None]
    ref, ref_lse = reference.decode(four, *wide, lengths, **maps, **options)
    assert_close(out, ref if tokens else ref[:, 0], 5e-6)
    assert_close(lse, ref_lse if tokens else ref_lse[..., 0], 5e-6)
    # the last row has no token, and one is padding
    packed, starts = cases.normal(rng, 7, 4, DIM), cases.cu_seqlens([2, 4, 0])
    out, lse = jax_fa.hybrid_attention(
        packed, cache.k, cache.v, starts, jnp.asarray(lengths), shared_prefix_pages=1,
        return_lse=True, **maps, **options,
    )  # fmt: skip
    ref, ref_lse = reference.hybrid(packed, *wide, starts, lengths, **maps, **options)
    assert_close(out, ref, 5e-6)
    assert_close(lse, ref_lse, 5e-6)


@pytest.mark.parametrize("idle", [[0], [0, 2], [0, 1, 2]])
def test_rows_of_a_shared_prefix_may_be_idle(idle, rng):
    cache, wide = filled(rng, "paged", [19, 24, 9])
    table = TABLE.copy()
    table[:, 0], table[idle] = TABLE[1, 0], -1
    lengths = np.array([19, 24, 17], np.int32)
    lengths[idle] = 0
    q, table = cases.normal(rng, 3, 4, DIM), jnp.asarray(table)
    out = jax_fa.decode_attention(
        q, cache.k, cache.v, jnp.asarray(lengths), page_table=table, shared_prefix_pages=1
    )
    ref, _ = reference.decode(q[:, None], *wide, lengths, page_table=table)
    live = lengths > 0
    assert_close(out[live], ref[live, 0], 5e-6)
    assert np.isfinite(out).all()


def test_shared_prefixes_that_are_refused(rng):
    cache, _ = filled(rng, "paged", [19, 24, 9])
    q, lengths = cases.normal(rng, 3, 4, DIM), jnp.array([19, 24, 9], jnp.int32)

    def call(pages=1, table=cache.page_table, **options):
        options = dict(page_table=table, shared_prefix_pages=pages) | options
        return jax_fa.decode_attention(q, cache.k, cache.v, lengths, **options)

    with pytest.raises(ValueError, match="shared_prefix_pages needs a page_table"):
        call(table=None, batch_index=jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match="batch_index must be None with a page_table"):
        call(batch_index=jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"must be \[B, max_pages > 3\], got"):
        call(3)
    with pytest.raises(ValueError, match="must be an int >= 0, got -1"):
        call(-1)
    with pytest.raises(NotImplementedError, match="shared_prefix_pages with split_size"):
        jax_fa.hybrid_attention(
            q, cache.k, cache.v, cases.cu_seqlens([1, 1, 1]), lengths,
            page_table=cache.page_table, shared_prefix_pages=1, split_size=64,
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="with window or alibi_slopes"):
        call(window=4)


# --- merge ---


@pytest.mark.parametrize("packed", [False, True])
def test_merge_equals_attention_over_the_union(packed, rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 5, 21, 4, 2, 8))
    whole, whole_lse = reference.attention(q, k, v)
    cuts = [0, 8, 8, 21]  # one part is empty
    parts = [
        jax_fa.flash_attention(q, k[:, a:b], v[:, a:b], return_lse=True)
        for a, b in zip(cuts[:-1], cuts[1:])
    ]
    outs, lses = (jnp.stack(x) for x in zip(*parts))
    if packed:
        outs, lses = outs[:, 0], lses[:, 0]
        whole, whole_lse = whole[0], whole_lse[0]
    out, lse = jax_fa.merge_attention(outs, lses, packed=packed)
    assert_close(out, whole, 2e-6)
    assert_close(lse, whole_lse, 2e-6)


def test_merge_of_decode_and_of_nothing(rng):
    outs, lses = cases.normal(rng, 3, 2, 4, 8), cases.normal(rng, 3, 2, 4)
    lses = lses.at[:, 1, 2].set(-jnp.inf).at[0, 0].set(-jnp.inf)
    outs = outs.at[0, 0].set(jnp.nan)  # a part that saw nothing may hold anything
    out, lse = jax_fa.merge_attention(outs, lses)
    weights = np.exp(np.asarray(lses, np.float64))
    total = weights.sum(0)
    expected = (weights[..., None] * np.nan_to_num(np.asarray(outs, np.float64))).sum(0)
    assert_close(out, expected / np.where(total, total, 1)[..., None], 2e-6)
    with np.errstate(divide="ignore"):
        assert_close(lse, np.log(total), 2e-6)
    assert (out[1, 2] == 0).all() and lse[1, 2] == -jnp.inf


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_lengths_beyond_the_cache_are_its_capacity(kind, rng):
    cache = with_garbage(create(kind), rng, [0, 0, 0])
    rows, capacity = BATCH, cache.capacity
    table = getattr(cache, "page_table", None)
    q = cases.normal(rng, rows, 3, 2 * HEADS, DIM)
    starts = jnp.arange(rows + 1, dtype=jnp.int32) * 3

    def attend(length):
        lengths = jnp.full((rows,), length, jnp.int32)
        kw = {"page_table": table, "window": (4, 0)}
        dense = jax_fa.decode_attention(q, cache.k, cache.v, lengths, **kw)
        packed = q.reshape(-1, *q.shape[2:])
        hybrid = jax_fa.hybrid_attention(packed, cache.k, cache.v, starts, lengths, **kw)
        return dense, hybrid.reshape(dense.shape)

    for x, y in zip(attend(capacity + 2), attend(capacity)):
        np.testing.assert_array_equal(x, y)
    assert not any(x.any() for x in attend(-1))
