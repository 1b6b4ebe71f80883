"""Values of whole-sequence attention against the float64 oracle."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close
from reference import attention as oracle
from reference import varlen as varlen_oracle

import jax_fa

TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 5e-6, "float64": 1e-13}


def run(q, k, v, options, fn=jax_fa.flash_attention):
    """out and lse under jit, and what the oracle says."""
    arrays, static = cases.split_options(options)
    call = jax.jit(lambda q, k, v, arrays: fn(q, k, v, return_lse=True, **arrays, **static))
    out, lse = call(q, k, v, arrays)
    return (out, lse), oracle(q, k, v, **cases.oracle_options(options, q.shape[0]))


def check(actual, expected, dtype=jnp.float32):
    tolerance = TOLERANCE[np.dtype(dtype).name]
    (out, lse), (ref_out, ref_lse) = actual, expected
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert_close(out, ref_out, tolerance, "out")
    assert_close(lse, ref_lse, max(tolerance / 10, 1e-13), "lse", relative=1e-6)


@pytest.mark.parametrize("names", cases.PAIRS, ids="-".join)
def test_features_alone_and_in_pairs(names, rng):
    shape = cases.SHAPES[0]
    q, k, v = cases.qkv(rng, shape)
    check(*run(q, k, v, cases.options_of(names, rng, shape)))


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_shapes(shape, rng):
    q, k, v = cases.qkv(rng, shape)
    options = cases.options_of(("causal", "kv_lengths", "sinks"), rng, shape)
    check(*run(q, k, v, options | {"window": (20, None)}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype, rng):
    shape = cases.Shape(2, 33, 47, 4, 2, 72)
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    options = cases.options_of(("causal", "softcap", "alibi", "sinks"), rng, shape)
    check(*run(q, k, v, options), jnp.dtype(dtype))


def test_float64_accumulates_in_float64(rng):
    with jax.enable_x64(True):
        shape = cases.Shape(2, 33, 47, 4, 2, 40)
        q, k, v = cases.qkv(rng, shape, jnp.float64)
        options = cases.options_of(("causal", "softcap", "alibi", "sinks"), rng, shape)
        check(*run(q, k, v, options | {"scale": 0.3, "softcap": 1.5}), jnp.float64)


def test_float16_score_beyond_its_range_is_finite():
    q = jnp.full((1, 2, 1, 64), 200, jnp.float16)
    out, lse = jax_fa.flash_attention(q, q, q, return_lse=True)
    np.testing.assert_array_equal(np.asarray(out), 200)
    assert_close(lse, np.full((1, 1, 2), 64 * 200.0**2 / 8 + np.log(2)), 1)


def test_rows_that_see_nothing_are_zero_or_the_sink(rng):
    # T > S and causal: the first T - S queries of row 0 see no key; row 1 has no key at all
    q, k, v = cases.qkv(rng, cases.Shape(2, 9, 5, 2, 2, 16))
    options = {"causal": True, "kv_lengths": jnp.array([5, 0], jnp.int32)}
    out, lse = jax_fa.flash_attention(q, k, v, return_lse=True, **options)
    assert (out[0, :4] == 0).all() and (out[1] == 0).all() and (out[0, 4:] != 0).all()
    assert (lse[0, :, :4] == -jnp.inf).all() and (lse[1] == -jnp.inf).all()
    sinks = jnp.array([0.5, -2.0])
    out, lse = jax_fa.flash_attention(q, k, v, return_lse=True, sinks=sinks, **options)
    assert (out[0, :4] == 0).all() and (out[1] == 0).all()
    np.testing.assert_array_equal(lse[1], np.broadcast_to(sinks[:, None], (2, 9)))


def test_bias_of_minus_infinity_hides(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 5, 21, 2, 1, 8))
    bias = cases.normal(rng, 1, 2, 5, 21).at[:, :, :, 3:9].set(-jnp.inf).at[:, 1, 2].set(-jnp.inf)
    (out, lse), expected = run(q, k, v, {"bias": bias})
    assert (out[0, 2, 1] == 0).all() and lse[0, 1, 2] == -jnp.inf
    check((out, lse), expected)


@pytest.mark.parametrize(
    "axes", [(1, 1, 1, 1), (2, 4, 1, 1), (1, 1, 19, 1), (1, 4, 1, 35)], ids=str
)
def test_bias_broadcasts(axes, rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 19, 35, 4, 2, 16))
    check(*run(q, k, v, {"bias": cases.normal(rng, *axes)}))


def test_bias_keeps_its_own_dtype(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 9, 15, 4, 2, 16), jnp.bfloat16)
    bias = cases.normal(rng, 2, 1, 9, 15)
    check(*run(q, k, v, {"bias": bias}), jnp.bfloat16)


WINDOWS = [0, 5, (5, None), (None, 3), (0, 0), (100, 100), (None, None), (0, 6)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, causal, rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 19, 35, 1, 1, 8))
    check(*run(q, k, v, {"window": window, "causal": causal}))


def test_lengths_and_rows_past_them(rng):
    shape = cases.Shape(4, 33, 49, 4, 2, 16)
    q, k, v = cases.qkv(rng, shape)
    options = {
        "q_lengths": jnp.array([33, 0, 17, 5], jnp.int32),
        "kv_lengths": jnp.array([3, 49, 0, 31], jnp.int32),
        "causal": True,
        "sinks": cases.normal(rng, 4, 4),
    }
    (out, lse), expected = run(q, k, v, options)
    check((out, lse), expected)
    assert (out[1] == 0).all() and (lse[1] == -jnp.inf).all()  # sinks or not
    assert (out[3, 5:] == 0).all() and (lse[3, :, 5:] == -jnp.inf).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_poison_past_lengths_never_spreads(sinks, rng):
    shape = cases.Shape(3, 19, 35, 4, 2, 16)
    q, k, v = cases.qkv(rng, shape)
    q_lengths, kv_lengths = np.array([7, 19, 0], np.int32), np.array([20, 0, 33], np.int32)
    options = {"sinks": cases.normal(rng, 4)} if sinks else {}
    call = jax.jit(
        lambda q, k, v, bias: jax_fa.flash_attention(
            q, k, v, bias=bias, q_lengths=q_lengths, kv_lengths=kv_lengths, return_lse=True,
            **options,
        )
    )  # fmt: skip
    bias = cases.normal(rng, 3, 1, 19, 35)
    clean = call(q, k, v, bias)
    past_q = jnp.arange(19)[None] >= q_lengths[:, None]
    past_k = jnp.arange(35)[None] >= kv_lengths[:, None]
    q = jnp.where(past_q[..., None, None], jnp.nan, q)
    k, v = (jnp.where(past_k[..., None, None], jnp.nan, x) for x in (k, v))
    bias = jnp.where((past_q[:, :, None] | past_k[:, None])[:, None], jnp.nan, bias)
    for x, y in zip(call(q, k, v, bias), clean):
        np.testing.assert_array_equal(x, y)


def test_nan_in_a_live_key_is_seen(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 3, 5, 1, 1, 8))
    assert jnp.isnan(jax_fa.flash_attention(q, k.at[0, 2].set(jnp.nan), v)).all()


def test_packed_buffers_equal_separate_ones(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 19, 19, 4, 4, 16))
    options = {"causal": True, "softcap": 3.0, "return_lse": True}
    expected = jax_fa.flash_attention(q, k, v, **options)
    qkv = jax_fa.flash_attention_qkvpacked(jnp.stack([q, k, v], 2), **options)
    kv = jax_fa.flash_attention_kvpacked(q, jnp.stack([k, v], 2), **options)
    for actual in (qkv, kv):
        for x, y in zip(actual, expected):
            np.testing.assert_array_equal(x, y)
    q, k, v = cases.qkv(rng, cases.Shape(2, 7, 19, 4, 2, 16))
    expected = jax_fa.flash_attention(q, k, v, **options)
    for x, y in zip(jax_fa.flash_attention_kvpacked(q, jnp.stack([k, v], 2), **options), expected):
        np.testing.assert_array_equal(x, y)


def test_quantized_keys_equal_dequantized_ones(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 19, 35, 4, 2, 16))
    for dtype, granularity, size in [
        ("int8", "tensor", None), ("int8", "token", None), ("float8_e4m3fn", "head", None),
        ("float8_e5m2", "group", 8), ("float8_e4m3fn", None, None),
    ]:  # fmt: skip
        kq, vq = (jax_fa.quantize(x, dtype, granularity, size) for x in (k, v))
        out = jax_fa.flash_attention(q, kq, vq, causal=True)
        dense = jax_fa.flash_attention(q, kq.dequantize(), vq.dequantize(), causal=True)
        assert_close(out, dense, 1e-6, f"{dtype} {granularity}")
    mixed = jax_fa.flash_attention(q, kq, v, causal=True)  # one of them plain
    assert_close(mixed, jax_fa.flash_attention(q, kq.dequantize(), v, causal=True), 1e-6)


# --- dropout ---


def dropout_mask(rate, broadcast, batch=2, len_q=19, heads=2, size=75):
    """What survives: with v = 1 each output dim is one probability."""
    q = jnp.zeros((batch, len_q, heads, 4))
    v = jnp.broadcast_to(jnp.eye(size)[None, :, None], (batch, size, heads, size))
    key = jax.random.key(3)
    out = jax_fa.flash_attention(
        q, jnp.zeros((batch, size, heads, 4)), v, dropout_rate=rate, dropout_rng=key,
        broadcast_dropout=broadcast,
    )  # fmt: skip
    return jnp.moveaxis(out, 2, 1), key


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout_mask_is_philox_bit_for_bit(broadcast):
    from reference import dropout_keep

    out, key = dropout_mask(0.25, broadcast)
    seeds = np.asarray(jax.random.bits(key, (1 if broadcast else 2, 2), jnp.uint32))
    for b in range(2):
        keep = dropout_keep(seeds[0 if broadcast else b], 2, 19, 75, 0.25, broadcast)
        np.testing.assert_array_equal(np.asarray(out[b]) > 0, keep)
    np.testing.assert_allclose(out[out > 0], 1 / 75 / 0.75, rtol=1e-6)
    if broadcast:
        assert (out[0, 0] == out[1, 1]).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_fraction_within_three_sigma(rate):
    kept = np.asarray(dropout_mask(rate, False, 4, 64, 4, 64)[0]) > 0
    assert abs(kept.mean() - (1 - rate)) < 3 * (rate * (1 - rate) / kept.size) ** 0.5


def test_any_three_probabilities_of_a_draw_are_dropped_independently():
    from reference import dropout_keep

    keep = dropout_keep((1, 2), 2, 128, 1024, 0.5, False)
    # [N, T / 16, 2, 8, S / 64, 8, 4, 2]: a draw has 2 of the queries and 8 x 2 of the keys
    draws = keep.reshape(2, 8, 2, 8, 16, 8, 4, 2).transpose(0, 1, 3, 4, 6, 2, 5, 7)
    signs = draws.reshape(-1, 32) * np.float32(2) - 1
    most = 6 / len(signs) ** 0.5
    pairs = signs.T @ signs / len(signs) - np.eye(32)
    assert abs(pairs).max() < most
    for i in range(32):
        triples = (signs * signs[:, i : i + 1]).T @ signs / len(signs)
        triples[i] = triples[:, i] = 0
        np.fill_diagonal(triples, 0)
        assert abs(triples).max() < most


def test_philox_known_answers():
    """Vectors of the authors' Random123 distribution."""
    from reference import philox

    from jax_fa._reference._dropout import philox as jnp_philox

    assert philox((0,) * 4, (0,) * 2) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    words = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    expected = (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)
    assert philox(*words) == expected
    assert tuple(map(int, jnp_philox(*([jnp.uint32(x) for x in w] for w in words)))) == expected


