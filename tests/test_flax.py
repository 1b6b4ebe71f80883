"""jax_fa.flax beside Flax's own attention, and its cached layer beside whole sequences."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa

nnx = pytest.importorskip("flax.nnx", reason="needs Flax")
linen = pytest.importorskip("flax.linen", reason="needs Flax")

from jax_fa.flax import CachedAttention, attention_fn, rotary_tables  # noqa: E402

BATCH, LEN, FEATURES, HEADS = 2, 7, 24, 4


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def close(x, y, atol=2e-6):
    assert x.shape == y.shape and x.dtype == y.dtype
    x, y = (np.asarray(a, np.float32) for a in (x, y))
    np.testing.assert_allclose(x, y, atol=atol, rtol=0)


def causal_mask(dtype=jnp.float32):
    return linen.make_causal_mask(jnp.zeros((BATCH, LEN)), dtype=dtype)


def padding_mask(dtype=jnp.float32):
    valid = jnp.arange(LEN)[None] < jnp.array([LEN, 3])[:, None]
    return valid[:, None, None].astype(dtype)


MASKS = {
    "none": lambda: None,
    "float causal": causal_mask,
    "bool causal": lambda: causal_mask(bool),
    "int32 causal": lambda: causal_mask(jnp.int32),
    "float padding": padding_mask,
    "bool padding": lambda: padding_mask(bool),
    "per head": lambda: jnp.ones((BATCH, HEADS, LEN, LEN), bool).at[:, 1, :, 2:].set(False),
}


def linen_layer(**options):
    return linen.MultiHeadDotProductAttention(HEADS, **options)


def nnx_layer(**options):
    return nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("default", [nnx.dot_product_attention, linen.dot_product_attention])
def test_every_argument_of_flax_is_a_parameter(default):
    assert inspect.signature(default).parameters.keys() <= (
        inspect.signature(attention_fn).parameters.keys()
    )


@pytest.mark.parametrize("mask", MASKS)
def test_linen_masks(mask):
    x, mask = normal(BATCH, LEN, FEATURES), MASKS[mask]()
    variables = linen_layer().init(jax.random.key(1), x)
    want = linen_layer().apply(variables, x, mask=mask)
    got = linen_layer(attention_fn=attention_fn).apply(variables, x, mask=mask)
    close(got, want)


@pytest.mark.parametrize("kv_heads, is_causal", [(HEADS, True), (2, False)])
@pytest.mark.parametrize("mask", MASKS)
def test_nnx_masks(mask, kv_heads, is_causal):
    x, mask = normal(BATCH, LEN, FEATURES), MASKS[mask]()
    want, got = (
        nnx_layer(num_kv_heads=kv_heads, **options)(x, mask=mask, is_causal=is_causal)
        for options in ({}, {"attention_fn": attention_fn})
    )
    close(got, want)


@pytest.mark.parametrize("len_kv", [3, 7, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_nnx_causal_is_aligned_at_the_first_key(len_kv, masked):
    q, k, v = normal(BATCH, LEN, HEADS, 6), *normal(2, BATCH, len_kv, 2, 6, seed=1)
    mask = normal(BATCH, 1, LEN, len_kv, seed=2) > -1 if masked else None
    mask = mask if mask is None else mask.at[..., 0].set(True)
    want = nnx.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    close(attention_fn(q, k, v, mask=mask, is_causal=True), want)


@pytest.mark.parametrize(
    "batch, mask_batch", [((), "none"), ((3,), "one"), ((2, 3), "one"), ((2, 3), "whole")]
)
def test_any_number_of_batch_axes(batch, mask_batch):
    q, k, v = normal(3, *batch, LEN, HEADS, 6)
    shape = {"none": (), "one": (1,) * len(batch), "whole": batch}[mask_batch]
    mask = (normal(*shape, HEADS, LEN, LEN, seed=1) > 0).at[..., 0].set(True)
    bias = normal(*shape, 1, LEN, LEN, seed=2)
    broadcast = [jnp.broadcast_to(x, (*batch, HEADS, LEN, LEN)) for x in (bias, mask)]
    want = linen.dot_product_attention(q, k, v, *broadcast)
    close(attention_fn(q, k, v, bias=bias, mask=mask), want)


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = normal(3, BATCH, LEN, HEADS, 6)
    mask = causal_mask().at[1, 0, 2].set(0)
    out = attention_fn(q, k, v, mask=mask)
    assert not out[1, 2].any() and out[1, 3].all()


@pytest.mark.parametrize("layer", ["linen", "nnx"])
def test_gradients(layer):
    x = normal(BATCH, LEN, FEATURES)

    def loss(x, attention):
        if layer == "nnx":
            y = nnx_layer(**attention)(x, mask=padding_mask(), is_causal=True)
        else:
            module = linen_layer(**attention)
            variables = linen_layer().init(jax.random.key(1), x)
            y = module.apply(variables, x, mask=causal_mask())
        return jnp.square(y).sum()

    want, got = (jax.grad(loss)(x, a) for a in ({}, {"attention_fn": attention_fn}))
    close(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_of_the_computation(dtype):
    x = normal(BATCH, LEN, FEATURES)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn promotes
        want = nnx_layer(dtype=dtype)(x, is_causal=True)
    got = nnx_layer(dtype=dtype, attention_fn=attention_fn)(x, is_causal=True)
    close(got, want, 0.02)
    out = attention_fn(*normal(3, BATCH, LEN, HEADS, 6), dtype=dtype)
    assert out.dtype == dtype


@pytest.mark.parametrize(
    "precision, exact",
    [
        ("highest", True), (jax.lax.Precision.HIGHEST, True), (("default", "highest"), True),
        ("float32", True), ("default", False), (jax.lax.Precision.HIGH, False),
    ],
)  # fmt: skip
def test_precision_decides_on_products_of_float32(precision, exact):
    q = normal(BATCH, LEN, HEADS, 8)

    def is_exact(q, **options):
        return "exact=True" in str(jax.make_jaxpr(lambda q: attention_fn(q, q, q, **options))(q))

    assert is_exact(q, precision=precision) == exact
    assert not is_exact(q) and not is_exact(q.astype(jnp.bfloat16), precision=precision)
    with jax.default_matmul_precision("highest"):
        assert is_exact(q) and is_exact(q, precision=precision) == exact


def weights(batch=BATCH, **options):
    """The attention weights `[B, N, T, S]`: the output where values are unit vectors."""
    q, k = normal(2, batch, LEN, HEADS, LEN)
    v = jnp.broadcast_to(jnp.eye(LEN)[None, :, None], k.shape)
    return jnp.swapaxes(attention_fn(q, k, v, **options), 1, 2)


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout_keeps_or_drops_weights(broadcast):
    rate, batch = 0.4, 16
    whole = weights(batch)
    options = dict(dropout_rate=rate, broadcast_dropout=broadcast)
    dropped = weights(batch, dropout_rng=jax.random.key(3), **options)
    kept = dropped != 0
    close(dropped, jnp.where(kept, whole / (1 - rate), 0), 1e-6)
    assert (kept == kept[:1, :1]).all() == broadcast
    count = LEN * LEN if broadcast else kept.size
    assert abs(kept.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / count) ** 0.5
    other = weights(batch, dropout_rng=jax.random.key(4), **options)
    assert (other != dropped).any()


def test_deterministic_turns_dropout_off():
    close(weights(dropout_rate=0.4, deterministic=True), weights())


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("layer", ["linen", "nnx"])
def test_layers_pass_dropout(layer, broadcast):
    x = normal(BATCH, LEN, FEATURES)
    options = dict(
        attention_fn=attention_fn, dropout_rate=0.5, broadcast_dropout=broadcast, use_bias=False
    )
    if layer == "nnx":
        module = nnx_layer(**options)
        on, off = (module(x, deterministic=deterministic) for deterministic in (False, True))
        want = nnx_layer(use_bias=False)(x)
    else:
        module = linen_layer(**options)
        variables = linen_layer(use_bias=False).init(jax.random.key(1), x)
        rngs = {"dropout": jax.random.key(2)}
        on = module.apply(variables, x, deterministic=False, rngs=rngs)
        off = module.apply(variables, x, deterministic=True)
        want = linen_layer(use_bias=False).apply(variables, x)
    close(off, want)
    assert (abs(on - off) > 1e-3).any()


def test_dropout_without_a_key():
    with pytest.raises(ValueError, match="dropout_rng must be a key"):
        weights(dropout_rate=0.4)


def test_what_needs_the_weights_or_an_einsum_is_refused():
    x = normal(BATCH, LEN, FEATURES)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_layer(attention_fn=attention_fn)(x, sow_weights=True)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        linen_layer(attention_fn=attention_fn).init(jax.random.key(0), x, sow_weights=True)
    layer = linen_layer(
        attention_fn=attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(NotImplementedError, match="qk_attn_weights_einsum"):
        layer.init(jax.random.key(0), x)


def test_positions_must_come_with_rope():
    q = normal(BATCH, LEN, HEADS, 8)
    with pytest.raises(ValueError, match="input_positions must come with rope"):
        attention_fn(q, q, q, input_positions=jnp.arange(LEN))


def test_rope_rotates_queries_and_keys():
    q, k, v = normal(3, BATCH, LEN, HEADS, 8)
    cos, sin = rotary_tables(LEN, 8)

    def rope(x, positions):
        """As `nnx.RoPE`: `[..., T, H]`."""
        first, second = jnp.split(x, 2, axis=-1)
        c, s = (jnp.broadcast_to(t, first.shape) for t in (cos, sin))
        return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)

    at = jnp.arange(LEN, dtype=jnp.int32)
    rotated = (jax_fa.apply_rotary(x, cos, sin, at) for x in (q, k))
    want = attention_fn(*rotated, v, is_causal=True)
    close(attention_fn(q, k, v, is_causal=True, rope=rope), want)


@pytest.mark.skipif(not hasattr(nnx, "RoPE"), reason="this Flax has no nnx.RoPE")
def test_rope_of_flax():
    q, k, v = normal(3, BATCH, LEN, HEADS, 8)
    rope = nnx.RoPE()
    want = nnx.dot_product_attention_with_rope(q, k, v, rope=rope, is_causal=True)
    close(attention_fn(q, k, v, rope=rope, is_causal=True), want)
    positions = jnp.arange(LEN, dtype=jnp.float32)
    close(attention_fn(q, k, v, rope=rope, input_positions=positions, is_causal=True), want)


def test_linen_decodes_as_it_does_with_its_own_attention():
    x = normal(BATCH, LEN, FEATURES)
    outs = []
    for options in ({}, {"attention_fn": attention_fn}):
        layer = linen_layer(decode=True, **options)
        variables = layer.init(jax.random.key(1), x)
        out = []
        for t in range(LEN):
            y, changed = layer.apply(variables, x[:, t : t + 1], mutable=["cache"])
            variables = {**variables, **changed}
            out.append(y)
        outs.append(jnp.concatenate(out, axis=1))
    close(*outs)
    whole = linen_layer().apply({"params": variables["params"]}, x, mask=causal_mask())
    close(outs[1], whole)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_nnx_decodes_as_it_does_with_its_own_attention(kv_heads):
    x = normal(BATCH, LEN, FEATURES)
    outs = []
    for options in ({}, {"attention_fn": attention_fn}):
        layer = nnx_layer(num_kv_heads=kv_heads, **options)
        layer.init_cache(x.shape)
        out = [layer(x[:, t : t + 1], decode=True) for t in range(LEN)]
        outs.append(jnp.concatenate(out, axis=1))
    close(*outs)
    close(outs[1], nnx_layer(num_kv_heads=kv_heads)(x, is_causal=True))


# The cached layer.

SIZES = dict(features=24, heads=6, kv_heads=2, head_dim=8)
TABLES = rotary_tables(64, 8)


def cached_layer(**options):
    return CachedAttention(**SIZES, rngs=nnx.Rngs(0), **options)


def create_cache(kind, dtype=jnp.float32, capacity=40, layers=None):
    sizes = dict(kv_heads=2, head_dim=8, dtype=dtype, layers=layers)
    if kind == "contiguous":
        return jax_fa.KVCache.create(BATCH, capacity, **sizes)
    page, pages = 8, capacity // 8
    cache = jax_fa.PagedKVCache.create(BATCH * pages + 3, page, BATCH, pages, **sizes)
    table = jax.random.permutation(jax.random.key(5), BATCH * pages + 3)[: BATCH * pages]
    table = table.reshape(BATCH, pages).astype(jnp.int32)
    return dataclasses.replace(cache, page_table=table)


def test_layer_without_a_cache_is_causal_attention_with_rotary():
    layer, x = cached_layer(), normal(BATCH, LEN, 24)
    q, k, v = layer.query(x), layer.key(x), layer.value(x)

    def rotate(x):
        """Dims i and i + 4 as a complex number, turned by position / 10000 ** (2 i / 8)."""
        angle = np.arange(LEN)[:, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
        pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
        turned = pairs * np.exp(1j * angle)[:, None]
        return jnp.asarray(np.concatenate([turned.real, turned.imag], -1), jnp.float32)

    want = layer.out(jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True))
    got, cache = layer(x, rotary=TABLES)
    assert cache is None
    close(got, want)


@pytest.mark.parametrize("chunks", [(1,) * 25, (25,), (5, 1, 1, 17, 1)])
@pytest.mark.parametrize(
    "kind, options",
    [("contiguous", {}), ("contiguous", {"softcap": 2.0}), ("paged", {"window": 3})],
)
def test_layer_decodes_what_it_computes_at_once(kind, chunks, options):
    layer, x = cached_layer(**options), normal(BATCH, 25, 24)
    want, _ = layer(x, rotary=TABLES)
    step = jax.jit(lambda x, cache: layer(x, cache, rotary=TABLES))
    cache, out, start = create_cache(kind), [], 0
    for count in chunks:
        y, cache = step(x[:, start : start + count], cache)
        out.append(y)
        start += count
    close(jnp.concatenate(out, axis=1), want, 5e-6)
    assert cache.lengths.tolist() == [25, 25]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("empty", [False, True])
def test_layer_with_rows_of_different_counts(kind, empty):
    layer, x = cached_layer(), normal(BATCH, 25, 24)
    want, _ = layer(x, rotary=TABLES)
    first, second = jnp.array([20, 7], jnp.int32), jnp.array([0, 18], jnp.int32)
    poisoned = jnp.where(jnp.arange(25)[None, :, None] < first[:, None, None], x, jnp.nan)
    cache = create_cache(kind)
    y, cache = layer(poisoned[:, :20], cache, rotary=TABLES, counts=first, cache_is_empty=empty)
    close(y[0], want[0, :20], 5e-6)
    close(y[1, :7], want[1, :7], 5e-6)
    y, cache = layer(x[:, 7:25].at[0].set(jnp.nan), cache, rotary=TABLES, counts=second)
    close(y[1], want[1, 7:25], 5e-6)
    assert cache.lengths.tolist() == [20, 25]
    y, cache = layer(x[:, 20:21], cache, rotary=TABLES)
    close(y[0, 0], want[0, 20], 5e-6)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_layer_with_packed_tokens(kind):
    """Each row brings a chunk of its prompt, one token or none; the rest is padding."""
    layer, x = cached_layer(), normal(BATCH, 25, 24)
    want, _ = layer(x, rotary=TABLES)
    cache = create_cache(kind)
    have = np.zeros(BATCH, int)
    for counts in ([3, 12], [1, 0], [14, 1], [0, 9], [1, 1]):
        ends = have + counts
        tokens = [x[b, have[b] : ends[b]] for b in range(BATCH)]
        packed = jnp.concatenate([*tokens, jnp.full((17 - sum(counts), 24), 9.0)])
        starts = jnp.array([0, counts[0], sum(counts)], jnp.int32)
        y, cache = layer(packed, cache, rotary=TABLES, cu_seqlens=starts, split_size=64)
        close(y[: counts[0]], want[0, have[0] : ends[0]], 5e-6)
        close(y[counts[0] : sum(counts)], want[1, have[1] : ends[1]], 5e-6)
        have = ends
    assert cache.lengths.tolist() == have.tolist() == [19, 23]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_layer_of_a_stacked_cache_under_scan(kind):
    layers, x = 3, normal(BATCH, 9, 24)
    make = nnx.split_rngs(splits=layers)(nnx.vmap(lambda rngs: CachedAttention(**SIZES, rngs=rngs)))
    graph, weights = nnx.split(make(nnx.Rngs(0)))

    def model(x, cache=None):
        def layer(carry, xs):
            weights, index = xs
            x, cache = carry
            y, cache = nnx.merge(graph, weights)(x, cache, layer=index, rotary=TABLES)
            return (x + y, cache), None

        (x, cache), _ = jax.lax.scan(layer, (x, cache), (weights, jnp.arange(layers)))
        return x, cache

    want, _ = model(x)
    cache = create_cache(kind, layers=layers)
    step = jax.jit(model, donate_argnums=1)
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        y, cache = step(x[:, start:stop], cache)
        cache = cache.advance(stop - start)
        close(y, want[:, start:stop], 1e-5)


@pytest.mark.parametrize(
    "kind, compute, dtype, atol",
    [
        ("contiguous", jnp.float32, "bfloat16", 0.02),
        ("paged", jnp.float32, "float16", 0.003),
        ("contiguous", jnp.float32, "int8", 0.03),
        ("contiguous", jnp.bfloat16, "float32", 0.02),
        ("paged", jnp.bfloat16, "int8", 0.05),
        ("contiguous", jnp.bfloat16, "float8_e4m3fn", 0.1),
        ("paged", jnp.float16, "float8_e5m2", 0.2),
    ],
)
def test_layer_of_a_cache_of_any_dtype(kind, compute, dtype, atol):
    layer, x = cached_layer(dtype=compute), normal(BATCH, 12, 24, dtype=compute)
    want, _ = layer(x, rotary=TABLES)
    cache = create_cache(kind, dtype=jnp.dtype(dtype))
    first, cache = layer(x[:, :9], cache, rotary=TABLES, cache_is_empty=True)
    close(first, want[:, :9], 5e-6 if compute == jnp.float32 else 0.02)
    for t in range(9, 12):
        y, cache = layer(x[:, t : t + 1], cache, rotary=TABLES)
        close(y[:, 0], want[:, t], atol)


def test_layer_trains():
    layer, x = cached_layer(dropout_rate=0.5), normal(BATCH, LEN, 24)

    def loss(layer, x, key=None):
        return jnp.square(layer(x, rotary=TABLES, dropout_rng=key)[0]).mean()

    grads = jax.grad(loss)(layer, x)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    step = jax.tree.map(lambda p, g: p - 0.1 * g, layer, grads)
    assert loss(step, x) < loss(layer, x)
    assert loss(layer, x, jax.random.key(0)) != loss(layer, x)


def test_layer_ignores_padding_in_training():
    layer, x = cached_layer(), normal(BATCH, LEN, 24)
    counts = jnp.array([LEN, 4], jnp.int32)
    want, _ = layer(x, rotary=TABLES)
    got, _ = layer(x.at[1, 4:].set(jnp.nan), rotary=TABLES, counts=counts)
    close(got[0], want[0])
    close(got[1, :4], want[1, :4])


def test_layer_refuses():
    with pytest.raises(ValueError, match="kv_heads must divide heads, got 4 and 6"):
        CachedAttention(24, 6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dropout_rng must be None with a cache"):
        cached_layer()(normal(BATCH, 1, 24), create_cache("paged"), dropout_rng=jax.random.key(0))
    with pytest.raises(ValueError, match="cache must be given with cu_seqlens"):
        cached_layer()(normal(3, 24), cu_seqlens=jnp.array([0, 2, 3], jnp.int32))
    with pytest.raises(ValueError, match="capacity 40, got 41"):
        cached_layer()(normal(BATCH, 41, 24), create_cache("contiguous"))


def test_no_queries():
    q, k = (jnp.ones((2, tokens, 4, 8)) for tokens in (0, 5))
    ours = attention_fn(q, k, k)
    assert ours.shape == nnx.dot_product_attention(q, k, k).shape == (2, 0, 4, 8)
