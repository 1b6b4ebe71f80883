"""shard_map, explicit and automatic meshes, and compilation ahead of time."""

import dataclasses
import functools as ft

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import assert_close

import jax_fa


def spec_of(x):
    """The PartitionSpec of an array without trailing Nones."""
    spec = tuple(x.sharding.spec)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return P(*spec)


def mesh_of(shape, names, kind=None):
    if len(jax.devices()) < np.prod(shape):
        pytest.skip(f"needs {np.prod(shape)} devices; jax sees {len(jax.devices())}")
    kinds = {} if kind is None else {"axis_types": (kind,) * len(names)}
    return jax.make_mesh(shape, names, **kinds)


def loss_of(fn):
    def loss(*args):
        out, lse = fn(*args)
        w = jnp.arange(out.shape[-1], dtype=out.dtype)
        return (out * w.reshape((1,) * (out.ndim - 1) + w.shape)).sum() + (lse**2).sum()

    return loss


@pytest.mark.parametrize("keys", ["replicated", "varying"])
def test_shard_map_values_and_gradients(keys, rng):
    mesh = mesh_of((4,), ("x",))
    q = cases.normal(rng, 4, 5, 4, 8)
    k, v = (cases.normal(rng, 1 if keys == "replicated" else 4, 7, 2, 8) for _ in "kv")
    sinks, bias = cases.normal(rng, 4), cases.normal(rng, 1, 4, 5, 7)
    spec = P() if keys == "replicated" else P("x")

    def local(q, k, v, sinks, bias):
        return jax_fa.flash_attention(q, k, v, causal=True, sinks=sinks, bias=bias, return_lse=True)

    specs = (P("x"), spec, spec, P(), P())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=True)
    args = (q, k, v, sinks, bias)
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs)]

    def plain(q, k, v, sinks, bias):
        k, v = (jnp.broadcast_to(x, (4, *x.shape[1:])) for x in (k, v))
        return local(q, k, v, sinks, bias)

    for x, y in zip(jax.jit(sharded)(*placed), plain(*args)):
        assert_close(x, y, 2e-6)
    grads = jax.jit(jax.grad(lambda *a: loss_of(sharded)(*a), (0, 1, 2, 3, 4)))(*placed)
    for x, y in zip(grads, jax.grad(loss_of(plain), (0, 1, 2, 3, 4))(*args)):
        assert_close(x, y, 2e-5)


