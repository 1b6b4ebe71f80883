"""Which probabilities the kernels drop, bit for bit those of the oracle (`pytest -m gpu`)."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import DTYPES, LENGTHS_K, LENGTHS_Q, same_bits

import jax_fa

pytestmark = pytest.mark.gpu

RATES = [2.0**-17, 2.0**-15, 2.0**-11, 0.1, 0.5, 0.968, 0.97, 1 - 2.0**-15, 1 - 2.0**-17]


def expected_mask(key, batch, heads, len_q, len_kv, rate, broadcast=False):
    """[B, N, T, S]"""
    options = {"dropout_rng": key, "broadcast_dropout": broadcast}
    seeds = cases.oracle_options(options, batch)["seeds"]
    rows = [reference.dropout_keep(x, heads, len_q, len_kv, rate, broadcast) for x in seeds]
    return np.stack(rows)


def forward_mask(shape, dtype, **options):
    """All probabilities are alike, and each dim of v is one key's, of as many as there are dims."""
    b, t, s, n, k, h, _ = shape
    q, zeros = (jnp.zeros(x, dtype) for x in ((b, t, n, h), (b, s, k, h)))
    call = jax.jit(lambda v: jax_fa.flash_attention(q, zeros, v, **options))
    parts = []
    for first in range(0, s, h):
        ones = jnp.eye(s, h, -first, dtype=dtype)
        out = call(jnp.broadcast_to(ones[:, None], (b, s, k, h)))
        parts.append(np.moveaxis(np.asarray(out) != 0, 1, 2)[..., : s - first])
    return np.concatenate(parts, -1)


def backward_mask(shape, dtype, **options):
    """Likewise of dv, one key head a query head: each dim of dout is one query's."""
    b, t, s, n, _, h, _ = shape
    q, zeros = (jnp.zeros((b, x, n, h), dtype) for x in (t, s))

    @jax.jit
    def call(dout):
        return jax.vjp(lambda v: jax_fa.flash_attention(q, zeros, v, **options), zeros)[1](dout)[0]

    parts = []
    for first in range(0, t, h):
        ones = jnp.eye(t, h, -first, dtype=dtype)
        dv = call(jnp.broadcast_to(ones[:, None], (b, t, n, h)))
        parts.append(np.asarray(dv).transpose(0, 2, 3, 1)[:, :, : t - first] != 0)
    return np.concatenate(parts, 2)


SHAPES = [
    cases.Shape(2, 139, 203, 3, 3, 64),
    cases.Shape(1, 67, 331, 2, 2, 96),
    cases.Shape(2, 203, 139, 2, 2, 128),
    cases.Shape(1, 67, 331, 2, 2, 192),
    cases.Shape(1, 131, 77, 2, 2, 256),
]


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_drop_what_the_oracle_does(shape, dtype, broadcast):
    key = jax.random.key(1)
    options = {"dropout_rate": 0.37, "dropout_rng": key, "broadcast_dropout": broadcast}
    b, t, s, n, *_ = shape
    expected = expected_mask(key, b, n, t, s, 0.37, broadcast)
    np.testing.assert_array_equal(forward_mask(shape, jnp.dtype(dtype), **options), expected)
    for deterministic in (False, True):
        mask = backward_mask(shape, jnp.dtype(dtype), deterministic=deterministic, **options)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("rate", RATES)
def test_rates_near_0_and_1(rate):
    shape, key = cases.Shape(1, 300, 700, 2, 2, 128), jax.random.key(2)
    expected = expected_mask(key, 1, 2, 300, 700, rate)
    options = {"dropout_rate": rate, "dropout_rng": key}
    for mask in (forward_mask, backward_mask):
        np.testing.assert_array_equal(mask(shape, jnp.bfloat16, **options), expected)


