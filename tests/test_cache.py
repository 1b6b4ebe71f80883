"""Append against a numpy model: rows, pages, layers, rotary, quantization, capacity, aliasing."""

import dataclasses
import pickle
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from caches import BATCH, DIM, HEADS, LENGTH, PAGES, PLAIN, QUANTIZED, create, with_garbage
from reference import assert_close

import jax_fa


def model(cache, x, new, counts, batch_index=None, layer=None):
    """What array x of the cache holds after new tokens `[rows][T, K, H]`, of which counts count."""
    x = np.array(x, np.float64)
    view = x if layer is None else x[layer]
    lengths = np.asarray(cache.lengths)
    for b, tokens in enumerate(new):
        row = b if batch_index is None else batch_index[b]
        if not 0 <= row < len(lengths):
            continue
        for t in range(counts[b]):
            at = lengths[row] + t
            if isinstance(cache, jax_fa.KVCache):
                if at < view.shape[1]:
                    view[row, at] = tokens[t]
            else:
                table = np.asarray(cache.page_table)
                if at < table.shape[1] * view.shape[1]:
                    page = table[row, at // view.shape[1]]
                    if 0 <= page < view.shape[0]:
                        view[page, at % view.shape[1]] = tokens[t]
    return x


def lengths_after(cache, counts, batch_index=None):
    lengths = np.array(cache.lengths)
    for b, count in enumerate(counts):
        row = b if batch_index is None else batch_index[b]
        if 0 <= row < len(lengths):
            lengths[row] = min(lengths[row] + count, cache.capacity)
    return lengths


def tables(rng, size=40, half=3):
    angle = rng.uniform(0, 6, (size, half))
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


FORMS = ["all", "counts", "batch_index", "packed", "packed-batch_index"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rotary", [None, "half", "interleaved"])
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_append_writes_what_the_model_says(kind, layers, rotary, form, rng):
    cache = with_garbage(create(kind, layers=layers), rng, [20, 0, 7])
    layer = None if layers is None else 1
    batch_index = np.array([2, 0, 7, -1], np.int32) if "batch_index" in form else None
    rows, size = (4 if batch_index is not None else 3), 5
    counts = [2, 5, 1, 3][:rows] if form != "all" and form != "batch_index" else [5] * rows
    new = [[rng.standard_normal((size, HEADS, DIM)) for _ in range(rows)] for _ in "kv"]
    new = [np.stack(x).astype(np.float32) for x in new]
    options = {"interleaved": rotary == "interleaved"}
    if form == "counts":
        options["counts"] = jnp.asarray(counts, jnp.int32)
    k, v = (jnp.asarray(x) for x in new)
    if "packed" in form:
        options["cu_seqlens"] = cases.cu_seqlens(counts)
        k, v = (
            jnp.concatenate(
                [*(x[b, :n] for b, n in enumerate(counts)), jnp.full((2, 2, 8), jnp.nan)]
            )
            for x in (k, v)
        )  # padding behind the last row
    if batch_index is not None:
        options["batch_index"] = jnp.asarray(batch_index)
    cos_sin = None
    rotated = new[0]
    if rotary:
        cos_sin = tables(rng)
        slots = np.arange(rows) if batch_index is None else np.clip(batch_index, 0, 2)
        positions = np.asarray(cache.lengths)[slots][:, None] + np.arange(size)
        rotated = reference.rotary(rotated, *cos_sin, positions, rotary == "interleaved")

    # under jit, because concrete lengths past capacity raise
    @jax.jit
    def call(cache, k, v):
        return cache.append(k, v, layer=layer, rotary=cos_sin, **options)

    after = call(cache, k, v)
    assert_close(after.k, model(cache, cache.k, rotated, counts, batch_index, layer), 1e-6, "k")
    np.testing.assert_array_equal(
        np.asarray(after.v, np.float64), model(cache, cache.v, new[1], counts, batch_index, layer)
    )
    if layer is None:
        np.testing.assert_array_equal(after.lengths, lengths_after(cache, counts, batch_index))
    else:
        np.testing.assert_array_equal(after.lengths, cache.lengths)
        moved = after.advance(jnp.asarray(counts, jnp.int32), options.get("batch_index"))
        np.testing.assert_array_equal(moved.lengths, lengths_after(cache, counts, batch_index))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize(
    "dtype, granularity, size", [*((d, None, None) for d in PLAIN), *QUANTIZED]
)
def test_token_by_token_equals_at_once_bit_for_bit(kind, dtype, granularity, size, rng):
    cache = create(kind, dtype=dtype, granularity=granularity, group_size=size)
    k, v = (cases.normal(rng, BATCH, 7, HEADS, DIM, dtype=jnp.bfloat16) for _ in "kv")
    rotary = tables(rng)
    append = jax.jit(lambda cache, k, v: cache.append(k, v, rotary=rotary))
    whole = append(cache, k, v)
    steps = cache
    for t in range(7):
        steps = append(steps, k[:, t : t + 1], v[:, t : t + 1])
    for x, y in zip(jax.tree.leaves(steps), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    # and equals quantize of the rotated keys
    positions = jnp.arange(7, dtype=jnp.int32)
    k = jax_fa.apply_rotary(k, *rotary, positions)
    if kind == "contiguous" and granularity != "tensor" and dtype not in PLAIN:
        for cached, x in ((whole.k, k), (whole.v, v)):
            direct = jax_fa.quantize(x, dtype, granularity, size)
            np.testing.assert_array_equal(
                np.asarray(cached.values[:, :7], np.float32), np.asarray(direct.values, np.float32)
            )
            if granularity is not None:
                np.testing.assert_array_equal(cached.scale[:, :, :7], direct.scale)


def test_tensor_granularity_uses_the_given_scale(rng):
    cache = create("contiguous", dtype="int8", granularity="tensor")
    k, v = (cases.normal(rng, BATCH, 2, HEADS, DIM) for _ in "kv")
    after = cache.append(k, v)
    expected = np.clip(np.round(np.asarray(k) / np.float32(0.03)), -127, 127)
    np.testing.assert_array_equal(np.asarray(after.k.values[:, :2]), expected)
    assert float(after.k.scale.squeeze()) == np.float32(0.03)
    assert float(after.v.scale.squeeze()) == np.float32(0.02)


def test_scales_that_tokens_share_stay_as_they_are(rng):
    k, v = (cases.normal(rng, BATCH, LENGTH, HEADS, DIM) for _ in "kv")
    k, v = (jax_fa.quantize(x, "int8", "tensor") for x in (k, v))
    cache = jax_fa.KVCache(k, v, jnp.asarray([0, 4, 9], jnp.int32))
    new = cases.normal(rng, BATCH, 1, HEADS, DIM)
    after = cache.append(new, new)
    np.testing.assert_array_equal(after.k.scale, k.scale)
    np.testing.assert_array_equal(after.v.scale, v.scale)
    np.testing.assert_array_equal(after.k.values[1, :4], k.values[1, :4])
    expected = np.clip(np.round(np.asarray(new) / np.asarray(k.scale).squeeze()), -127, 127)
    np.testing.assert_array_equal(after.k.values[1, 4], expected[1, 0])


def test_keys_and_values_of_different_dtypes(rng):
    cache = create("contiguous", dtype="int8", v_dtype="bfloat16")
    k, v = (cases.normal(rng, BATCH, 2, HEADS, DIM) for _ in "kv")
    after = cache.append(k, v)
    np.testing.assert_array_equal(after.v[:, :2], v.astype(jnp.bfloat16))
    assert_close(after.k.dequantize()[:, :2], k, 0.02)


def test_rotary_rounds_to_the_dtype_of_k_before_the_cache(rng):
    cos_sin = tables(rng, half=4)
    k = cases.normal(rng, 1, 6, HEADS, DIM, dtype=jnp.bfloat16)
    cache = create("contiguous", batch=1).append(k, k, rotary=cos_sin)
    expected = jax_fa.apply_rotary(k, *cos_sin, jnp.arange(6, dtype=jnp.int32))
    np.testing.assert_array_equal(cache.k[:, :6], expected.astype(jnp.float32))
    np.testing.assert_array_equal(cache.v[:, :6], k.astype(jnp.float32))


@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rotary(interleaved, rng):
    x, (cos, sin) = cases.normal(rng, 2, 5, 3, 8), tables(rng, 9)
    positions = np.array([[0, 3, 8, 50, 2], [1, 1, 7, 8, 9]], np.int32)
    out = jax_fa.apply_rotary(x, cos, sin, positions, interleaved)
    assert_close(out, reference.rotary(x, cos, sin, positions, interleaved), 1e-6)
    np.testing.assert_array_equal(out[..., 6:], x[..., 6:])  # dims past R stay
    packed = jax_fa.apply_rotary(x[0], cos, sin, positions[0], interleaved)
    np.testing.assert_array_equal(packed, out[0])
    shared = jax_fa.apply_rotary(x, cos, sin, positions[0], interleaved)
    np.testing.assert_array_equal(shared[0], out[0])


# --- capacity and pages that are none ---


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_past_capacity_raises_where_lengths_are_known(kind, rng):
    cache = with_garbage(create(kind), rng, [20, 0, 23])
    k = cases.normal(rng, BATCH, 2, HEADS, DIM)
    with pytest.raises(ValueError, match=r"rows must not grow past capacity 24, got 25"):
        cache.append(k, k)
    cache.append(k, k, counts=jnp.array([2, 2, 1], jnp.int32))


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_past_capacity_under_jit_is_dropped(kind, layers, rng):
    cache = with_garbage(create(kind, layers=layers), rng, [20, 0, 23])
    k = cases.normal(rng, BATCH, 6, HEADS, DIM)
    layer = None if layers is None else 0
    after = jax.jit(lambda c, k: c.append(k, k, layer=layer))(cache, k)
    for x, y in ((cache.k, after.k), (cache.v, after.v)):
        expected = model(cache, x, np.asarray(k), [6] * 3, layer=layer)
        np.testing.assert_array_equal(np.asarray(y, np.float64), expected)
    if layers is None:
        np.testing.assert_array_equal(after.lengths, [24, 6, 24])


def test_pages_outside_the_pool_are_dropped(rng):
    cache = with_garbage(create("paged"), rng, [0, 6, 6])
    table = jnp.array([[-1, -1, -1], [3, -1, -1], [5, PAGES, 0]], jnp.int32)
    cache = dataclasses.replace(cache, page_table=table)
    k = cases.normal(rng, BATCH, 4, HEADS, DIM)
    for call in (cache.append, jax.jit(cache.append)):
        after = call(k, k)
        np.testing.assert_array_equal(
            np.asarray(after.k, np.float64), model(cache, cache.k, np.asarray(k), [4] * 3)
        )
        np.testing.assert_array_equal(after.lengths, [4, 10, 10])


def test_new_caches_are_empty():
    cache = jax_fa.PagedKVCache.create(4, 8, 2, 3, HEADS, DIM, dtype=jnp.bfloat16)
    assert (cache.page_table == -1).all() and (cache.lengths == 0).all() and cache.capacity == 24
    assert cache.k.shape == (4, 8, HEADS, DIM) and cache.k.dtype == jnp.bfloat16
    stacked = jax_fa.KVCache.create(2, 9, HEADS, DIM, layers=5, dtype=jnp.int8)
    assert stacked.k.shape == (5, 2, 9, HEADS, DIM) and stacked.k.scale.shape == (5, 2, HEADS, 9, 1)
    assert stacked.lengths.shape == (2,) and stacked.capacity == 9


def test_append_of_no_tokens_changes_nothing(rng):
    cache = with_garbage(create("contiguous"), rng, [20, 0, 7])
    k = jnp.zeros((BATCH, 0, HEADS, DIM))
    for x, y in zip(jax.tree.leaves(jax.jit(cache.append)(k, k)), jax.tree.leaves(cache)):
        np.testing.assert_array_equal(x, y)


# --- in place ---


def test_the_callers_arrays_never_change(rng):
    for kind in ("contiguous", "paged"):
        cache = with_garbage(create(kind, dtype="float16"), rng, [0, 3, 7])
        before = np.array(cache.k)
        k = cases.normal(rng, BATCH, 4, HEADS, DIM)
        after = jax.jit(lambda c, k: c.append(k, k))(cache, k)
        cache.append(k, k)
        np.testing.assert_array_equal(before, cache.k)
        assert (np.asarray(after.k) != before).any()


def moves_of(hlo, shape):
    """Instructions of optimized HLO that copy, convert or transpose an array of that shape."""
    dims = ",".join(map(str, shape))
    pattern = rf"= \w+\[{dims}\]\S* (copy|convert|transpose|copy-start)\("
    return [line.strip()[:160] for line in hlo.splitlines() if re.search(pattern, line)]


def big(kind, dtype, layers):
    """Rows far longer than the chunks of keys that the reference of decode gathers."""
    if kind == "contiguous":
        return create(kind, batch=2, length=1 << 15, heads=2, dim=32, dtype=dtype, layers=layers)
    cache = jax_fa.PagedKVCache.create(2048, 32, 2, 1024, 2, 32, dtype=dtype, layers=layers)
    table = jnp.arange(2048, dtype=jnp.int32).reshape(2, 1024)
    return dataclasses.replace(cache, page_table=table)


def assert_in_place(compiled, cache):
    temp = compiled.memory_analysis().temp_size_in_bytes
    size = sum(x.nbytes for x in jax.tree.leaves((cache.k, cache.v)))
    assert temp < size / 4, f"{temp} bytes of scratch for a cache of {size}"
    # XLA's CPU backend copies what is reshaped and has an axis of size 1 (scales of stacked caches)
    for x in {x.shape for x in jax.tree.leaves((cache.k, cache.v)) if 1 not in x.shape}:
        layers = [(x[0] * x[1], *x[2:])] if len(x) == 5 else []
        for shape in [x, *layers]:
            assert not moves_of(compiled.as_text(), shape)


IN_PLACE = [(k, d) for k in ("contiguous", "paged") for d in ("float32", "float16", "int8")]


@pytest.mark.real_blocks
@pytest.mark.parametrize("kind, dtype", IN_PLACE)
@pytest.mark.parametrize("layers", [None, 3])
def test_append_to_a_donated_cache_is_in_place(kind, dtype, layers, rng):
    cache = big(kind, dtype, layers)
    k = cases.normal(rng, 2, 3, 2, 32)

    @jax.jit(donate_argnums=0)
    def step(cache, k, layer):
        return cache.append(k, k, layer=None if layers is None else layer)

    compiled = step.lower(cache, k, jnp.int32(1)).compile()
    assert_in_place(compiled, cache)
    address = jax.tree.leaves(cache.k)[0].unsafe_buffer_pointer()
    after = compiled(cache, k, jnp.int32(1))
    assert jax.tree.leaves(after.k)[0].unsafe_buffer_pointer() == address


@pytest.mark.real_blocks
@pytest.mark.parametrize("kind, dtype", IN_PLACE)
@pytest.mark.parametrize("layers", [None, 3])
def test_a_scan_carries_the_cache_without_copies(kind, dtype, layers, rng):
    cache = big(kind, dtype, layers)
    q, k = cases.normal(rng, 2, 4, 32), cases.normal(rng, 2, 1, 2, 32)
    q = q if dtype == "int8" else q.astype(dtype)

    @jax.jit(donate_argnums=0)
    def steps(cache, q, k):
        def layer_step(carry, layer):
            cache, q = carry
            cache = cache.append(k, k, layer=layer)
            maps = {"page_table": cache.page_table} if kind == "paged" else {}
            q = jax_fa.decode_attention(
                q,
                cache.k,
                cache.v,
                cache.lengths + (0 if layers is None else 1),
                layer=layer,
                **maps,
            )
            return (cache, q), None

        def token_step(carry, _):
            if layers is None:
                return layer_step(carry, None)
            (cache, q), _ = jax.lax.scan(layer_step, carry, jnp.arange(layers, dtype=jnp.int32))
            return (cache.advance(1), q), None

        (cache, q), _ = jax.lax.scan(token_step, (cache, q), length=5)
        return cache, q

    assert_in_place(steps.lower(cache, q, k).compile(), cache)
    after, out = steps(cache, q, k)
    assert (after.lengths == 5).all() and jnp.isfinite(out).all()


# --- pytrees ---


def test_caches_are_pytrees_and_pickle(rng):
    for cache in (create("contiguous", dtype="int8"), create("paged", layers=2)):
        leaves, tree = jax.tree.flatten(cache)
        again = jax.tree.unflatten(tree, leaves)
        assert type(again) is type(cache) and again.granularity == cache.granularity
        copy = pickle.loads(pickle.dumps(cache))
        assert jax.tree.structure(copy) == tree
        for x, y in zip(jax.tree.leaves(copy), leaves):
            np.testing.assert_array_equal(x, y)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.flatten_with_path(cache)[0]]
        assert ".lengths" in paths


def test_export_of_a_function_of_caches_round_trips(rng):
    pytest.importorskip("flatbuffers", reason="what jax.export serializes with")
    from jax import export

    k = cases.normal(rng, BATCH, 2, HEADS, DIM)
    for cache in (create("contiguous", dtype="int8"), create("paged", dtype="float8_e5m2")):
        step = jax.jit(lambda cache, k: cache.append(k, k))
        checks = jax_fa.DISABLED_EXPORT_CHECKS
        text = export.export(step, disabled_checks=checks)(cache, k).serialize()
        again = export.deserialize(text).call(cache, k)
        assert type(again) is type(cache) and again.granularity == cache.granularity
        jax.tree.map(np.testing.assert_array_equal, again, step(cache, k))