def test_shard_map_of_varlen_decode_hybrid_and_append(rng):
    mesh = mesh_of((4,), ("x",))
    cu = cases.cu_seqlens([2, 0, 3])
    q, k = cases.normal(rng, 4, 5, 4, 8), cases.normal(rng, 6, 2, 8)
    cache = jax_fa.KVCache.create(3, 9, 2, 8, dtype=jnp.float32)
    cache = jax.jit(lambda c: c.append(k.reshape(3, 2, 2, 8), k.reshape(3, 2, 2, 8)))(cache)
    new = cases.normal(rng, 4, 3, 1, 2, 8)

    def local(q, k, cache, new):
        out = jax_fa.flash_attention_varlen(
            q, k, k, cu, cu, max_seqlen_q=3, max_seqlen_k=3, causal=True
        )
        hybrid = jax_fa.hybrid_attention(q, cache.k, cache.v, cu, cache.lengths)
        cache = cache.append(new, new)
        decode = jax_fa.decode_attention(q[:3], cache.k, cache.v, cache.lengths)
        return out, hybrid, decode, cache.k

    def each(q, k, cache, new):
        return tuple(x[None] for x in local(q[0], k, cache, new[0]))

    specs = (P("x"), P(), P(), P("x"))
    out = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P("x"), check_vma=True))
    args = (q, k, cache, new)
    placed = [
        jax.device_put(x, jax.tree.map(lambda _: NamedSharding(mesh, s), x))
        for x, s in zip(args, specs)
    ]
    actual = jax.device_get(out(*placed))
    for i in range(4):
        for x, y in zip(actual, local(q[i], k, cache, new[i])):
            assert_close(x[i], y, 2e-6)

    # gradients of packed attention over keys that do not vary
    def varlen_loss(q, k):
        out = jax_fa.flash_attention_varlen(q[0], k, k, cu, cu, max_seqlen_q=3, max_seqlen_k=3)
        return (out**2).sum()[None]

    total = jax.shard_map(varlen_loss, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    grads = jax.jit(jax.grad(lambda *a: total(*a).sum(), (0, 1)))(placed[0], placed[1])
    expected = jax.grad(lambda q, k: sum(varlen_loss(q[i : i + 1], k)[0] for i in range(4)), (0, 1))
    for x, y in zip(grads, expected(q, k)):
        assert_close(x, y, 2e-5)


SPECS = {
    "batch": P("a"),
    "heads": P(None, None, "b"),
    "both": P("a", None, "b"),
    "none": P(),
}


@pytest.mark.parametrize("context", [True, False], ids=["set_mesh", "no context"])
@pytest.mark.parametrize("spec", SPECS)
def test_explicit_mesh_values_and_gradients(spec, context, rng):
    mesh = mesh_of((2, 2), ("a", "b"))  # Explicit by default
    assert set(mesh.axis_types) == {AxisType.Explicit}
    args = cases.qkv(rng, cases.Shape(2, 5, 7, 4, 2, 8))
    sinks = cases.normal(rng, 4)

    def fn(q, k, v):
        return jax_fa.flash_attention(q, k, v, causal=True, sinks=sinks_, return_lse=True)

    sinks_ = sinks
    expected = fn(*args), jax.grad(loss_of(fn), (0, 1, 2))(*args)
    placed = [jax.device_put(x, NamedSharding(mesh, SPECS[spec])) for x in args]

    def check():
        nonlocal sinks_
        sinks_ = jax.device_put(sinks, NamedSharding(mesh, P()))
        actual = jax.jit(fn)(*placed)
        assert spec_of(actual[0]) == SPECS[spec]
        grads = jax.jit(jax.grad(loss_of(fn), (0, 1, 2)))(*placed)
        for x, y in zip((*actual, *grads), (*expected[0], *expected[1])):
            assert_close(x, y, 2e-5)

    if context:
        with jax.set_mesh(mesh):
            check()
    else:
        check()


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("axis", [-4, -2], ids=["rows", "heads"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_explicit_mesh_caches(layers, axis, dtype, rng):
    mesh = mesh_of((2, 2), ("a", "b"))
    cache = jax_fa.KVCache.create(2, 9, 2, 8, layers=layers, dtype=dtype)
    new = cases.normal(rng, 2, 3, 2, 8)
    q = cases.normal(rng, 2, 4, 8)
    layer = None if layers is None else 1

    def fn(q, cache, new):
        cache = cache.append(new, new, layer=layer)
        lengths = jnp.array([3, 2], jnp.int32)
        return jax_fa.decode_attention(q, cache.k, cache.v, lengths, layer=layer), cache

    expected = jax.jit(fn)(q, cache, new)
    spec = {-4: P("a"), -2: P(None, None, "b")}[axis]
    lead = () if layers is None else (None,)
    values = P(*lead, *spec)
    scales = P(*lead, *({-4: ("a",), -2: (None, "b")}[axis]))

    def place(x):
        if isinstance(x, jax_fa.QuantizedArray):
            return jax_fa.QuantizedArray(
                jax.device_put(x.values, NamedSharding(mesh, values)),
                jax.device_put(x.scale, NamedSharding(mesh, scales)),
            )
        return jax.device_put(x, NamedSharding(mesh, values))

    with jax.set_mesh(mesh):
        placed = dataclasses.replace(
            cache, k=place(cache.k), v=place(cache.v),
            lengths=jax.device_put(cache.lengths, NamedSharding(mesh, P())),
        )  # fmt: skip
        q = jax.device_put(q, NamedSharding(mesh, P("a") if axis == -4 else P(None, "b")))
        new = jax.device_put(new, NamedSharding(mesh, spec))
        actual = jax.jit(fn)(q, placed, new)
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
            assert_close(x, y, 2e-6)
        assert spec_of(jax.tree.leaves(actual[1].k)[0]) == values


def test_explicit_mesh_rotary_row_maps_and_shared_prefixes(rng):
    mesh = mesh_of((2, 2), ("a", "b"))
    pages = jax_fa.PagedKVCache.create(9, 4, 4, 3, 2, 8, dtype=jnp.float32)
    table = jnp.asarray([[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 8]], jnp.int32)
    pages = dataclasses.replace(pages, page_table=table)
    rows = jax_fa.KVCache.create(4, 9, 2, 8, dtype=jnp.float32)
    new = cases.normal(rng, 4, 5, 2, 8)
    angles = cases.normal(rng, 12, 4)
    at = jnp.asarray([2, 0, 3, 1], jnp.int32)

    def fn(new, angles, at, rows, pages):
        positions = jnp.arange(5, dtype=jnp.int32)
        turned = jax_fa.apply_rotary(new, angles, numbers, positions)
        rows = rows.append(turned, new, batch_index=at)
        pages = pages.append(turned, new, batch_index=at)
        out = jax_fa.decode_attention(
            new, pages.k, pages.v, pages.lengths, page_table=pages.page_table,
            shared_prefix_pages=1,
        )  # fmt: skip
        return turned, rows, pages, out

    numbers = np.asarray(angles)  # on no mesh
    expected = jax.jit(fn)(new, angles, at, rows, pages)
    with jax.set_mesh(mesh):
        by_row = NamedSharding(mesh, P("a"))
        new, at, rows = jax.device_put((new, at, rows), by_row)
        pages = dataclasses.replace(
            pages, lengths=jax.device_put(pages.lengths, by_row),
            page_table=jax.device_put(table, by_row),
        )  # fmt: skip
        actual = jax.jit(fn)(new, angles, at, rows, pages)
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
            assert_close(x, y, 2e-6)
        assert spec_of(actual[0]) == P("a")


def test_auto_mesh_values_and_gradients(rng):
    mesh = mesh_of((2, 2), ("a", "b"), AxisType.Auto)
    args = cases.qkv(rng, cases.Shape(2, 5, 7, 4, 2, 8))
    fn = ft.partial(jax_fa.flash_attention, causal=True, return_lse=True)
    placed = [jax.device_put(x, NamedSharding(mesh, P("a", None, "b"))) for x in args]
    grads = jax.jit(jax.grad(loss_of(fn), (0, 1, 2)))(*placed)
    for x, y in zip(grads, jax.grad(loss_of(fn), (0, 1, 2))(*args)):
        assert_close(x, y, 2e-5)


# --- ahead of time ---


def test_ahead_of_time_compilation(rng):
    args = cases.qkv(rng, cases.Shape(1, 5, 7, 2, 1, 8))
    fn = ft.partial(jax_fa.flash_attention, causal=True, return_lse=True)
    compiled = jax.jit(fn).lower(*args).compile()
    for x, y in zip(compiled(*args), jax.jit(fn)(*args)):
        np.testing.assert_array_equal(x, y)


def test_export_for_cuda_from_any_machine():
    def step(q, cache, new):
        cache = cache.append(new, new)
        return jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths), cache

    cache = jax.eval_shape(lambda: jax_fa.KVCache.create(2, 64, 2, 64, dtype=jnp.bfloat16))
    new = jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((2, 4, 64), jnp.bfloat16)
    export = jax.export.export(
        jax.jit(step), platforms=["cuda"], disabled_checks=jax_fa.DISABLED_EXPORT_CHECKS
    )
    text = export(q, cache, new).mlir_module()
    assert text.count("@jax_fa_decode") == 1 and text.count("@jax_fa_append") == 1
    x = jax.ShapeDtypeStruct((2, 33, 4, 64), jnp.bfloat16)
    prefill = jax.export.export(
        jax.jit(lambda x: jax_fa.flash_attention(x, x, x, causal=True)), platforms=["cpu", "cuda"],
        disabled_checks=jax_fa.DISABLED_EXPORT_CHECKS,
    )(x)  # fmt: skip
    assert "@jax_fa_fwd" in prefill.mlir_module()
    if jax.default_backend() == "cpu":
        assert (prefill.call(jnp.ones((2, 33, 4, 64), jnp.bfloat16)) == 1).all()
    with pytest.raises(ValueError, match="jax_fa_fwd"):
        jax.export.export(jax.jit(lambda x: jax_fa.flash_attention(x, x, x)), platforms=["cuda"])(x)