def test_a_group_of_query_heads_drops_by_query_head():
    shape, key = cases.Shape(2, 100, 64, 6, 2, 64), jax.random.key(3)
    mask = forward_mask(shape, jnp.bfloat16, dropout_rate=0.5, dropout_rng=key)
    np.testing.assert_array_equal(mask, expected_mask(key, 2, 6, 100, 64, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_count_from_their_own_start(dtype):
    key, heads, dim = jax.random.key(4), 2, 256
    total_q, total_k = sum(LENGTHS_Q), sum(LENGTHS_K)
    q = jnp.zeros((total_q, heads, dim), dtype)
    k = jnp.zeros((total_k, heads, dim), dtype)
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)
    own = np.concatenate([np.arange(n) for n in LENGTHS_K])
    v = jnp.broadcast_to(jnp.asarray(own[:, None] == np.arange(dim), dtype)[:, None], k.shape)
    out = jax_fa.flash_attention_varlen(
        q, k, v, cu_q, cu_k, max_seqlen_q=max(LENGTHS_Q), max_seqlen_k=max(LENGTHS_K),
        dropout_rate=0.4, dropout_rng=key,
    )  # fmt: skip
    seeds = cases.oracle_options({"dropout_rng": key}, len(LENGTHS_Q))["seeds"]
    for b, (len_q, len_kv) in enumerate(zip(LENGTHS_Q, LENGTHS_K)):
        got = np.asarray(out[cu_q[b] : cu_q[b + 1], :, :len_kv] != 0)
        expected = reference.dropout_keep(seeds[b], heads, len_q, len_kv, 0.4, False)
        np.testing.assert_array_equal(np.moveaxis(got, 0, 1), expected)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_fraction_kept_is_within_three_sigma(rate):
    size = 2048
    q, v = jnp.zeros((1, size, 16, 64)), jnp.ones((1, size, 16, 64))
    out = jax_fa.flash_attention(q, q, v, dropout_rate=rate, dropout_rng=jax.random.key(6))
    kept = float(np.asarray(out[..., 0], np.float64).mean()) * (1 - rate)
    assert abs(kept - (1 - rate)) < 3 * (rate * (1 - rate) / (16 * size * size)) ** 0.5


@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("float16", 128), ("float32", 96)])
def test_reruns_have_the_same_bits_and_lse_is_without_dropout(dtype, head_dim, rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 239, 317, 4, 2, head_dim), jnp.dtype(dtype))
    fixed = {"causal": True, "softcap": 5.0, "return_lse": True}

    @jax.jit
    def call(q, k, v):
        options = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(7)}
        return jax_fa.flash_attention(q, k, v, **options, **fixed)

    first = call(q, k, v)
    same_bits(call(q, k, v), first)
    _, lse = jax_fa.flash_attention(q, k, v, **fixed)
    reference.assert_close(first[1], reference.as_float64(lse), 1e-3)


@pytest.mark.parametrize("implementation", ["cuda", "reference"])
def test_vmap_of_grad_over_keys_of_dropout_equals_a_loop(implementation, rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 65, 99, 4, 2, 64), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)
    qs = jnp.stack([q, q + 1, q])

    def loss(q, k, key):
        out = jax_fa.flash_attention(
            q, k, v, causal=True, dropout_rate=0.5, dropout_rng=key, deterministic=True,
            implementation=implementation,
        )  # fmt: skip
        return (out.astype(jnp.float32) ** 2).sum()

    grad = jax.grad(loss, (0, 1))
    nested = jax.jit(jax.vmap(grad, (0, None, 0)))(qs, k, keys)
    for i in range(3):
        one = jax.jit(grad)(qs[i], k, keys[i])
        for x, y in zip(nested, one, strict=True):
            reference.assert_close(x[i], reference.as_float64(y), 2e-2)
    assert (nested[0][0] != nested[0][2]).any()


def test_remat_draws_the_same(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 65, 65, 4, 4, 64), jnp.bfloat16)

    def layer(x, key):
        out = jax_fa.flash_attention(
            x, k, v, causal=True, dropout_rate=0.2, dropout_rng=key, deterministic=True
        )
        return x + out, None

    def total(layer, x):
        keys = jax.random.split(jax.random.key(8), 3)
        return jax.lax.scan(layer, x, keys)[0].astype(jnp.float32).sum()

    expected = jax.jit(jax.grad(lambda x: total(layer, x)))(q)
    same_bits(jax.jit(jax.grad(lambda x: total(jax.checkpoint(layer), x)))(q), expected)
