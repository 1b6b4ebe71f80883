"""The drop-in beside jax.nn.dot_product_attention, argument by argument."""

import inspect

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import assert_close

import jax_fa

T, S = 7, 11


def inputs(rng, len_q=T, len_kv=S, dtype=jnp.float32):
    return cases.qkv(rng, cases.Shape(2, len_q, len_kv, 4, 2, 8), dtype)


def lengths(*x):
    return jnp.array(x, jnp.int32)


# no row of these is fully masked: there jax.nn gives the mean of the values, and this library 0
OPTIONS = {
    "nothing": lambda rng: {},
    "scale": lambda rng: {"scale": 0.2},
    "is_causal": lambda rng: {"is_causal": True},
    "bias": lambda rng: {"bias": cases.normal(rng, 2, 4, T, S)},
    "bias broadcast": lambda rng: {"bias": cases.normal(rng, 1, 4, 1, S)},
    "bias of three axes": lambda rng: {"bias": cases.normal(rng, 4, T, S)},
    "mask": lambda rng: {"mask": jnp.asarray(rng.random((2, 1, T, S)) < 0.5).at[..., 0].set(True)},
    "mask and bias": lambda rng: {
        "mask": jnp.asarray(rng.random((1, 1, T, S)) < 0.5).at[..., 0].set(True),
        "bias": cases.normal(rng, 2, 4, 1, S),
    },
    "mask and causal": lambda rng: {
        "mask": jnp.asarray(rng.random((2, 4, T, S)) < 0.5).at[..., 0].set(True),
        "is_causal": True,
    },
    "key lengths": lambda rng: {"key_value_seq_lengths": lengths(5, 11)},
    "query lengths": lambda rng: {"query_seq_lengths": lengths(3, 7)},
    "both lengths": lambda rng: {
        "query_seq_lengths": lengths(3, 7),
        "key_value_seq_lengths": lengths(6, 2),
        "is_causal": True,
    },
    "window": lambda rng: {"local_window_size": 2},
    "window of two": lambda rng: {"local_window_size": (3, 1)},
    "window and causal": lambda rng: {"local_window_size": (2, 2), "is_causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_jax_nn(name, rng):
    q, k, v = inputs(rng)
    options = OPTIONS[name](rng)
    wide = {
        n: x.astype(jnp.float32) if isinstance(x, jax.Array) and x.dtype == jnp.bfloat16 else x
        for n, x in options.items()
    }
    out = jax_fa.dot_product_attention(q, k, v, **options)
    expected = jax.nn.dot_product_attention(q, k, v, **wide)
    if "query_seq_lengths" in options:  # rows past it: there 0 times the mean of the values
        assert (out[0, 3:] == 0).all()
    assert_close(out, expected, 5e-6)


@pytest.mark.parametrize("len_q, len_kv", [(7, 11), (11, 7), (1, 9), (9, 9)])
def test_causal_is_top_left(len_q, len_kv, rng):
    q, k, v = inputs(rng, len_q, len_kv)
    for options in ({"is_causal": True}, {"is_causal": True, "local_window_size": (4, 0)}):
        out = jax_fa.dot_product_attention(q, k, v, **options)
        expected = jax.nn.dot_product_attention(q, k, v, **options)
        seen = min(len_q, len_kv + (4 if "local_window_size" in options else len_q))
        assert_close(out[:, :seen], expected[:, :seen], 5e-6)


def test_three_axes(rng):
    q, k, v = (x[0] for x in inputs(rng))
    for options in ({}, {"is_causal": True}, {"bias": cases.normal(rng, 4, T, S)}):
        out, lse = jax_fa.dot_product_attention(q, k, v, return_residual=True, **options)
        expected = jax.nn.dot_product_attention(q, k, v, return_residual=True, **options)
        assert out.shape == (T, 4, 8) and lse.shape == (T, 4)
        assert_close(out, expected[0], 5e-6)
        assert_close(lse, expected[1], 5e-6)


def test_residual_is_lse_in_float32(rng):
    q, k, v = inputs(rng, dtype=jnp.bfloat16)
    out, lse = jax_fa.dot_product_attention(q, k, v, return_residual=True)
    _, expected = reference.attention(q, k, v)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32 and lse.shape == (2, T, 4)
    assert_close(lse, np.swapaxes(expected, 1, 2), 1e-5)


def test_a_fully_masked_row_is_zero(rng):
    q, k, v = inputs(rng)
    mask = jnp.ones((2, 1, T, S), bool).at[1, 0, 3].set(False)
    out, lse = jax_fa.dot_product_attention(q, k, v, mask=mask, return_residual=True)
    assert (out[1, 3] == 0).all() and (lse[1, 3] == -jnp.inf).all() and (out[1, 2] != 0).all()


def test_gradients_equal_those_of_jax_nn(rng):
    q, k, v = inputs(rng)
    mask = jnp.asarray(rng.random((2, 1, T, S)) < 0.5).at[..., 0].set(True)
    bias = cases.normal(rng, 1, 4, T, S)
    w = cases.normal(rng, 2, T, 4, 8)

    def loss(fn):
        def value(q, k, v, bias):
            return (w * fn(q, k, v, bias=bias, mask=mask, is_causal=True)).sum()

        return jax.jit(jax.grad(value, (0, 1, 2, 3)))(q, k, v, bias)

    actual, expected = loss(jax_fa.dot_product_attention), loss(jax.nn.dot_product_attention)
    for x, y in zip(actual, expected):
        assert_close(x, y, 1e-5)


def test_logits_soft_cap(rng):
    q, k, v = inputs(rng)
    out = jax_fa.dot_product_attention(q, k, v, logits_soft_cap=1.5)
    assert_close(out, reference.attention(q, k, v, softcap=1.5)[0], 5e-6)


def test_signature_is_that_of_jax_nn():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(jax_fa.dot_product_attention).parameters
    assert list(ours)[:5] == list(theirs)[:5]
    assert set(theirs) <= set(ours)
    for name in theirs:
        assert ours[name].kind == theirs[name].kind and ours[name].default == theirs[name].default


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": jnp.ones((2, 1, T, S))}, "mask must be bool, got float32"),
        ({"mask": jnp.ones((3, 1, T, S), bool)}, r"bias must be \[2, 4, 7, 11\]"),
        ({"bias": jnp.ones((2, 1, 1, T, S))}, r"bias must be \[B, N, T, S\]"),
        ({"implementation": "cudnn"}, "implementation must be one of"),
        ({"query_seq_lengths": jnp.ones((2,))}, "q_lengths must be int32, got float32"),
    ],
)
def test_bad_input(options, message, rng):
    with pytest.raises(ValueError, match=message):
        jax_fa.dot_product_attention(*inputs(rng), **options)
