"""The kernels under reruns, permutations, `vmap` and large offsets, and what they do not cover
(`pytest -m gpu`)."""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import run_dense, same_bits

import jax_fa

pytestmark = pytest.mark.gpu


def test_reruns_and_batch_permutations_have_the_same_bits(rng):
    q, k, v = cases.qkv(rng, cases.Shape(5, 239, 217, 8, 2, 128), jnp.bfloat16)
    order = np.array([3, 1, 4, 0, 2])
    for options in ({"causal": True}, {"causal": True, "softcap": 3.0}):
        first = run_dense(q, k, v, options)
        same_bits(run_dense(q, k, v, options), first)
        again = run_dense(q[order], k[order], v[order], options)
        same_bits(again, [x[order] for x in first])
    lengths = jnp.array([217, 3, 100, 0, 64], jnp.int32)
    decode = jax.jit(lambda q, k, v, n: jax_fa.decode_attention(q[:, :1], k, v, n, return_lse=True))
    first = decode(q, k, v, lengths)
    same_bits(decode(q[order], k[order], v[order], lengths[order]), [x[order] for x in first])


@pytest.mark.parametrize("in_axes", cases.VMAP_AXES, ids=str)
def test_vmap_equals_a_loop(in_axes, rng):
    shape = cases.Shape(2, 65, 99, 4, 2, 64)
    args = cases.mapped(rng, shape, jnp.bfloat16, in_axes)

    def fn(q, k, v):
        return jax_fa.flash_attention(q, k, v, causal=True, return_lse=True)

    nested = jax.jit(jax.vmap(fn, in_axes))(*args)
    for i in range(3):
        same_bits([x[i] for x in nested], jax.jit(fn)(*cases.lane(args, in_axes, i)))


def test_nested_vmap_with_keys_mapped_at_one_level(rng):
    q, k = (
        cases.normal(rng, 2, 3, 2, 33, 4, 64, dtype=jnp.float16),
        cases.normal(rng, 3, 2, 47, 2, 64, dtype=jnp.float16),
    )

    def fn(q, k):
        return jax_fa.flash_attention(q, k, k, causal=True)

    out = jax.jit(jax.vmap(jax.vmap(fn), (0, None)))(q, k)
    for i, j in itertools.product(range(2), range(3)):
        same_bits(out[i, j], jax.jit(fn)(q[i, j], k[j]))


def test_gradients_through_the_generic_backward(rng):
    import test_gradients as gradients

    shape = cases.Shape(2, 65, 99, 4, 2, 64)
    fixed = {"implementation": "reference"}
    for names in (("causal",), ("softcap", "sinks"), ("bias", "kv_lengths"), ("dropout",)):
        qkv = cases.qkv(rng, shape)
        gradients.check(qkv, cases.options_of(names, rng, shape), shape, 1e-4, **fixed)
    qkv = cases.qkv(rng, shape, jnp.bfloat16)
    gradients.check(qkv, {"causal": True}, shape, 0.15, **fixed)


def test_offsets_past_two_to_the_31(rng):
    rows, length = 9, 1 << 18  # 2.4e9 elements
    row = cases.normal(rng, 1, length, 8, 128, dtype=jnp.bfloat16)
    cache = jax.lax.dynamic_update_slice(
        jnp.full((rows, length, 8, 128), jnp.nan, jnp.bfloat16), row, (rows - 1, 0, 0, 0)
    )
    q = cases.normal(rng, 1, 8, 128, dtype=jnp.bfloat16)
    lengths = jnp.array([length], jnp.int32)
    far = jax_fa.decode_attention(
        q, cache, cache, lengths, batch_index=jnp.array([rows - 1], jnp.int32)
    )
    same_bits(far, jax_fa.decode_attention(q, row, row, lengths))


def test_two_uncovered_calls_say_why():
    q = jnp.ones((1, 8, 2, 36), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError, match="head dim 36 of k; .* kernels take multiples of 8"
    ):
        jax_fa.flash_attention(q, q, q)
    jax_fa.flash_attention(q, q, q, implementation="reference")