def test_lse_is_without_dropout(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 5, 21, 2, 1, 8))
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    _, dropped = jax_fa.flash_attention(q, k, v, return_lse=True, **options)
    _, whole = jax_fa.flash_attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(dropped, whole)


def test_dropout_takes_any_kind_of_key(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 5, 21, 2, 1, 8))
    for key in (jax.random.PRNGKey(7), jax.random.key(7), jax.random.key(7, impl="rbg")):
        options = {"dropout_rate": 0.5, "dropout_rng": key}
        check(*run(q, k, v, options))


# --- varlen ---

LENGTHS_Q = [0, 7, 1, 0, 29, 5]  # 42 tokens, and padding behind them
LENGTHS_K = [3, 7, 33, 0, 19, 0]  # 62


def varlen_case(rng, names=(), dtype=jnp.float32, total_q=47, total_k=70, head_dim=16):
    shape = cases.Shape(len(LENGTHS_Q), 29, 33, 4, 2, head_dim)
    q = cases.normal(rng, total_q, 4, head_dim, dtype=dtype)
    k, v = (cases.normal(rng, total_k, 2, head_dim, dtype=dtype) for _ in range(2))
    return (q, k, v), cases.options_of(names, rng, shape)


def run_varlen(qkv, options):
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)
    arrays, static = cases.split_options(options)

    @jax.jit
    def call(q, k, v, cu_q, cu_k, arrays):
        return jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=29, max_seqlen_k=33, return_lse=True,
            **arrays, **static,
        )  # fmt: skip

    actual = call(*qkv, cu_q, cu_k, arrays)
    batch = len(LENGTHS_Q)
    return actual, varlen_oracle(*qkv, cu_q, cu_k, **cases.oracle_options(options, batch))


