"""The kernels against the float64 oracle (`pytest -m gpu`).

An output may be off by twice as much as the naive computation in the input's dtype (three times
with softcap, whose tanh is approximate), plus an atol of that dtype; where nan and inf sit comes
first.
"""

import dataclasses
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_fa

pytestmark = pytest.mark.gpu

ATOL = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 2e-4}
DTYPES = ["bfloat16", "float16", "float32"]
HEAD_DIMS = [40, 64, 72, 80, 96, 128, 160, 192, 256]


def check(actual, oracle, dtype, factor=2):
    """oracle(rounded) gives o and lse; actual are those of a kernel."""
    (out, lse), (ref, ref_lse), (low, low_lse) = actual, oracle(None), oracle(jnp.dtype(dtype))
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    for name, x, y, z, atol in (
        ("out", out, ref, low, ATOL[dtype]),
        ("lse", lse, ref_lse, low_lse, 1e-3 if dtype == "float32" else 1e-4),
    ):
        seen = np.isfinite(y)
        error = np.abs(np.where(seen, z, 0) - np.where(seen, y, 0))
        reference.assert_close(x, y, factor * error.max(initial=0) + atol, name)
        mean = np.abs(np.where(seen, reference.as_float64(x), 0) - np.where(seen, y, 0)).mean()
        assert mean <= factor * error.mean() + atol / 2, f"{name}: mean error {mean:.3g}"


def same_bits(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def run_dense(q, k, v, options):
    arrays, static = cases.split_options(options)

    @jax.jit
    def call(q, k, v, arrays):
        return jax_fa.flash_attention(q, k, v, return_lse=True, **arrays, **static)

    return call(q, k, v, arrays)


def check_dense(shape, dtype, options, rng):
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    check(
        run_dense(q, k, v, options),
        lambda rounded: reference.attention(q, k, v, rounded=rounded, **options),
        dtype,
        3 if "softcap" in options else 2,
    )


# --- dense ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype, causal, rng):
    check_dense(cases.Shape(1, 113, 217, 4, 2, head_dim), dtype, {"causal": causal}, rng)


FEATURES = [name for name in cases.FEATURES if name != "dropout"]
PAIRS = [*((name,) for name in FEATURES), *itertools.combinations(FEATURES, 2)]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_features(names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, 64)
    check_dense(shape, "bfloat16", cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize(
    "names",
    [("causal", "softcap"), ("bias", "sinks"), ("window", "alibi", "kv_lengths")],
    ids="-".join,
)
@pytest.mark.parametrize("dtype, head_dim", [("float16", 128), ("float32", 96), ("bfloat16", 256)])
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_past_lengths(dtype, rng):
    shape = cases.Shape(3, 97, 139, 4, 2, 64)
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    options = {
        "q_lengths": jnp.array([70, 97, 0], jnp.int32),
        "kv_lengths": jnp.array([33, 0, 130], jnp.int32),
        "causal": True, "sinks": cases.normal(rng, 4),
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


QUANTIZED = [
    ("int8", "head", None), ("int8", "token", None), ("int8", "group", 32),
    ("int8", "tensor", None),
    ("float8_e4m3fn", "head", None), ("float8_e4m3fn", None, None), ("float8_e5m2", "token", None),
    ("float8_e5m2", "group", 16),
]  # fmt: skip


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


# --- varlen ---

LENGTHS_Q, LENGTHS_K = [0, 70, 1, 0, 129, 5], [3, 70, 200, 0, 131, 0]


@pytest.mark.parametrize(
    "names",
    [(), ("causal",), ("causal", "sinks"), ("window", "softcap"), ("causal", "alibi")],
    ids=str,
)
@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("float16", 128), ("float32", 72)])
def test_varlen(dtype, head_dim, names, rng):
    shape = cases.Shape(6, 129, 200, 4, 2, head_dim)
    options = cases.options_of(names, rng, shape)
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
        lambda rounded: reference.varlen(q, k, v, cu_q, cu_k, rounded=rounded, **options),
        dtype, 3 if "softcap" in names else 2,
    )  # fmt: skip
    poisoned = (q.at[205:].set(jnp.nan), *(x.at[404:].set(jnp.nan) for x in (k, v)))
    same_bits(call(*poisoned), actual)


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


# --- caches ---


