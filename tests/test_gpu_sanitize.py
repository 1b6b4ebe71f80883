"""Tiny cases of every forward kernel, for compute-sanitizer (`pytest -m sanitize`)."""

import cases
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import (
    DTYPES,
    check,
    check_decode,
    check_dense,
    check_hybrid,
    filled,
    new_cache,
    run_dense,
)

import jax_fa

pytestmark = pytest.mark.gpu


DENSE = [(dtype, (dim, dim)) for dtype in DTYPES for dim in (40, 64, 128, 256)]
DENSE += [("bfloat16", (192, 128)), ("bfloat16", (64, 128)), ("float16", (512, 512))]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype, dims", DENSE, ids=str)
def test_sanitize_dense(dtype, dims, rng):
    shape = cases.Shape(2, 17, 35, 2, 1, *dims)
    options = cases.options_of(
        ("causal", "softcap", "alibi", "sinks", "bias", "kv_lengths"), rng, shape
    )
    check_dense(shape, dtype, options, rng)
    check_dense(shape, dtype, cases.options_of(("causal", "dropout"), rng, shape), rng)
    check_dense(shape, dtype, {"causal": True}, rng)


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
    q = q.reshape(4, 4, 64)
    actual = jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps)
    check_hybrid(actual, q, wide, cu, lengths, maps)
    appended = new_cache(kind, None, dtype, "head", None)
    new = cases.normal(rng, 3, 2, 2, 64, dtype=jnp.dtype(q_dtype))
    tables = cases.normal(rng, 64, 16), cases.normal(rng, 64, 16)
    assert (appended.append(new, new, rotary=tables).lengths == 2).all()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "kind, dtype, granularity",
    [
        ("contiguous", "float8_e4m3fn", None), ("contiguous", "float8_e4m3fn", "head"),
        ("paged", "float8_e4m3fn", None), ("paged", "float8_e4m3fn", "head"),
        ("paged", "float8_e5m2", None), ("paged", "float8_e5m2", "head"),
        ("contiguous", "int8", "head"), ("paged", "int8", "token"),
    ],
)  # fmt: skip
def test_sanitize_prefill_over_8_bits(kind, dtype, granularity, rng):
    cache, wide, maps = filled(rng, kind, 2, 300, 1, 128, dtype, granularity)
    lengths, cu = np.array([300, 141], np.int32), cases.cu_seqlens([70, 20])
    q = cases.normal(rng, 90, 2, 128, dtype=jnp.bfloat16)
    actual = jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps)
    check_hybrid(actual, q, wide, cu, lengths, maps)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype, dim", [("int8", 128), ("float8_e4m3fn", 96), ("float8_e5m2", 64)])
def test_sanitize_copies_of_8_bits(dtype, dim, rng):
    shape = cases.Shape(2, 130, 301, 16, 2, dim)
    options = cases.options_of(("causal", "kv_lengths"), rng, shape)
    q, k, v = cases.qkv(rng, shape, jnp.bfloat16)
    k, v = jax_fa.quantize(k, dtype), jax_fa.quantize(v, dtype, "group", 16)
    wide = [reference.dequantize(x.values, x.scale) for x in (k, v)]
    check(
        run_dense(q, k, v, options),
        lambda rounded: reference.attention(q, *wide, rounded=rounded, **options),
        "bfloat16",
    )
