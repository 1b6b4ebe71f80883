"""Quantization: bounds, special values, layouts of scales."""

import pickle

import cases
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from reference import assert_close

import jax_fa

FP8 = ["float8_e4m3fn", "float8_e5m2"]
DTYPES = ["int8", *FP8]
LARGEST = {"int8": 127, "float8_e4m3fn": 448, "float8_e5m2": 57344}
# the largest relative rounding error of a normal number, and half the smallest subnormal
ROUNDING = {"float8_e4m3fn": (2.0**-4, 2.0**-10), "float8_e5m2": (2.0**-3, 2.0**-17)}
GRANULARITIES = [("tensor", None), ("token", None), ("head", None), ("group", 2), ("group", 8)]
AXES = {"tensor": (0, 1, 2, 3), "token": (2, 3), "head": (3,)}


def expected_scale(x, dtype, granularity, size):
    """max|x| / largest as `[B, K, S, G]` in float32, from section 3."""
    if granularity == "group":
        amax = np.abs(x).reshape(*x.shape[:-1], -1, size).max(-1)
    else:
        amax = np.abs(x).max(AXES[granularity], keepdims=True)
    scale = amax.astype(np.float32) / np.float32(LARGEST[dtype])
    return np.swapaxes(np.where(scale < np.finfo(np.float32).tiny, 1, scale), 1, 2)


@pytest.mark.parametrize("granularity, size", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_and_values(dtype, granularity, size, rng):
    x = cases.normal(rng, 2, 5, 3, 8) * jnp.exp(3 * cases.normal(rng, 2, 5, 3, 1))
    quantized = jax_fa.quantize(x, dtype, granularity, size)
    scale = expected_scale(np.asarray(x), dtype, granularity, size)
    assert quantized.values.dtype == jnp.dtype(dtype) and quantized.values.shape == x.shape
    assert quantized.scale.dtype == jnp.float32 and quantized.scale.shape == scale.shape
    np.testing.assert_allclose(quantized.scale, scale, rtol=2e-7)
    wide = reference.dequantize(quantized.values, quantized.scale)
    assert_close(quantized.dequantize(), wide, 0, relative=1e-6)
    assert_error_within_bounds(x, quantized, dtype)


def assert_error_within_bounds(x, quantized, dtype):
    wide = reference.dequantize(quantized.values, quantized.scale)
    ones = np.ones_like(np.asarray(quantized.values, np.float32))
    scale = reference.dequantize(ones, quantized.scale)
    error = np.abs(np.asarray(x, np.float64) - wide)
    if dtype == "int8":
        assert (error <= scale * (0.5 + 1e-5)).all()
    else:
        relative, absolute = ROUNDING[dtype]
        bound = np.maximum(np.abs(np.asarray(x, np.float64)) * relative, scale * absolute)
        assert (error <= bound * (1 + 1e-5)).all()


arrays = hnp.arrays(
    np.float32, (1, 2, 2, 8),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False, allow_subnormal=True),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(x=arrays, granularity=st.sampled_from(GRANULARITIES))
def test_error_of_any_numbers_is_bounded(dtype, x, granularity):
    quantized = jax_fa.quantize(x, dtype, *granularity)
    amax = np.abs(x).max(-1)
    tiny = amax < np.finfo(np.float32).tiny * LARGEST[dtype]
    x = np.where(tiny[..., None] & (granularity[0] == "head"), 0, x)  # such rows count as zero
    if granularity[0] == "head" or not tiny.any():
        assert_error_within_bounds(x, quantized, dtype)
    assert np.isfinite(np.asarray(quantized.scale)).all()
    assert (np.abs(np.asarray(quantized.values, np.float32)) <= LARGEST[dtype]).all()


@pytest.mark.parametrize("dtype", FP8)
def test_no_scale_saturates(dtype):
    largest = LARGEST[dtype]
    x = jnp.array([500.0, -1e30, jnp.inf, -jnp.inf, jnp.nan, 1.0, 0.0, largest]).reshape(1, 1, 8)
    quantized = jax_fa.quantize(x, dtype, None)
    assert quantized.scale is None
    back = np.asarray(quantized.dequantize()).ravel()
    first = min(500.0, largest) if largest < 500 else 512.0
    expected = [first, -largest, largest, -largest, np.nan, 1, 0, largest]
    np.testing.assert_array_equal(back, expected)


def test_500_becomes_448():
    x = jnp.full((1, 1, 2), 500.0)
    quantized = jax_fa.quantize(x, "float8_e4m3fn", granularity=None)
    np.testing.assert_array_equal(quantized.values.astype(jnp.float32), 448)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_small_for_a_scale_are_zero(dtype):
    tiny = np.finfo(np.float32).tiny
    x = jnp.zeros((1, 3, 1, 4)).at[0, 0].set(1e-40).at[0, 1].set(tiny * LARGEST[dtype] * 2)
    quantized = jax_fa.quantize(x, dtype)
    assert quantized.scale[0, 0, 0, 0] == 1 and quantized.scale[0, 0, 2, 0] == 1
    assert (quantized.values[0, 0].astype(jnp.float32) == 0).all()
    assert quantized.scale[0, 0, 1, 0] >= tiny
    assert (quantized.values[0, 1].astype(jnp.float32) == LARGEST[dtype]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype, bad, rng):
    x = cases.normal(rng, 1, 3, 2, 8)
    clean = jax_fa.quantize(x, dtype)
    dirty = jax_fa.quantize(x.at[0, 1, 1, 3].set(bad), dtype)
    assert not jnp.isfinite(dirty.scale[0, 1, 1, 0])
    assert jnp.isnan(dirty.scale[0, 1, 1, 0]) == np.isnan(bad)
    assert jnp.isnan(dirty.dequantize()[0, 1, 1, 3])
    others = np.ones((1, 2, 3), bool)
    others[0, 1, 1] = False
    np.testing.assert_array_equal(dirty.scale[others], clean.scale[others])
    np.testing.assert_array_equal(
        dirty.dequantize().swapaxes(1, 2)[others], clean.dequantize().swapaxes(1, 2)[others]
    )


def test_an_outlier_costs_its_group_only(rng):
    x = cases.normal(rng, 1, 4, 2, 16).at[0, 0, 0, 0].set(1e4)
    error = {
        granularity: np.abs(jax_fa.quantize(x, "int8", granularity, size).dequantize() - x)
        for granularity, size in (("tensor", None), ("token", None), ("head", None), ("group", 4))
    }
    assert error["tensor"][0, 3].max() > 0.5  # everything is lost
    assert error["token"][0, 1:].max() < 0.03 and error["token"][0, 0, 1].max() > 0.5
    assert error["head"][0, 0, 1].max() < 0.03 and error["head"][0, 0, 0, 8:].max() > 0.5
    assert error["group"][0, 0, 0, 4:].max() < 0.03


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_inputs_of_other_dtypes(dtype, rng):
    with jax.enable_x64(dtype == "float64"):
        x = cases.normal(rng, 1, 3, 2, 8, dtype=jnp.dtype(dtype))
        quantized = jax_fa.quantize(x, "int8")
        assert_error_within_bounds(x, quantized, "int8")
        assert quantized.dequantize(jnp.dtype(dtype)).dtype == x.dtype


def test_ties_round_to_even():
    x = jnp.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]).reshape(1, 1, 6)
    quantized = jax_fa.quantize(x, "int8")
    np.testing.assert_array_equal(quantized.values.ravel(), [127, 0, 2, 2, 0, -2])