def filled(
    rng, kind, batch, length, heads, dim, dtype, granularity="head", size=None, page=16, layers=None
):
    """k and v of a cache, the same in float64, and maps; pages are permuted."""
    lead = () if layers is None else (layers,)
    if kind == "contiguous":
        shape, maps = (*lead, batch, length, heads, dim), {}
    else:
        pages = -(-length // page)
        order = rng.permutation(batch * pages + 3)[: batch * pages].reshape(batch, pages)
        shape = (*lead, batch * pages + 3, page, heads, dim)
        maps = {"page_table": jnp.asarray(order, jnp.int32)}
    k, v = (cases.normal(rng, *shape) for _ in "kv")
    if dtype in DTYPES:
        k, v = (x.astype(dtype) for x in (k, v))
        wide = [reference.as_float64(x) for x in (k, v)]
    else:
        k, v = (jax_fa.quantize(x, dtype, granularity, size) for x in (k, v))
        wide = [reference.dequantize(x.values, x.scale) for x in (k, v)]
    if layers is not None:
        maps["layer"] = jnp.int32(layers - 1)
    return (k, v), wide, maps


def check_decode(q, cache, wide, lengths, maps, dtype, **options):
    @jax.jit
    def call(q, cache, lengths, maps):
        return jax_fa.decode_attention(q, *cache, lengths, return_lse=True, **maps, **options)

    actual = call(q, cache, lengths, maps)
    check(
        actual,
        lambda rounded: reference.decode(
            q, *wide, np.asarray(lengths), rounded=rounded, **maps, **options
        ),
        dtype, 3 if "softcap" in options else 2,
    )  # fmt: skip
    return call, actual


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_decode_head_dims(head_dim, dtype, kind, rng):
    cache, wide, maps = filled(rng, kind, 3, 350, 2, head_dim, dtype)
    q = cases.normal(rng, 3, 1, 8, head_dim, dtype=jnp.dtype(dtype))
    check_decode(q, cache, wide, jnp.array([350, 0, 129], jnp.int32), maps, dtype)


@pytest.mark.parametrize("len_q", [1, 3, 16])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_decode_tokens_and_groups(len_q, group, rng):
    cache, wide, maps = filled(rng, "contiguous", 2, 239, 2, 64, "bfloat16")
    q = cases.normal(rng, 2, len_q, 2 * group, 64, dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([239, 7], jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("feature", cases.DECODE_FEATURES)
def test_decode_features(feature, kind, rng):
    cache, wide, maps = filled(rng, kind, 3, 217, 2, 64, "bfloat16", page=8)
    q = cases.normal(rng, 3, 2, 8, 64, dtype=jnp.bfloat16)
    options = cases.options_of((feature,), rng, cases.Shape(3, 2, 217, 8, 2, 64))
    check_decode(q, cache, wide, jnp.array([217, 1, 63], jnp.int32), maps, "bfloat16", **options)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype, granularity, size", QUANTIZED)
def test_decode_quantized(dtype, granularity, size, kind, rng):
    for head_dim, q_dtype in ((64, "bfloat16"), (128, "float16")):
        cache, wide, maps = filled(rng, kind, 2, 300, 2, head_dim, dtype, granularity, size)
        q = cases.normal(rng, 2, 1, 8, head_dim, dtype=jnp.dtype(q_dtype))
        check_decode(q, cache, wide, jnp.array([300, 65], jnp.int32), maps, q_dtype)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decode_of_a_long_row_is_split_and_deterministic(kind, dtype, rng):
    cache, wide, maps = filled(rng, kind, 1, 20011, 2, 64, dtype, page=64)
    q = cases.normal(rng, 1, 1, 8, 64, dtype=jnp.bfloat16)
    lengths = jnp.array([20011], jnp.int32)
    call, actual = check_decode(q, cache, wide, lengths, maps, "bfloat16")
    for _ in range(3):
        same_bits(call(q, cache, lengths, maps), actual)


@pytest.mark.parametrize("page", [1, 8, 16, 128])
def test_decode_page_sizes(page, rng):
    cache, wide, maps = filled(rng, "paged", 2, 300, 2, 64, "bfloat16", page=page)
    q = cases.normal(rng, 2, 1, 8, 64, dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([300, 65], jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_decode_layers(kind, rng):
    for dtype in ("bfloat16", "int8"):
        cache, wide, maps = filled(rng, kind, 2, 139, 2, 64, dtype, layers=3)
        q = cases.normal(rng, 2, 1, 8, 64, dtype=jnp.bfloat16)
        check_decode(q, cache, wide, jnp.array([139, 65], jnp.int32), maps, "bfloat16")


def test_decode_batch_index(rng):
    cache, wide, _ = filled(rng, "contiguous", 4, 139, 2, 64, "bfloat16")
    maps = {"batch_index": jnp.array([3, 0, 3], jnp.int32)}
    q = cases.normal(rng, 3, 1, 8, 64, dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([139, 65, 2], jnp.int32), maps, "bfloat16")


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_decode_and_hybrid_poison(kind, dtype, rng):
    lengths = np.array([139, 0, 70], np.int32)
    cache, _, maps = filled(rng, kind, 3, 144, 2, 64, dtype)
    q = cases.normal(rng, 3, 1, 8, 64, dtype=jnp.bfloat16)
    cu, packed = cases.cu_seqlens([30, 0, 1]), cases.normal(rng, 40, 8, 64, dtype=jnp.bfloat16)

    @jax.jit
    def call(q, packed, cache, maps):
        return (
            jax_fa.decode_attention(q, *cache, lengths, return_lse=True, **maps),
            jax_fa.hybrid_attention(packed, *cache, cu, lengths, return_lse=True, **maps),
        )

    live = np.zeros(cache[0].shape[:2], bool)
    table = np.asarray(maps.get("page_table", np.zeros((3, 0), np.int32))).copy()
    for b, n in enumerate(lengths):
        for j in range(n):
            live[(table[b, j // 16], j % 16) if kind == "paged" else (b, j)] = True
        table[b, -(-n // 16) :] = [1 << 30, -1, -(1 << 31)][b]

    def poison(x):
        if isinstance(x, jax_fa.QuantizedArray):
            scale = jnp.where(live[:, None, :, None], x.scale, jnp.nan)
            bits = jnp.where(
                live[..., None, None], jax.lax.bitcast_convert_type(x.values, jnp.int8), -1
            )
            return jax_fa.QuantizedArray(jax.lax.bitcast_convert_type(bits, x.values.dtype), scale)
        return jnp.where(live[..., None, None], x, jnp.nan)

    dirty_maps = {"page_table": jnp.asarray(table)} if kind == "paged" else {}
    dirty = call(q, packed.at[31:].set(jnp.nan), tuple(map(poison, cache)), dirty_maps)
    same_bits(dirty, call(q, packed, cache, maps))


MIXES = [[1, 1, 1, 1], [70, 1, 0, 129], [0, 0, 200, 1], [8, 9, 2, 131]]


@pytest.mark.parametrize("lengths_q", MIXES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"])
def test_hybrid(dtype, kind, lengths_q, rng):
    cache, wide, maps = filled(rng, kind, 4, 240, 2, 64, dtype)
    lengths = jnp.array([100, 239, 201, 130], jnp.int32)
    q_dtype = dtype if dtype in DTYPES else "bfloat16"
    q = cases.normal(rng, sum(lengths_q) + 7, 8, 64, dtype=jnp.dtype(q_dtype))
    cu = cases.cu_seqlens(lengths_q)

    @jax.jit
    def call(q, cache, maps):
        return jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps)

    check(
        call(q, cache, maps),
        lambda rounded: reference.hybrid(
            q, *wide, cu, np.asarray(lengths), rounded=rounded, **maps
        ),
        q_dtype,
    )


@pytest.mark.parametrize("feature", [*cases.DECODE_FEATURES, "full"])
def test_hybrid_features(feature, rng):
    cache, wide, maps = filled(rng, "paged", 3, 217, 2, 128, "bfloat16", page=32)
    options = (
        {"causal": False}
        if feature == "full"
        else cases.options_of((feature,), rng, cases.Shape(3, 2, 217, 8, 2, 128))
    )
    cu, q = cases.cu_seqlens([1, 66, 3]), cases.normal(rng, 70, 8, 128, dtype=jnp.bfloat16)
    lengths = jnp.array([217, 100, 2], jnp.int32)
    actual = jax.jit(
        lambda q, cache: jax_fa.hybrid_attention(
            q, *cache, cu, lengths, return_lse=True, **maps, **options
        )
    )(q, cache)
    check(
        actual,
        lambda rounded: reference.hybrid(
            q, *wide, cu, np.asarray(lengths), rounded=rounded, **maps, **options
        ),
        "bfloat16", 3 if feature == "softcap" else 2,
    )  # fmt: skip


def random_mix(rng, batch, total, length):
    """cu_seqlens and lengths of a cache, of rows that are empty, decode, verify or prefill."""
    kinds = [np.zeros(batch, int), np.ones(batch, int), rng.integers(2, 40, batch),
             rng.integers(1, total, batch)]  # fmt: skip
    counts = np.choose(rng.integers(4, size=batch), kinds)
    ends = np.minimum(np.cumsum(counts), total)
    lengths = np.minimum(np.diff(ends, prepend=0) + rng.integers(0, length, batch), length)
    return cases.cu_seqlens(np.diff(ends, prepend=0)), lengths.astype(np.int32)


def run_hybrid(q, cache, cu, lengths, maps, **options):
    return jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps, **options)


@pytest.mark.parametrize("heads", [2, 6, 16, 40])
@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 16), ("paged", 3)])
def test_hybrid_of_random_mixes(kind, page, heads, rng):
    batch, total, length = 37, 300, 700
    cache, wide, maps = filled(rng, kind, batch, length, 2, 64, "bfloat16", page=page)
    q = cases.normal(rng, total, heads, 64, dtype=jnp.bfloat16)
    call = jax.jit(lambda *args: run_hybrid(*args))  # compiled for these shapes alone
    for _ in range(4):
        cu, lengths = random_mix(rng, batch, total, length)
        # a row that is longer than its cache sees nothing before its first keys
        check(
            call(q, cache, cu, lengths, maps),
            lambda rounded: reference.hybrid(q, *wide, cu, lengths, rounded=rounded, **maps),  # noqa: B023
            "bfloat16",
        )
    assert call._cache_size() == 1


@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 8), ("paged", 256)])
def test_hybrid_layers_and_page_sizes(kind, page, rng):
    cache, wide, maps = filled(rng, kind, 3, 300, 2, 128, "bfloat16", page=page, layers=3)
    q = cases.normal(rng, 230, 8, 128, dtype=jnp.bfloat16)
    cu, lengths = cases.cu_seqlens([150, 1, 70]), np.array([200, 300, 71], np.int32)
    check(
        jax.jit(run_hybrid)(q, cache, cu, lengths, maps),
        lambda rounded: reference.hybrid(q, *wide, cu, lengths, rounded=rounded, **maps),
        "bfloat16",
    )


@pytest.mark.parametrize(
    "kind, page, layers",
    [("paged", 16, 2), ("paged", 24, None), ("paged", 12, None), ("contiguous", 0, 3)],
)
@pytest.mark.parametrize("dtype, granularity, size", QUANTIZED)
def test_hybrid_over_quantized_keys(dtype, granularity, size, kind, page, layers, rng):
    cache, wide, maps = filled(
        rng, kind, 9, 500, 2, 128, dtype, granularity, size, page=page, layers=layers
    )
    q = cases.normal(rng, 300, 8, 128, dtype=jnp.float16)
    cu, lengths = random_mix(rng, 9, 300, 500)
    check(
        jax.jit(run_hybrid)(q, cache, cu, lengths, maps),
        lambda rounded: reference.hybrid(q, *wide, cu, lengths, rounded=rounded, **maps),
        "float16",
    )


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 3, 64]], ids=str)
def test_hybrid_of_long_rows_is_split_and_deterministic(counts, rng):
    cache, wide, maps = filled(rng, "paged", 3, 20011, 2, 128, "bfloat16")
    q = cases.normal(rng, sum(counts), 8, 128, dtype=jnp.bfloat16)
    cu, lengths = cases.cu_seqlens(counts), np.array([20011, 17, 9000], np.int32)
    call = jax.jit(run_hybrid)
    first = call(q, cache, cu, lengths, maps)
    check(
        first,
        lambda rounded: reference.hybrid(q, *wide, cu, lengths, rounded=rounded, **maps),
        "bfloat16",
    )
    same_bits(call(q, cache, cu, lengths, maps), first)
    order = np.array([2, 0, 1])
    tokens = np.concatenate([np.arange(cu[b], cu[b + 1]) for b in order])
    again = call(
        q[tokens], cache, cases.cu_seqlens(np.array(counts)[order]), lengths[order],
        {"page_table": maps["page_table"][order]},
    )  # fmt: skip
    same_bits(again, (first[0][tokens], first[1][:, tokens]))


