"""float32 under `jax.default_matmul_precision("highest")`: no product is rounded to TF32."""

import cases
import gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_gpu_gradients as gradients

import jax_fa

pytestmark = pytest.mark.gpu

SIZES = [(1, 1), (3, 1), (63, 65), (65, 63), (1, 1023), (239, 113), (129, 1023)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Bounds of float32, where those of TF32 are 2e-4 and 2e-3."""
    monkeypatch.setitem(gpu.ATOL, "float32", 3e-6)
    monkeypatch.setitem(gpu.LSE_ATOL, "float32", 1e-5)
    monkeypatch.setitem(gradients.ATOL, "float32", 2e-5)
    with jax.default_matmul_precision("highest"):
        yield


DIMS = [*((dim, dim) for dim in (8, 40, 64, 72, 128, 160, 256)), (64, 128), (192, 72)]


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims(dims, causal, rng):
    shape = cases.Shape(1, 113, 217, 4, 2, *dims)
    gpu.check_dense(shape, "float32", {"causal": causal}, rng)
    gradients.check_dense(shape, "float32", {"causal": causal}, rng)


@pytest.mark.parametrize("names", cases.PAIRS, ids="-".join)
def test_features(names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, 64)
    gpu.check_dense(shape, "float32", cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("names", [(name,) for name in cases.FEATURES], ids="-".join)
def test_features_of_gradients(names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, 64)
    gradients.check_dense(shape, "float32", cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("len_q, len_kv", SIZES)
def test_sizes(len_q, len_kv, rng):
    shape, options = (
        cases.Shape(2, len_q, len_kv, 3, 1, 64),
        {"causal": True, "window": (300, None)},
    )
    gpu.check_dense(shape, "float32", options, rng)
    gradients.check_dense(shape, "float32", options, rng)


@pytest.mark.parametrize("names", [(), ("causal", "sinks"), ("window", "softcap")], ids=str)
def test_varlen(names, rng):
    gradients.test_varlen("float32", 72, 72, names, False, rng)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("len_q", [1, 5])
def test_decode(kind, len_q, rng):
    lengths = jnp.array([77, 0, 150], jnp.int32)
    q = cases.normal(rng, 3, len_q, 6, 64)
    cache, wide, maps = gpu.filled(rng, kind, 3, 160, 2, 64, "float32", layers=2)
    gpu.check_decode(q, cache, wide, lengths, maps, "float32", window=(100, None))


def test_hybrid(rng):
    counts, lengths = [1, 0, 40, 3], [90, 5, 64, 77]
    cu = cases.cu_seqlens(counts)
    q = cases.normal(rng, 50, 4, 64)
    cache, wide, maps = gpu.filled(rng, "paged", 4, 96, 2, 64, "float32")
    actual = jax.jit(
        lambda q, cache: jax_fa.hybrid_attention(
            q, *cache, cu, jnp.array(lengths, jnp.int32), return_lse=True, **maps
        )
    )(q, cache)
    gpu.check_hybrid(actual, q, wide, cu, lengths, maps)


def test_poison_and_reruns(rng):
    shape = cases.Shape(3, 97, 139, 4, 2, 64)
    qkv = cases.qkv(rng, shape, jnp.float32)
    do, dlse = gradients.cotangents(rng, qkv[0], jnp.float32)
    options = {
        "q_lengths": jnp.array([70, 97, 0], jnp.int32),
        "kv_lengths": jnp.array([33, 0, 130], jnp.int32),
        "causal": True,
    }
    clean = gradients.run_dense(*qkv, do, dlse, options)
    hidden = (
        jnp.arange(n)[None] >= options[f"{x}_lengths"][:, None]
        for x, n in (("q", 97), ("kv", 139), ("kv", 139))
    )
    poisoned = [jnp.where(h[..., None, None], jnp.nan, x) for h, x in zip(hidden, qkv)]
    gpu.same_bits(gradients.run_dense(*poisoned, do, dlse, options), clean)


def test_precision_is_what_decides(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 256, 256, 2, 2, 128), jnp.float32)
    expected, _ = reference.attention(q, k, v)

    def error():
        return np.abs(reference.as_float64(jax_fa.flash_attention(q, k, v)) - expected).max()

    exact = error()
    with jax.default_matmul_precision("tensorfloat32"):
        assert error() > 30 * exact


@pytest.mark.sanitize
def test_sanitize(rng):
    shape = cases.Shape(1, 70, 67, 2, 1, 72)
    gpu.check_dense(shape, "float32", {"causal": True}, rng)
    gradients.check_dense(shape, "float32", {"causal": True}, rng)
