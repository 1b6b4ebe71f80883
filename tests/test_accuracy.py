"""The errors that `benchmarks/accuracy.py` reports, on inputs whose errors are known."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import llamas
import numpy as np
import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import _accuracy  # noqa: E402
from _accuracy import CACHES, Cache  # noqa: E402

SMALL = dataclasses.replace(llamas.SMALL, layers=2, max_length=64)


@pytest.fixture(scope="module")
def model():
    return llamas.small_model(layers=SMALL.layers, max_length=SMALL.max_length)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 61, 38).astype(np.int32)


def test_metrics():
    want = np.array([[3.0, 4.0], [0.0, 12.0]])
    got = np.array([[3.0, 4.0], [12.0, 0.0]])
    assert _accuracy.relative(want, want) == 0
    assert _accuracy.relative(got, want) == pytest.approx(np.sqrt(288) / 13)
    assert _accuracy.cosine(2 * want, want) == pytest.approx(1)
    assert _accuracy.cosine(got, want) == pytest.approx(0.5)
    assert np.isnan(_accuracy.relative(got * np.nan, want))


def test_caches_are_every_dtype_and_granularity():
    assert len(set(CACHES)) == 1 + 4 + 5 + 5
    x = _accuracy.random_inputs("normal", 20, heads=2, kv_heads=2, dim=64)[1]
    for cache in CACHES:
        kept = cache.of(x)
        assert kept.dtype.name == cache.dtype and kept.shape == x.shape


@pytest.mark.parametrize(
    "name, most_accurate", [("normal", "int8"), ("one channel of the keys x 20", "e4m3")]
)
def test_attention_errors_are_those_of_rounding(name, most_accurate):
    inputs = _accuracy.random_inputs(name, 100, heads=4, kv_heads=2, dim=32)

    def error(dtype, granularity=None, size=None):
        row = _accuracy.attention_errors(*inputs, Cache(dtype, granularity, size))
        assert "kernel" not in row and row["cosine"] <= 1
        return row["relative"]

    bfloat16, int8 = error("bfloat16"), error("int8", "head")
    e4m3, e5m2 = (error(f"float8_{form}", "head") for form in ("e4m3fn", "e5m2"))
    assert 0 < bfloat16 < min(int8, e4m3) and 1.3 * e4m3 < e5m2
    assert error("int8", "group", 8) < int8
    # int8 rounds all numbers of a scale as coarsely as the largest one.
    assert (int8 < e4m3) == (most_accurate == "int8")


def test_attention_errors_of_a_batch_are_means():
    """One row is 100 times as large: scales are not shared."""
    q, k, v = _accuracy.random_inputs("normal", 30, heads=2, kv_heads=1, dim=16)
    cache = Cache("int8", "tensor")
    alone = _accuracy.attention_errors(q, k, v, cache)
    batch = (jnp.concatenate([x, factor * x]) for x, factor in ((q, 0.01), (k, 100), (v, 100)))
    both = _accuracy.attention_errors(*batch, cache)
    assert both["relative"] == pytest.approx(alone["relative"], rel=1e-3)
    assert both["worst"] == pytest.approx(alone["relative"], rel=1e-3)


@pytest.fixture(scope="module")
def want(model, tokens):
    """-log p of each token after those before it, and the likeliest one."""
    scores = np.asarray(jax.nn.log_softmax(model(jnp.asarray(tokens)[None, :-1])[0]))
    return -np.take_along_axis(scores, tokens[1:, None], axis=-1)[:, 0], scores.argmax(-1)


def test_losses_through_a_cache_are_those_of_the_text(model, tokens, want):
    empty = _accuracy.create_cache(SMALL, 40, Cache("float32"), None)
    loss, likeliest = _accuracy.losses(model, tokens, empty, chunk=20)
    np.testing.assert_allclose(loss, want[0], atol=1e-5)
    np.testing.assert_array_equal(likeliest, want[1])


def test_perplexity_of_each_cache(model, tokens, want):
    caches = [Cache("int8", "tensor"), Cache("float8_e5m2", "group", 4)]
    exact, int8, e5m2 = _accuracy.perplexity_part(model, tokens, chunk=20, caches=caches)
    assert exact["dtype"] == "float32" and exact["tokens"] == 37
    assert exact["divergence"] == 0 and exact["same_likeliest"] == 1
    assert exact["perplexity"] == pytest.approx(np.exp(want[0].mean()), rel=1e-5)
    assert 0 < int8["divergence"] < e5m2["divergence"] < 0.1
    for row in (int8, e5m2):
        assert row["perplexity"] != exact["perplexity"]
        assert row["perplexity"] == pytest.approx(exact["perplexity"], rel=row["divergence"])


def test_layers_of_a_model_are_those_in_its_cache(model, tokens):
    text = jnp.asarray(tokens)
    q, k, v = _accuracy.layers_of(model, text, queries=3)
    cache = _accuracy.create_cache(SMALL, 38, Cache("float32"), None)
    _, cache = model.extend(text[None], cache)
    np.testing.assert_allclose(k, cache.k[:, 0], atol=1e-5)
    np.testing.assert_allclose(v, cache.v[:, 0], atol=1e-5)
    # Attention of the last queries, projected, is what the first block adds to its input.
    block = llamas.nnx.merge(*_first_layer(model))
    x = model.embed(text[None])
    want, _ = block.attention(block.attention_norm(x), rotary=_rotary())
    got = block.attention.out(_accuracy.attend(q[:1], k[:1], v[:1]))
    np.testing.assert_allclose(got[0], want[0, -3:], atol=1e-5)


def _first_layer(model):
    graph, weights = llamas.nnx.split(model.blocks)
    return graph, jax.tree.map(lambda x: x[0], weights)


def _rotary():
    from jax_fa.flax import rotary_tables

    return rotary_tables(SMALL.max_length, SMALL.head_dim, SMALL.rotary_base)