def test_hybrid_with_a_split_size_has_the_bits_of_any_batch(rng):
    cache, _, maps = filled(rng, "contiguous", 4, 5000, 2, 64, "bfloat16")
    q = cases.normal(rng, 40, 8, 64, dtype=jnp.bfloat16)
    call = jax.jit(lambda q, cu, n: run_hybrid(q, cache, cu, n, maps, split_size=256))
    lengths = np.array([4711, 5000, 30, 999], np.int32)
    whole = call(q, cases.cu_seqlens([1, 2, 20, 1]), lengths)
    for others in ([1, 0, 0, 0], [1, 2, 30, 7]):
        part = call(q, cases.cu_seqlens(others), np.array([4711, 5000, 200, 7], np.int32))
        same_bits((part[0][:1], part[1][:, :1]), (whole[0][:1], whole[1][:, :1]))


# --- append ---


def new_cache(kind, layers, dtype, granularity, size, heads=2):
    scales = {"k_scale": 0.03, "v_scale": 0.02} if granularity == "tensor" else {}
    options = {
        "layers": layers,
        "dtype": dtype,
        "granularity": granularity,
        "group_size": size,
    } | scales
    if kind == "contiguous":
        return jax_fa.KVCache.create(3, 48, heads, 64, **options)
    cache = jax_fa.PagedKVCache.create(11, 16, 3, 3, heads, 64, **options)
    table = jnp.array([[4, 0, 9], [2, -1, 1], [10, 3, 11]], jnp.int32)
    return dataclasses.replace(cache, page_table=table)