def test_stacked_and_packed_shapes(rng):
    x = cases.normal(rng, 3, 2, 5, 4, 8)
    assert jax_fa.quantize(x, "int8").scale.shape == (3, 2, 4, 5, 1)
    assert jax_fa.quantize(x, "int8", "token").scale.shape == (3, 2, 1, 5, 1)
    assert jax_fa.quantize(x[0, 0], "int8", "group", 2).scale.shape == (4, 5, 4)


def test_a_pytree_that_vmaps_pickles_and_jits(rng):
    x = cases.normal(rng, 3, 2, 5, 4, 8)
    quantized = jax_fa.quantize(x[0], "int8", "tensor")
    assert jax.tree.structure(quantized).num_leaves == 2
    assert jax.tree.structure(jax_fa.quantize(x, "float8_e5m2", None)).num_leaves == 1
    copy = pickle.loads(pickle.dumps(quantized))
    np.testing.assert_array_equal(copy.dequantize(), quantized.dequantize())
    values = jax_fa.quantize(x, "int8").values
    axes = jax_fa.QuantizedArray(0, None)
    out = jax.jit(jax.vmap(lambda y: y.dequantize(), (axes,)))(
        jax_fa.QuantizedArray(values, quantized.scale)
    )
    np.testing.assert_array_equal(out, values.astype(jnp.float32) * quantized.scale.squeeze())
    shared = jax.vmap(lambda y: y.shape, (axes,), None)(
        jax_fa.QuantizedArray(values, quantized.scale)
    )
    assert shared == (2, 5, 4, 8)


def test_quantize_under_jit_gives_the_same_bits(rng):
    x = cases.normal(rng, 2, 5, 4, 8)
    for dtype in DTYPES:
        eager, jitted = jax_fa.quantize(x, dtype), jax.jit(lambda x: jax_fa.quantize(x, dtype))(x)  # noqa: B023
        np.testing.assert_array_equal(eager.scale, jitted.scale)
        np.testing.assert_array_equal(
            eager.values.astype(jnp.float32), jitted.values.astype(jnp.float32)
        )
