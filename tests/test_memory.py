"""No array of queries by keys: scratch stays small at lengths where the scores would take 8 GiB."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa

pytestmark = pytest.mark.real_blocks

LONG = jax.ShapeDtypeStruct((1, 32768, 2, 64), jnp.float32)
MIB = 1 << 20


def peak(fn, *args):
    """Bytes of scratch, arguments and results of a jitted function."""
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    return (
        memory.temp_size_in_bytes, memory.argument_size_in_bytes + memory.output_size_in_bytes
    )  # fmt: skip


def loss(q, k, v, **options):
    out, lse = jax_fa.flash_attention(q, k, v, causal=True, return_lse=True, **options)
    return out.sum() + lse.sum()


def test_forward_of_32768():
    temp, rest = peak(lambda *x: jax_fa.flash_attention(*x, causal=True), LONG, LONG, LONG)
    assert temp < 256 * MIB and temp + rest < 2048 * MIB


def test_forward_and_backward_of_32768():
    temp, rest = peak(jax.grad(loss, (0, 1, 2)), LONG, LONG, LONG)
    assert temp < 512 * MIB and temp + rest < 2048 * MIB


def test_backward_with_everything_of_32768():
    def full(q, k, v, sinks, slopes):
        options = {"softcap": 5.0, "sinks": sinks, "alibi_slopes": slopes, "window": (5000, None)}
        return loss(q, k, v, **options)

    heads = jax.ShapeDtypeStruct((2,), jnp.float32)
    temp, rest = peak(jax.grad(full, (0, 1, 2, 3)), LONG, LONG, LONG, heads, heads)
    assert temp < 640 * MIB and temp + rest < 2048 * MIB


def test_varlen_of_32768():
    cu = jnp.array([0, 20000, 32768], jnp.int32)

    def varlen(q, k, v):
        out = jax_fa.flash_attention_varlen(
            q, k, v, cu, cu, max_seqlen_q=20000, max_seqlen_k=20000, causal=True
        )
        return out.sum()

    packed = jax.ShapeDtypeStruct((32768, 2, 64), jnp.float32)
    temp, rest = peak(jax.grad(varlen, (0, 1, 2)), packed, packed, packed)
    assert temp < 512 * MIB and temp + rest < 2048 * MIB


def test_blocks_of_the_size_that_users_have_give_the_same_values(rng):
    """2 blocks of queries by 4 chunks of keys, the last one moved back."""
    q, k, v = cases.qkv(rng, cases.Shape(1, 5003, 1999, 4, 2, 16))

    def naive(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        s = jnp.einsum("btnh,bsnh->bnts", q, k) / 4
        seen = jnp.arange(1999)[None] <= jnp.arange(5003)[:, None] - 3004
        s = jnp.where(seen[None, None], s, -jnp.inf)
        lse = jax.nn.logsumexp(s, -1)
        p = jnp.where(seen[None, None], jnp.exp(s - jnp.where(seen.any(-1), lse, 0)[..., None]), 0)
        return jnp.einsum("bnts,bsnh->btnh", p, v)

    w = cases.normal(rng, *q.shape)

    def value_and_grad(fn):
        return jax.jit(jax.value_and_grad(lambda *x: (w * fn(*x)).sum(), (0, 1, 2)))(q, k, v)

    ours = value_and_grad(lambda *x: jax_fa.flash_attention(*x, causal=True))
    theirs = value_and_grad(naive)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert np.isfinite(np.asarray(y)).all()
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)
