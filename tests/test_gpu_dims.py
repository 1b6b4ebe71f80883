"""Values of another head dim than keys, and heads past 256, by the kernels against the float64
oracle (`pytest -m gpu`); their gradients are in test_gpu_gradients.py."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import (
    DTYPES,
    LENGTHS_K,
    LENGTHS_Q,
    check,
    check_decode,
    check_dense,
    check_hybrid,
    filled,
    run_dense,
    same_bits,
)

import jax_fa

pytestmark = pytest.mark.gpu

DIMS = [(64, 128), (128, 64), (40, 72), (192, 128), (160, 72), (256, 96)]
WIDE = [(512, 512), (320, 320), (512, 64), (64, 264)]  # no float32 kernels
TYPED = [(dtype, dims) for dims in DIMS for dtype in DTYPES]
TYPED += [(dtype, dims) for dims in WIDE for dtype in DTYPES[:2]]
SOME = [(64, 128), (192, 128), (512, 512)]


def of_dims(values):
    return pytest.mark.parametrize("dims", values, ids=str)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, dims", TYPED, ids=str)
def test_prefill(dtype, dims, causal, rng):
    check_dense(cases.Shape(2, 239, 517, 4, 2, *dims), dtype, {"causal": causal}, rng)


@pytest.mark.parametrize(
    "names",
    [
        ("causal", "softcap"), ("bias", "sinks"), ("window", "alibi", "kv_lengths"),
        ("scale", "causal", "q_lengths", "kv_lengths", "sinks"), ("window", "softcap", "alibi"),
        ("causal", "dropout"),
    ],
    ids="-".join,
)  # fmt: skip
@of_dims([*SOME, (128, 64), (160, 72), (320, 128)])
def test_prefill_features(dims, names, rng):
    shape = cases.Shape(3, 213, 339, 6, 2, *dims)
    check_dense(shape, "bfloat16", cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("len_q, len_kv", [(1, 1), (3, 1), (63, 65), (1, 799), (129, 1023)])
@of_dims([(192, 128), (512, 512)])
def test_prefill_sizes(dims, len_q, len_kv, rng):
    shape = cases.Shape(2, len_q, len_kv, 8, 1, *dims)
    check_dense(shape, "bfloat16", {"causal": True, "window": (300, None)}, rng)


@of_dims(SOME)
def test_prefill_poison_past_lengths_and_reruns(dims, rng):
    q, k, v = cases.qkv(rng, cases.Shape(3, 197, 239, 4, 2, *dims), jnp.bfloat16)
    options = {
        "q_lengths": jnp.array([170, 197, 0], jnp.int32),
        "kv_lengths": jnp.array([33, 0, 230], jnp.int32),
        "causal": True, "sinks": cases.normal(rng, 4),
    }  # fmt: skip
    clean = run_dense(q, k, v, options)
    same_bits(run_dense(q, k, v, options), clean)
    past_q = jnp.arange(197)[None] >= options["q_lengths"][:, None]
    past_k = jnp.arange(239)[None] >= options["kv_lengths"][:, None]
    q = jnp.where(past_q[..., None, None], jnp.nan, q)
    k, v = (jnp.where(past_k[..., None, None], jnp.nan, x) for x in (k, v))
    same_bits(run_dense(q, k, v, options), clean)


@pytest.mark.parametrize("names", [("causal",), ("window", "softcap", "sinks")], ids="-".join)
@of_dims([*SOME, (40, 72)])
def test_varlen(dims, names, rng):
    options = cases.options_of(names, rng, cases.Shape(6, 129, 200, 4, 2, *dims))
    q = cases.normal(rng, 210, 4, dims[0], dtype=jnp.bfloat16)
    k, v = (cases.normal(rng, 420, 2, dim, dtype=jnp.bfloat16) for dim in dims)
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)
    call = jax.jit(
        lambda q, k, v: jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=129, max_seqlen_k=200, return_lse=True, **options
        )
    )
    check(
        call(q, k, v),
        lambda rounded: reference.varlen(q, k, v, cu_q, cu_k, rounded=rounded, **options),
        "bfloat16", 3 if "softcap" in names else 2,
    )  # fmt: skip


@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 16), ("paged", 3)])
@pytest.mark.parametrize("len_q", [1, 5, 70])
@of_dims([*DIMS, (512, 512), (320, 64)])
def test_decode(dims, len_q, kind, page, rng):
    cache, wide, maps = filled(rng, kind, 3, 350, 2, dims[0], "bfloat16", page=page, dim_v=dims[1])
    q = cases.normal(rng, 3, len_q, 8, dims[0], dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([350, 0, 129], jnp.int32), maps, "bfloat16")


@of_dims([(128, 64), (64, 128), (192, 128)])
def test_decode_of_a_long_row_is_split_and_deterministic(dims, rng):
    cache, wide, maps = filled(rng, "paged", 1, 20011, 2, dims[0], "bfloat16", dim_v=dims[1])
    q = cases.normal(rng, 1, 1, 8, dims[0], dtype=jnp.bfloat16)
    lengths = jnp.array([20011], jnp.int32)
    call, actual = check_decode(q, cache, wide, lengths, maps, "bfloat16")
    same_bits(call(q, cache, lengths, maps), actual)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind, page", [("contiguous", 0), ("paged", 16)])
@of_dims([(64, 128), (128, 64), (192, 128), (512, 512)])
def test_hybrid(dims, kind, page, dtype, rng):
    cache, wide, maps = filled(rng, kind, 4, 3000, 2, dims[0], dtype, page=page, dim_v=dims[1])
    lengths = np.array([100, 2999, 201, 130], np.int32)
    q = cases.normal(rng, 209, 8, dims[0], dtype=jnp.bfloat16)
    cu = cases.cu_seqlens([70, 1, 2, 129])
    call = jax.jit(
        lambda q, cache: jax_fa.hybrid_attention(q, *cache, cu, lengths, return_lse=True, **maps)
    )
    check_hybrid(call(q, cache), q, wide, cu, lengths, maps)


@pytest.mark.parametrize("len_q", [1, 150])
@pytest.mark.parametrize(
    "dtype, granularity, size",
    [("int8", "head", None), ("float8_e4m3fn", None, None), ("int8", "group", 16)],
)
@of_dims([(64, 128), (128, 64), (192, 128), (40, 72), (512, 512)])
def test_quantized(dims, dtype, granularity, size, len_q, rng):
    """By decode and, of more queries, prefill kernels."""
    size = size and (8 if dims[0] % 16 else size)
    cache, wide, maps = filled(
        rng, "paged", 2, 300, 2, dims[0], dtype, granularity, size, dim_v=dims[1]
    )
    q = cases.normal(rng, 2, len_q, 8, dims[0], dtype=jnp.bfloat16)
    check_decode(q, cache, wide, jnp.array([300, 165], jnp.int32), maps, "bfloat16")


def test_append_to_caches_of_two_head_dims(rng):
    """What is appended is what decode reads."""
    cache = jax_fa.KVCache(
        *(jnp.zeros((2, 64, 2, dim), jnp.bfloat16) for dim in (192, 128)),
        jnp.array([3, 40], jnp.int32),
    )
    k, v = (cases.normal(rng, 2, 5, 2, dim, dtype=jnp.bfloat16) for dim in (192, 128))
    new = jax.jit(lambda cache, k, v: cache.append(k, v))(cache, k, v)
    for b, start in enumerate([3, 40]):
        same_bits(new.k[b, start : start + 5], k[b])
        same_bits(new.v[b, start : start + 5], v[b])
    assert (new.lengths == jnp.array([8, 45])).all()