STORED = [*((d, None, None) for d in DTYPES), *QUANTIZED]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype, granularity, size", STORED)
def test_append_equals_the_reference(dtype, granularity, size, kind, rng):
    cos, sin = (cases.normal(rng, 64, 16) for _ in "cs")
    for layers, form, rotary in (
        (None, "all", None),
        (2, "counts", (cos, sin)),
        (None, "packed", (cos, sin)),
    ):
        cache = new_cache(kind, layers, dtype, granularity, size)
        cache = dataclasses.replace(
            cache, lengths=jnp.array([40, 0, 13], jnp.int32)
        )  # row 0 overflows
        k, v = (cases.normal(rng, 3, 17, 2, 64, dtype=jnp.bfloat16) for _ in "kv")
        options = {"counts": jnp.array([17, 3, 0], jnp.int32)} if form == "counts" else {}
        if form == "packed":
            k, v = (x.reshape(51, 2, 64) for x in (k, v))
            options = {"cu_seqlens": jnp.array([0, 20, 20, 45], jnp.int32)}

        def append(implementation):
            @jax.jit
            def call(cache, k, v):
                return cache.append(
                    k, v, layer=None if layers is None else 1, rotary=rotary,  # noqa: B023
                    implementation=implementation, interleaved=form == "packed", **options,  # noqa: B023
                )  # fmt: skip

            return call(cache, k, v)  # noqa: B023

        kernel, expected = append(None), append("reference")
        same_bits(kernel.lengths, expected.lengths)
        if rotary is None:
            same_bits((kernel.k, kernel.v), (expected.k, expected.v))
            continue
        same_bits(kernel.v, expected.v)
        for x, y in zip(jax.tree.leaves(kernel.k), jax.tree.leaves(expected.k)):
            x, y = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
            # rotary may round differently: a step of bfloat16, then of the cache's dtype
            differ = x != y
            assert differ.mean() < 0.02
            np.testing.assert_allclose(x, y, rtol=0.13, atol=1 if dtype == "int8" else 0.02)