VARLEN_PAIRS = [
    *((name,) for name in cases.VARLEN_FEATURES),
    ("causal", "sinks"), ("causal", "alibi"), ("window", "softcap"), ("window", "sinks"),
    ("causal", "dropout"), ("alibi", "sinks"),
]  # fmt: skip


@pytest.mark.parametrize("names", VARLEN_PAIRS, ids="-".join)
def test_varlen_features(names, rng):
    qkv, options = varlen_case(rng, names)
    check(*run_varlen(qkv, options))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_varlen_dtypes(dtype, rng):
    qkv, options = varlen_case(rng, ("causal", "sinks"), dtype, head_dim=40)
    check(*run_varlen(qkv, options), dtype)


def test_varlen_poison_outside_rows_never_spreads(rng):
    (q, k, v), options = varlen_case(rng, ("causal", "sinks"))
    clean, _ = run_varlen((q, k, v), options)
    k, v = (x.at[62:].set(jnp.nan) for x in (k, v))
    poisoned, _ = run_varlen((q.at[42:].set(jnp.nan), k, v), options)
    for x, y in zip(poisoned, clean):
        np.testing.assert_array_equal(x, y)
    assert (clean[0][42:] == 0).all() and (clean[1][:, 42:] == -jnp.inf).all()


def test_varlen_takes_quantized_keys(rng):
    (q, k, v), _ = varlen_case(rng)
    for granularity, size in [("head", None), ("token", None), ("tensor", None), ("group", 4)]:
        kq, vq = (jax_fa.quantize(x, "int8", granularity, size) for x in (k, v))
        actual = _varlen_values(q, kq, vq)
        expected = _varlen_values(q, kq.dequantize(), vq.dequantize())
        assert_close(actual, expected, 1e-6, granularity)


