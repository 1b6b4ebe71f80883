"""Dense and packed prefill by the kernels against the float64 oracle (`pytest -m gpu`)."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import DTYPES, LENGTHS_K, LENGTHS_Q, check, check_dense, run_dense, same_bits

import jax_fa

pytestmark = pytest.mark.gpu

HEAD_DIMS = [40, 64, 72, 80, 96, 128, 160, 192, 256]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype, causal, rng):
    check_dense(cases.Shape(1, 113, 217, 4, 2, head_dim), dtype, {"causal": causal}, rng)


@pytest.mark.parametrize("names", cases.PAIRS, ids="-".join)
def test_features(names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, 64)
    check_dense(shape, "bfloat16", cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize(
    "names",
    [
        ("causal", "softcap"),
        ("bias", "sinks"),
        ("window", "alibi", "kv_lengths"),
        ("causal", "softcap", "dropout"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize(
    "dtype, head_dim",
    [("float16", 128), ("float32", 96), ("float32", 256), ("bfloat16", 80), ("bfloat16", 256)],
)
def test_features_of_other_dtypes(dtype, head_dim, names, rng):
    shape = cases.Shape(2, 67, 131, 4, 4, head_dim)
    check_dense(shape, dtype, cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("softcap", [0.3, 5.0, 20.0, 50.0])
@pytest.mark.parametrize("dtype, head_dim", [("float16", 64), ("bfloat16", 128), ("float16", 256)])
def test_softcaps_far_above_and_below_scores(dtype, head_dim, softcap, rng):
    options = {"causal": True, "softcap": softcap, "scale": 3 * head_dim**-0.5}
    check_dense(cases.Shape(1, 200, 333, 4, 2, head_dim), dtype, options, rng)


SIZES = [(1, 1), (1, 3), (3, 1), (63, 65), (65, 63), (1, 1023), (239, 113), (129, 1023), (799, 799)]


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("len_q, len_kv", SIZES)
def test_sizes(len_q, len_kv, group, rng):
    shape = cases.Shape(2, len_q, len_kv, group, 1, 64)
    check_dense(shape, "bfloat16", {"causal": True, "window": (300, None)}, rng)


FEW = [(1, 113, 4), (4, 4, 1), (16, 257, 1), (3, 2, 5), (5, 2500, 4), (8, 2100, 8)]


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("causal",),
        ("window",),
        ("causal", "kv_lengths"),
        ("causal", "softcap", "sinks"),
        ("window", "alibi", "kv_lengths"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 128), ("float16", 40), ("bfloat16", 256)])
@pytest.mark.parametrize("len_q, len_kv, group", FEW)
def test_few_queries(len_q, len_kv, group, dtype, head_dim, names, rng):
    """Most of which run on the decode kernel."""
    shape = cases.Shape(3, len_q, len_kv, 2 * group, 2, head_dim)
    check_dense(shape, dtype, cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("len_q, causal", [(1, False), (8, True)])
def test_few_queries_of_a_drop_in(len_q, causal, rng):
    """The diagonal begins at the first key: that of decoding for as many keys as queries."""
    len_kv = len_q if causal else 200
    q, k, v = cases.qkv(rng, cases.Shape(3, len_q, len_kv, 4, 2, 64), jnp.bfloat16)
    lengths = None if causal else jnp.array([200, 17, 1], jnp.int32)
    out = jax_fa.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=lengths)
    ref, _ = reference.attention(q, k, v, causal=causal, kv_lengths=lengths)
    assert np.abs(reference.as_float64(out) - ref).max() < 0.02


@pytest.mark.parametrize("group", [2, 4, 5, 6, 7, 16, 32])
def test_groups(group, rng):
    check_dense(cases.Shape(1, 77, 99, 2 * group, 2, 128), "float16", {"causal": True}, rng)


@pytest.mark.parametrize(
    "axes", [(1, 1, 1, 1), (2, 4, 1, 1), (1, 1, 65, 1), (1, 4, 1, 131), (2, 4, 65, 131)], ids=str
)
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
def test_bias(axes, bias_dtype, rng):
    bias = cases.normal(rng, *axes, dtype=jnp.dtype(bias_dtype))
    check_dense(cases.Shape(2, 65, 131, 4, 2, 64), "bfloat16", {"bias": bias}, rng)


def test_masked_rows_and_minus_infinity(rng):
    bias = (
        cases.normal(rng, 1, 2, 65, 131).at[:, :, :, 30:90].set(-jnp.inf).at[:, 1, 7].set(-jnp.inf)
    )
    shape = cases.Shape(2, 65, 131, 4, 2, 64)
    lengths = {
        "q_lengths": jnp.array([65, 9], jnp.int32),
        "kv_lengths": jnp.array([20, 0], jnp.int32),
    }
    for options in (
        {"bias": jnp.tile(bias, (1, 2, 1, 1))},
        {"causal": True, **lengths},
        {"causal": True, "sinks": cases.normal(rng, 4), **lengths},
        {"window": (3, 5), **lengths},
    ):
        check_dense(shape, "bfloat16", options, rng)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_past_lengths(dtype, softcap, rng):
    shape = cases.Shape(3, 97, 139, 4, 2, 64)
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    options = {
        "q_lengths": jnp.array([70, 97, 0], jnp.int32),
        "kv_lengths": jnp.array([33, 0, 130], jnp.int32),
        "causal": True, "sinks": cases.normal(rng, 4), "softcap": softcap,
    }  # fmt: skip
    clean = run_dense(q, k, v, options)
    past_q = jnp.arange(97)[None] >= options["q_lengths"][:, None]
    past_k = jnp.arange(139)[None] >= options["kv_lengths"][:, None]
    q = jnp.where(past_q[..., None, None], jnp.nan, q)
    k, v = (jnp.where(past_k[..., None, None], jnp.nan, x) for x in (k, v))
    same_bits(run_dense(q, k, v, options), clean)


def test_packed_buffers(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 113, 113, 4, 4, 64), jnp.bfloat16)
    expected = run_dense(q, k, v, {"causal": True})
    options = {"causal": True, "return_lse": True}
    same_bits(jax_fa.flash_attention_qkvpacked(jnp.stack([q, k, v], 2), **options), expected)
    same_bits(jax_fa.flash_attention_kvpacked(q, jnp.stack([k, v], 2), **options), expected)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("causal",),
        ("causal", "sinks"),
        ("window", "softcap"),
        ("causal", "alibi"),
        ("causal", "dropout"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("float16", 128), ("float32", 72)])
def test_varlen(dtype, head_dim, names, rng):
    shape = cases.Shape(6, 129, 200, 4, 2, head_dim)
    options = cases.options_of(names, rng, shape)
    expected = cases.oracle_options(options, 6)
    q = cases.normal(rng, 210, 4, head_dim, dtype=jnp.dtype(dtype))
    k, v = (cases.normal(rng, 420, 2, head_dim, dtype=jnp.dtype(dtype)) for _ in "kv")
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)

    @jax.jit
    def call(q, k, v):
        return jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=129, max_seqlen_k=200, return_lse=True, **options
        )

    actual = call(q, k, v)
    check(
        actual,
        lambda rounded: reference.varlen(q, k, v, cu_q, cu_k, rounded=rounded, **expected),
        dtype, 3 if "softcap" in names else 2,
    )  # fmt: skip
    poisoned = (q.at[205:].set(jnp.nan), *(x.at[404:].set(jnp.nan) for x in (k, v)))
    same_bits(call(*poisoned), actual)


def _with_a_sink(rng, shape, dtype, jump, rows):
    """Arrays where `rows` of queries score `jump` nats on the first key, others about 0."""
    q, k, v = (np.array(x, np.float32) for x in cases.qkv(rng, shape, jnp.float32))
    direction = np.sign(rng.standard_normal(shape.head_dim)).astype(np.float32)
    for x in (q, k):
        x -= (x @ direction)[..., None] * direction / shape.head_dim
    k[:, 0] += direction
    q[:, rows] += direction * (jump / shape.head_dim**0.5)
    return tuple(jnp.asarray(x, jnp.dtype(dtype)) for x in (q, k, v))


def same_bits_of(rows, actual, expected):
    """Of out and lse, at those queries."""
    for x, y, axis in zip(actual, expected, (1, 2), strict=True):
        same_bits(jnp.take(x, rows, axis), jnp.take(y, rows, axis))


# Kernels on Hopper look for a maximum in the last keys and follow it on the way to the first. One
# more than 43 below a score has them begin again, and probabilities in float16 are taken down where
# it is more than 10 below.
ROWS = np.array([0, 3, 64, 200, 333, 334, 335, 399])


@pytest.mark.parametrize("jump", [12.0, 40.0, 90.0])
@pytest.mark.parametrize(
    "names", [(), ("causal",), ("window",), ("kv_lengths", "sinks"), ("causal", "dropout")], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_first_keys_with_the_largest_scores(head_dim, dtype, names, jump, rng):
    shape = cases.Shape(2, 400, 400, 4, 2, head_dim)
    options = cases.options_of(names, rng, shape)
    q, k, v = _with_a_sink(rng, shape, dtype, jump, ROWS)
    out, lse = run_dense(q, k, v, options)
    expected = cases.oracle_options(options, shape.batch)
    # Where a maximum is followed that far, even the largest probability is not 1 but rounded.
    check(
        (out, lse),
        lambda rounded: reference.attention(q, k, v, rounded=rounded, **expected),
        dtype,
        3 if jump == 40.0 else 2,
    )

    # The other queries do not notice.
    others = np.setdiff1d(np.arange(400), ROWS)
    calm, _, _ = _with_a_sink(np.random.default_rng(0), shape, dtype, 0.0, ROWS)
    calm = jnp.where(np.isin(np.arange(400), ROWS)[:, None, None], calm, q)
    same_bits_of(others, (out, lse), run_dense(calm, k, v, options))


@pytest.mark.parametrize("jump", [12.0, 90.0])
@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_first_keys_of_8_bits_with_the_largest_scores(head_dim, dtype, cache, jump, rng):
    shape = cases.Shape(1, 400, 1000, 2, 2, head_dim)
    q, k, v = _with_a_sink(rng, shape, dtype, jump, ROWS)
    k, v = (jax_fa.quantize(x, cache) for x in (k, v))
    wide = [reference.dequantize(x.values, x.scale) for x in (k, v)]
    out, lse = run_dense(q, k, v, {"causal": True})
    check(
        (out, lse),
        lambda rounded: reference.attention(q, *wide, causal=True, rounded=rounded),
        dtype,
    )
    others = np.setdiff1d(np.arange(400), ROWS)
    calm = q.at[:, ROWS].set(q[:, 1:2])
    same_bits_of(others, (out, lse), run_dense(calm, k, v, {"causal": True}))


@pytest.mark.parametrize("names", [(), ("causal",), ("causal", "dropout")], ids=str)
@pytest.mark.parametrize("cache", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_that_climb(head_dim, dtype, cache, names, rng):
    """From the last keys to the first, by up to 11 nats every 100 keys."""
    if cache and "dropout" in names:
        pytest.skip("dropout takes no quantized keys")
    length = 896
    shape = cases.Shape(1, length, length, 2, 2, head_dim)
    options = cases.options_of(names, rng, shape)
    q, k, v = (np.array(x, np.float32) for x in cases.qkv(rng, shape, jnp.float32))
    direction = np.sign(rng.standard_normal(head_dim)).astype(np.float32)
    for x in (q, k):
        x -= (x @ direction)[..., None] * direction / head_dim
    k += ((length - np.arange(length)) // 100)[:, None, None] * direction
    rise = rng.choice([0, 1, 5, 11], length) / head_dim**0.5
    q += rise[:, None, None].astype(np.float32) * direction
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    wide = [k, v]
    if cache:
        k, v = (jax_fa.quantize(x, cache) for x in (k, v))
        wide = [reference.dequantize(x.values, x.scale) for x in (k, v)]
    out, lse = run_dense(q, k, v, options)
    expected = cases.oracle_options(options, shape.batch)
    check(
        (out, lse),
        lambda rounded: reference.attention(q, *wide, rounded=rounded, **expected),
        dtype,
    )
    others = np.flatnonzero(rise == 0)
    calm = jnp.where((rise == 0)[:, None, None], q, q[:, others[:1]])
    same_bits_of(others, (out, lse), run_dense(calm, k, v, options))


@pytest.mark.parametrize("cache", [None, "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_small_weights_beside_a_large_one(dtype, cache, rng):
    """The last key has e^12 times the weight of each of 65535 others, which come to 0.4 of it."""
    keys, head_dim = 65536, 128
    q = jnp.full((1, 70, 1, head_dim), 1, dtype)
    k = jnp.zeros((1, keys, 1, head_dim), dtype).at[:, -1].set(1)
    v = jnp.asarray(rng.standard_normal((1, keys, 1, head_dim)) + 1, dtype)
    if cache:
        k, v = (jax_fa.quantize(x, cache) for x in (k, v))
    out, _ = run_dense(q, k, v, {"scale": 12 / head_dim})
    wide = np.asarray(reference.dequantize(v.values, v.scale) if cache else v, np.float64)[0, :, 0]
    peak = np.exp(12)
    expected = (peak * wide[-1] + wide[:-1].sum(0)) / (peak + keys - 1)
    np.testing.assert_allclose(
        np.asarray(out, np.float64)[0, :, 0], expected + np.zeros((70, 1)), atol=0.02
    )


@pytest.mark.parametrize("names", [(), ("causal",), ("causal", "softcap")], ids=str)
@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("float16", 128), ("bfloat16", 256)])
def test_first_keys_with_the_largest_scores_of_many_tiles(dtype, head_dim, names, rng):
    shape = cases.Shape(8, 2048, 2048, 16, 4, head_dim)
    options = cases.options_of(names, rng, shape)
    if "softcap" in names:
        options["softcap"] = 100.0
    rows = rng.choice(2048, 20, replace=False)
    q, k, v = _with_a_sink(rng, shape, dtype, 90.0, rows)
    q = jnp.where((np.arange(8) % 3 == 0)[:, None, None, None], q, -q)  # only in some batch rows
    whole = run_dense(q, k, v, options)
    same_bits(run_dense(q, k, v, options), whole)
    for b in (0, 1, 7):
        row = run_dense(q[b : b + 1], k[b : b + 1], v[b : b + 1], options)
        same_bits(row, jax.tree.map(lambda x, b=b: x[b : b + 1], whole))
    for b, t in ((0, int(rows[0])), (3, int(rows[1])), (1, 1000)):
        seen = t + 1 if "causal" in names else 2048
        query, keys = np.s_[b : b + 1, t : t + 1], np.s_[b : b + 1, :seen]
        check(
            (whole[0][query], whole[1][b : b + 1, :, t : t + 1]),
            lambda rounded, query=query, keys=keys: reference.attention(
                q[query], k[keys], v[keys], softcap=options.get("softcap"), rounded=rounded
            ),
            dtype,
            3 if "softcap" in names else 2,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_query_that_is_nan_stays_alone(head_dim, dtype, rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 300, 300, 2, 2, head_dim), jnp.dtype(dtype))
    out, lse = run_dense(q.at[:, 70, :, 3].set(jnp.nan), k, v, {"causal": True})
    assert jnp.isnan(out[:, 70]).all() and jnp.isnan(lse[:, :, 70]).all()
    others = np.delete(np.arange(300), 70)
    clean = run_dense(q, k, v, {"causal": True})
    same_bits((out[:, others], lse[:, :, others]), (clean[0][:, others], clean[1][:, :, others]))