def moves(hlo, shapes):
    import re

    found = []
    for shape in shapes:
        pattern = rf"= \w+\[{','.join(map(str, shape))}\]\S* (copy|convert|transpose|copy-start)\("
        found += [line.strip()[:160] for line in hlo.splitlines() if re.search(pattern, line)]
    return found


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", [*DTYPES, "int8", "float8_e4m3fn", "float8_e5m2"])
def test_append_in_place(dtype, kind, layers, heads, rng):
    cache = new_cache(kind, layers, dtype, "head", None, heads)
    new = cases.normal(rng, 3, 1, heads, 64, dtype=jnp.bfloat16)

    def append(cache, new, layer):
        return cache.append(new, new, layer=None if layers is None else layer)

    compiled = jax.jit(append, donate_argnums=0).lower(cache, new, jnp.int32(0)).compile()
    arrays = jax.tree.leaves((cache.k, cache.v))
    shapes = {x.shape for x in arrays} | {
        (x.shape[0] * x.shape[1], *x.shape[2:]) for x in arrays if x.ndim == 5
    }
    assert not moves(compiled.as_text(), shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < sum(x.nbytes for x in arrays) / 4
    # without donation the caller's arrays stay
    before = [np.array(x) for x in arrays]
    jax.jit(append)(cache, new, jnp.int32(0))
    for x, y in zip(arrays, before):
        assert np.asarray(x).tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_scan_carries_a_stacked_cache_in_place(dtype, rng):
    cache = jax_fa.KVCache.create(2, 256, 2, 64, layers=3, dtype=dtype)
    q, new = (cases.normal(rng, 2, n, 64, dtype=jnp.bfloat16) for n in (8, 2))

    def step(cache, q):
        def layer(carry, i):
            cache, q = carry
            cache = cache.append(new[:, None], new[:, None], layer=i)
            q = jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths + 1, layer=i)
            return (cache, q), None

        (cache, q), _ = jax.lax.scan(layer, (cache, q), jnp.arange(3, dtype=jnp.int32))
        return cache.advance(1), q

    compiled = jax.jit(step, donate_argnums=0).lower(cache, q).compile()
    shapes = {x.shape for x in jax.tree.leaves((cache.k, cache.v))}
    assert not moves(compiled.as_text(), shapes | {(x[0] * x[1], *x[2:]) for x in shapes})
    cache, out = compiled(cache, q)
    same_bits(out, jnp.repeat(new.astype(jnp.bfloat16), 4, 1)) if dtype == "bfloat16" else None