def _varlen_values(q, k, v):
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)
    return jax_fa.flash_attention_varlen(
        q, k, v, cu_q, cu_k, max_seqlen_q=29, max_seqlen_k=33, causal=True
    )


# --- empty arrays ---


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)], ids=str)
def test_empty_axes(sizes):
    batch, len_q, len_kv = sizes
    q, k = jnp.ones((batch, len_q, 4, 8)), jnp.ones((batch, len_kv, 2, 8))
    sinks = jnp.arange(4.0)
    for options in ({}, {"sinks": sinks}):

        def loss(q, k, v, options):
            out, lse = jax_fa.flash_attention(q, k, v, return_lse=True, causal=True, **options)
            return out.sum() + jnp.where(lse > -jnp.inf, lse, 0).sum(), (out, lse)

        grads, (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, k, options)
        assert out.shape == q.shape and lse.shape == (batch, 4, len_q)
        assert (out == 0).all()
        expected = jnp.broadcast_to(sinks[None, :, None], lse.shape) if options else -jnp.inf
        assert (lse == expected).all()
        assert all((g == 0).all() for g in grads[:3])
        if options:
            assert (grads[3]["sinks"] == batch * len_q).all()


@pytest.mark.parametrize("total_q, total_k, rows", [(0, 5, 2), (4, 0, 2), (4, 5, 0), (0, 0, 0)])
def test_varlen_empty(total_q, total_k, rows):
    q, k = jnp.ones((total_q, 4, 8)), jnp.ones((total_k, 2, 8))
    zeros = jnp.zeros((rows + 1,), jnp.int32)

    def loss(q, k):
        out, lse = jax_fa.flash_attention_varlen(
            q, k, k, zeros, zeros, max_seqlen_q=4, max_seqlen_k=5, return_lse=True
        )
        return out.sum(), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(q, k)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (4, total_q) and (lse == -jnp.inf).all()
    assert all((g == 0).all() for g in grads)


