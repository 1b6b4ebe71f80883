"""Prefill over int8 and fp8 keys by the kernels against the float64 oracle (`pytest -m gpu`)."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import ATOL, LENGTHS_K, LENGTHS_Q, QUANTIZED, check, run_dense, same_bits

import jax_fa

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("q_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype, granularity, size", QUANTIZED)
def test_dense_over_quantized_keys(dtype, granularity, size, q_dtype, rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 65, 139, 4, 2, 64), jnp.dtype(q_dtype))
    kq, vq = (jax_fa.quantize(x, dtype, granularity, size) for x in (k, v))
    wide = [reference.dequantize(x.values, x.scale) for x in (kq, vq)]
    check(
        run_dense(q, kq, vq, {"causal": True}),
        lambda rounded: reference.attention(q, *wide, causal=True, rounded=rounded),
        q_dtype,
    )


PAIRS_OF_FORMATS = [
    (("int8", "head", None), ("float8_e4m3fn", None, None)),
    (("float8_e5m2", "head", None), ("int8", "group", 16)),
    (("float8_e4m3fn", "group", 32), ("float8_e4m3fn", "tensor", None)),
]


@pytest.mark.parametrize("formats", PAIRS_OF_FORMATS, ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize(
    "names",
    [
        (), ("causal",), ("window",), ("causal", "softcap"), ("causal", "alibi"),
        ("window", "alibi", "softcap", "sinks"), ("causal", "q_lengths", "kv_lengths", "sinks"),
        ("bias",),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("q_dtype, head_dim", [("bfloat16", 128), ("float16", 64)])
def test_features_over_quantized_keys(names, formats, q_dtype, head_dim, rng):
    shape = cases.Shape(3, 217, 439, 6, 2, head_dim)
    options = cases.options_of(names, rng, shape)
    q, k, v = cases.qkv(rng, shape, jnp.dtype(q_dtype))
    kq, vq = (jax_fa.quantize(x, *how) for x, how in zip((k, v), formats))
    wide = [reference.dequantize(x.values, x.scale) for x in (kq, vq)]
    check(
        run_dense(q, kq, vq, options),
        lambda rounded: reference.attention(q, *wide, rounded=rounded, **options),
        q_dtype, 3 if "softcap" in names else 2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("largest", [1e-3, 3e4])
def test_scales_of_any_size_over_quantized_keys(largest, dtype, rng):
    """Values near the ends of what float16 holds."""
    q, k, v = cases.qkv(rng, cases.Shape(2, 130, 260, 4, 2, 128), jnp.float16)
    wide_v = v.astype(jnp.float32)
    v = wide_v * (largest / jnp.abs(wide_v).max(-1, keepdims=True))
    kq, vq = (jax_fa.quantize(x, dtype) for x in (k, v))
    wide = [reference.dequantize(x.values, x.scale) for x in (kq, vq)]
    out, lse = run_dense(q, kq, vq, {"causal": True})
    oracle = lambda rounded: reference.attention(q, *wide, causal=True, rounded=rounded)  # noqa: E731
    (ref, ref_lse), (low, _) = oracle(None), oracle(jnp.dtype("float16"))
    atol = largest * ATOL["float16"]
    reference.assert_close(out, ref, 2 * np.abs(low - ref).max() + atol, "out")
    reference.assert_close(lse, ref_lse, 1e-2, "lse")


@pytest.mark.parametrize("names", [("causal",), ("window", "softcap", "sinks")], ids=str)
@pytest.mark.parametrize("dtype, granularity, size", [QUANTIZED[0], QUANTIZED[2], *QUANTIZED[4:7]])
@pytest.mark.parametrize("q_dtype, head_dim", [("bfloat16", 128), ("float16", 80)])
def test_varlen_over_quantized_keys(q_dtype, head_dim, dtype, granularity, size, names, rng):
    size = size and 16
    options = cases.options_of(names, rng, cases.Shape(6, 129, 200, 4, 2, head_dim))
    q = cases.normal(rng, 210, 4, head_dim, dtype=jnp.dtype(q_dtype))
    keys = (cases.normal(rng, 420, 2, head_dim, dtype=jnp.dtype(q_dtype)) for _ in "kv")
    k, v = (jax_fa.quantize(x, dtype, granularity, size) for x in keys)
    wide = [reference.dequantize(x.values, x.scale) for x in (k, v)]
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)
    actual = jax.jit(
        lambda q, k, v: jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=129, max_seqlen_k=200, return_lse=True, **options
        )
    )(q, k, v)
    check(
        actual,
        lambda rounded: reference.varlen(q, *wide, cu_q, cu_k, rounded=rounded, **options),
        q_dtype, 3 if "softcap" in names else 2,
    )  # fmt: skip


# --- keys that products take as they are stored: fp8, beside bfloat16 queries of 128 dims ---

VALUES = [
    ("float8_e4m3fn", None, None), ("float8_e4m3fn", "head", None), ("float8_e5m2", None, None),
    ("float8_e5m2", "head", None), ("int8", "token", None),
]  # fmt: skip


@pytest.mark.parametrize("v_format", VALUES, ids=str)
@pytest.mark.parametrize("k_granularity", [None, "head", "tensor"])
@pytest.mark.parametrize("k_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("head_dim", [112, 128])
def test_dense_over_keys_that_stay_bytes(head_dim, k_dtype, k_granularity, v_format, rng):
    shape = cases.Shape(3, 217, 439, 6, 2, head_dim)
    options = cases.options_of(("causal", "kv_lengths", "sinks"), rng, shape)
    q, k, v = cases.qkv(rng, shape, jnp.bfloat16)
    kq, vq = jax_fa.quantize(k, k_dtype, k_granularity), jax_fa.quantize(v, *v_format)
    if v_format[0] == "int8":
        values = vq.values.at[:, ::3, :, ::5].set(-128)
        vq = dataclasses.replace(vq, values=values)
    wide = [reference.dequantize(x.values, x.scale) for x in (kq, vq)]
    check(
        run_dense(q, kq, vq, options),
        lambda rounded: reference.attention(q, *wide, rounded=rounded, **options),
        "bfloat16",
    )


@pytest.mark.parametrize("exponent", [-100, -30, 60])
def test_queries_of_any_size(exponent, rng):
    """A power of two moves from queries to `scale` without a trace."""
    q, k, v = cases.qkv(rng, cases.Shape(1, 150, 300, 4, 2, 128), jnp.bfloat16)
    kq, vq = (jax_fa.quantize(x, "float8_e4m3fn") for x in (k, v))
    size = jnp.asarray(2.0**exponent, jnp.bfloat16)
    expected = run_dense(q, kq, vq, {"causal": True, "scale": 0.125})
    actual = run_dense(q * size, kq, vq, {"causal": True, "scale": 0.125 * 2.0**-exponent})
    same_bits(actual, expected)


def test_queries_that_are_zero_or_not_finite(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 150, 300, 4, 2, 128), jnp.bfloat16)
    kq, vq = (jax_fa.quantize(x, "float8_e4m3fn") for x in (k, v))
    wide = [reference.dequantize(x.values, x.scale) for x in (kq, vq)]
    zero = q.at[:, 40].set(0)
    check(
        run_dense(zero, kq, vq, {}),
        lambda rounded: reference.attention(zero, *wide, rounded=rounded),
        "bfloat16",
    )
    clean, lse = run_dense(q, kq, vq, {})
    bad = q.at[:, 3, 1, 17].set(jnp.nan).at[:, 70, 2, 90].set(jnp.inf)
    out, bad_lse = run_dense(bad, kq, vq, {})
    for row, head in ((3, 1), (70, 2)):
        assert np.isnan(np.asarray(out[:, row, head], np.float32)).all()
        assert np.isnan(bad_lse[:, head, row]).all()
        out, bad_lse = out.at[:, row, head].set(0), bad_lse.at[:, head, row].set(0)
        clean, lse = clean.at[:, row, head].set(0), lse.at[:, head, row].set(0)
    same_bits((out, bad_lse), (clean, lse))


def test_a_query_that_sees_no_key_and_is_not_finite(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 150, 70, 4, 2, 128), jnp.bfloat16)
    kq, vq = (jax_fa.quantize(x, "float8_e4m3fn") for x in (k, v))
    clean = run_dense(q, kq, vq, {"causal": True})
    bad = q.at[:, 3, 1, 17].set(jnp.nan).at[:, 40, 2, 90].set(jnp.inf)  # keys begin at query 80
    same_bits(run_dense(bad, kq, vq, {"causal": True}), clean)


# --- many queries, which read a copy in their own dtype ---

ALL_KEYS = {"window": (2**31 - 1, None)}


@pytest.mark.parametrize(
    "names",
    [(), ("causal", "kv_lengths"), ("window",), ("window", "q_lengths", "kv_lengths", "sinks")],
    ids=str,
)
@pytest.mark.parametrize(
    "q_dtype, head_dim",
    [("bfloat16", 128), ("float16", 72), ("float16", 96), ("bfloat16", 240)],
)
@pytest.mark.parametrize(
    "dtype, granularity, size", [x for x in QUANTIZED if x[1] != "group"] + [("int8", "group", 8)]
)
def test_many_queries_over_quantized_keys(dtype, granularity, size, q_dtype, head_dim, names, rng):
    shape = cases.Shape(2, 520, 1100, 16, 2, head_dim)
    options = cases.options_of(names, rng, shape)
    q, k, v = cases.qkv(rng, shape, jnp.dtype(q_dtype))
    if "kv_lengths" in names:
        past = (
            np.arange(1100)[:, None, None] >= np.asarray(options["kv_lengths"])[:, None, None, None]
        )
        k, v = (jnp.where(past, jnp.nan, x) for x in (k, v))
    kq, vq = (jax_fa.quantize(x, dtype, granularity, size) for x in (k, v))
    wide = [x.dequantize(q_dtype) for x in (kq, vq)]
    # A window, of all keys too, means the tiles of keys that most copies are read in.
    same = options or (ALL_KEYS if size != 8 else {})
    same_bits(run_dense(q, kq, vq, options), run_dense(q, *wide, same))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "window, lengths",
    [((2**31 - 1, None), [700, 3]), ((60, 0), [9000, 690]), ((0, 2**31 - 1), [1, 0])],
)
def test_copies_where_windows_and_lengths_are_past_all_keys(window, lengths, head_dim, rng):
    shape = cases.Shape(2, 700, 700, 16, 2, head_dim)
    q, k, v = cases.qkv(rng, shape, jnp.bfloat16)
    kq, vq = jax_fa.quantize(k, "int8"), jax_fa.quantize(v, "int8")
    options = {"window": window, "kv_lengths": jnp.asarray(lengths, jnp.int32)}
    wide = [x.dequantize(jnp.bfloat16) for x in (kq, vq)]
    same_bits(run_dense(q, kq, vq, options), run_dense(q, *wide, options))


def test_copies_of_many_rows_and_odd_shapes(rng):
    """Rows that see nothing, heads that fill no last unit, keys and values of different kinds."""
    shape = cases.Shape(34, 264, 330, 24, 3, 128, 80)
    q, k, v = cases.qkv(rng, shape, jnp.bfloat16)
    kq, vq = jax_fa.quantize(k, "int8", "group", 16), jax_fa.quantize(v, "float8_e4m3fn", "token")
    lengths = rng.integers(0, 331, (2, 34))
    lengths[:, ::7] = 0
    options = {"window": (200, 3), "q_lengths": lengths[0], "kv_lengths": lengths[1]}
    options |= {name: jnp.asarray(options[name], jnp.int32) for name in options if name != "window"}
    wide = [x.dequantize(jnp.bfloat16) for x in (kq, vq)]
    same_bits(run_dense(q, kq, vq, options), run_dense(q, *wide, options))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_copies_that_batches_of_queries_share(head_dim, rng):
    """Two arrays of queries on one of keys, as vmap over queries alone has them."""
    q, k, v = cases.qkv(rng, cases.Shape(2, 300, 700, 16, 2, head_dim), jnp.bfloat16)
    queries = jnp.stack([q, -q])
    kq, vq = jax_fa.quantize(k, "int8"), jax_fa.quantize(v, "float8_e4m3fn", "group", 16)
    lengths = jnp.asarray([[700, 3], [20, 512]], jnp.int32)

    def call(q, lengths, k, v):
        return jax_fa.flash_attention(q, k, v, kv_lengths=lengths, return_lse=True, **ALL_KEYS)

    wide = [x.dequantize(jnp.bfloat16) for x in (kq, vq)]
    mapped = jax.jit(jax.vmap(call, (0, 0, None, None)))
    same_bits(mapped(queries, lengths, kq, vq), mapped(queries, lengths, *wide))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_scales_of_values_that_leap(dtype, rng):
    """Queries that see values of one size alone are as exact as if all were of that size."""
    steps = np.repeat(np.array([0, -20, 15, -40, 70, -8, 90]), 128)
    length = len(steps)
    q, k, v = cases.qkv(rng, cases.Shape(1, length, length, 2, 2, 128), jnp.bfloat16)
    kq, vq = jax_fa.quantize(k, "float8_e4m3fn"), jax_fa.quantize(v, dtype)
    wide = [reference.dequantize(x.values, x.scale) for x in (kq, vq)]
    factors = (2.0 ** steps[None, None, :, None]).astype(np.float32)
    leaping = dataclasses.replace(vq, scale=vq.scale * factors)
    options = {"window": (31, 0)}
    out, lse = run_dense(q, kq, leaping, options)
    out = reference.as_float64(out) * 2.0 ** -steps[None, :, None, None]
    alone = np.arange(length) % 128 >= 31
    (ref, ref_lse), (low, _) = (
        reference.attention(q, *wide, rounded=rounded, **options)
        for rounded in (None, jnp.dtype("bfloat16"))
    )
    ref, low = ref[:, alone], low[:, alone]
    tolerance = 2 * np.abs(low - ref).max() + ATOL["bfloat16"]
    reference.assert_close(out[:, alone], ref, tolerance, "out")
    reference.assert_close(lse, ref_lse, 1e-2, "lse")