# --- order, transforms, gradients ---


def test_reruns_and_batch_permutations_have_the_same_bits(rng):
    q, k, v = cases.qkv(rng, cases.Shape(5, 239, 217, 8, 2, 128), jnp.bfloat16)
    order = np.array([3, 1, 4, 0, 2])
    first = run_dense(q, k, v, {"causal": True})
    same_bits(run_dense(q, k, v, {"causal": True}), first)
    again = run_dense(q[order], k[order], v[order], {"causal": True})
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
    with pytest.raises(NotImplementedError, match="head dim 36; kernels take multiples of 8"):
        jax_fa.flash_attention(q, q, q)
    jax_fa.flash_attention(q, q, q, implementation="reference")


# --- tiny cases of every kernel, for compute-sanitizer ---


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_sanitize_dense(head_dim, dtype, rng):
    shape = cases.Shape(2, 17, 35, 2, 1, head_dim)
    options = cases.options_of(
        ("causal", "softcap", "alibi", "sinks", "bias", "kv_lengths"), rng, shape
    )
    check_dense(shape, dtype, options, rng)


@pytest.mark.sanitize
def test_sanitize_varlen(rng):
    q, k = (cases.normal(rng, n, h, 64, dtype=jnp.bfloat16) for n, h in ((21, 2), (30, 1)))
    cu_q, cu_k = cases.cu_seqlens([5, 0, 12]), cases.cu_seqlens([7, 3, 15])
    actual = jax_fa.flash_attention_varlen(
        q, k, k, cu_q, cu_k, max_seqlen_q=12, max_seqlen_k=15, causal=True, return_lse=True
    )
    check(
        actual, lambda r: reference.varlen(q, k, k, cu_q, cu_k, causal=True, rounded=r), "bfloat16"
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
def test_sanitize_caches(dtype, kind, rng):
    q_dtype = dtype if dtype in DTYPES else "bfloat16"
    cache, wide, maps = filled(rng, kind, 2, 40, 1, 64, dtype)
    lengths = jnp.array([40, 5], jnp.int32)
    q = cases.normal(rng, 2, 2, 4, 64, dtype=jnp.dtype(q_dtype))
    check_decode(q, cache, wide, lengths, maps, q_dtype)
    cu = cases.cu_seqlens([1, 3])
    actual = jax_fa.hybrid_attention(
        q.reshape(4, 4, 64), *cache, cu, lengths, return_lse=True, **maps
    )
    check(
        actual,
        lambda r: reference.hybrid(
            q.reshape(4, 4, 64), *wide, cu, np.asarray(lengths), rounded=r, **maps
        ),
        q_dtype,
    )
    appended = new_cache(kind, None, dtype, "head", None)
    new = cases.normal(rng, 3, 2, 2, 64, dtype=jnp.dtype(q_dtype))
    tables = cases.normal(rng, 64, 16), cases.normal(rng, 64, 16)
    assert (appended.append(new, new, rotary=tables).lengths == 2).all()