# --- calls ---


def test_no_retrace_for_the_same_shapes(rng):
    traces = []

    @jax.jit
    def call(q, k, v):
        traces.append(1)
        return jax_fa.flash_attention(q, k, v, causal=True)

    call(*cases.qkv(rng, cases.Shape(1, 5, 7, 2, 1, 8)))
    call(*cases.qkv(rng, cases.Shape(1, 5, 7, 2, 1, 8)))
    assert len(traces) == 1


def test_numpy_arrays_and_numpy_scalars(rng):
    q, k, v = (np.asarray(x) for x in cases.qkv(rng, cases.Shape(1, 5, 7, 2, 1, 8)))
    out = jax_fa.flash_attention(q, k, v, scale=np.float32(0.25), window=np.int64(2), causal=True)
    expected, _ = oracle(q, k, v, scale=0.25, window=2, causal=True)
    assert_close(out, expected, 5e-6)


def test_two_runs_and_a_batch_permutation_have_the_same_bits(rng):
    q, k, v = cases.qkv(rng, cases.Shape(4, 19, 35, 4, 2, 16))
    call = jax.jit(lambda *x: jax_fa.flash_attention(*x, causal=True))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(call(q, k, v), call(q, k, v))
    np.testing.assert_array_equal(call(q[order], k[order], v[order]), call(q, k, v)[order])


def test_lengths_and_windows_beyond_the_arrays_are_those_of_the_arrays(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 5, 7, 2, 1, 8))
    none, beyond = (jnp.asarray(x, jnp.int32) for x in ([0, 0], [11, 2**31 - 1]))
    for window in (None, (2, 1), (2**31 - 1, 2**31 - 1)):
        exact = jax_fa.flash_attention(q, k, v, window=window)
        np.testing.assert_allclose(
            jax_fa.flash_attention(q, k, v, window=window, q_lengths=beyond, kv_lengths=beyond),
            exact,
            rtol=1e-6,
        )
        assert not jax_fa.flash_attention(q, k, v, window=window, kv_lengths=none - 3).any()
    widest = jax_fa.flash_attention(q, k, v, window=2**31 - 1)
    np.testing.assert_allclose(widest, jax_fa.flash_attention(q, k, v), rtol=1e-6)
