"""How outputs of the kernels are compared with the float64 oracle, and the caches that tests read.

An output may be off by twice as much as the naive computation in the input's dtype (three times
with softcap, whose tanh is approximate), plus an atol of that dtype; where nan and inf sit comes
first.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import reference

import jax_fa

ATOL = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 2e-4}
LSE_ATOL = {"float16": 1e-4, "bfloat16": 1e-4, "float32": 1e-3}
DTYPES = ["bfloat16", "float16", "float32"]
# Of packed rows.
LENGTHS_Q, LENGTHS_K = [0, 70, 1, 0, 129, 5], [3, 70, 200, 0, 131, 0]

QUANTIZED = [
    ("int8", "head", None), ("int8", "token", None), ("int8", "group", 32),
    ("int8", "tensor", None),
    ("float8_e4m3fn", "head", None), ("float8_e4m3fn", None, None), ("float8_e5m2", "token", None),
    ("float8_e5m2", "group", 16),
]  # fmt: skip


def check(actual, oracle, dtype, factor=2):
    """oracle(rounded) gives o and lse; actual are those of a kernel."""
    (out, lse), (ref, ref_lse), (low, low_lse) = actual, oracle(None), oracle(jnp.dtype(dtype))
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    for name, x, y, z, atol in (
        ("out", out, ref, low, ATOL[dtype]),
        ("lse", lse, ref_lse, low_lse, LSE_ATOL[dtype]),
    ):
        seen = np.isfinite(y)
        error = np.abs(np.where(seen, z, 0) - np.where(seen, y, 0))
        reference.assert_close(x, y, factor * error.max(initial=0) + atol, name)
        mean = np.abs(np.where(seen, reference.as_float64(x), 0) - np.where(seen, y, 0)).mean()
        assert mean <= factor * error.mean() + atol / 2, f"{name}: mean error {mean:.3g}"


def check_hybrid(actual, q, wide, cu, lengths, maps, factor=2, **options):
    """actual are out and lse of packed queries over a cache that is `wide` in float64."""
    lengths = np.asarray(lengths)
    check(
        actual,
        lambda rounded: reference.hybrid(
            q, *wide, cu, lengths, rounded=rounded, **maps, **options
        ),
        q.dtype.name,
        factor,
    )  # fmt: skip


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
    expected = cases.oracle_options(options, shape.batch)
    check(
        run_dense(q, k, v, options),
        lambda rounded: reference.attention(q, k, v, rounded=rounded, **expected),
        dtype,
        3 if "softcap" in options else 2,
    )


def filled(
    rng, kind, batch, length, heads, dim, dtype, granularity="head", size=None, page=16,
    layers=None, dim_v=None,
):  # fmt: skip
    """k and v of a cache, the same in float64, and maps; pages are permuted."""
    lead = () if layers is None else (layers,)
    if kind == "contiguous":
        shape, maps = (*lead, batch, length, heads), {}
    else:
        pages = -(-length // page)
        order = rng.permutation(batch * pages + 3)[: batch * pages].reshape(batch, pages)
        shape = (*lead, batch * pages + 3, page, heads)
        maps = {"page_table": jnp.asarray(order, jnp.int32)}
    k, v = (cases.normal(rng, *shape, d) for d in (dim, dim_v or dim))
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
