"""vmap at two levels with every pair of in_axes, and what it copies."""

import dataclasses
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

import jax_fa
from jax_fa._primitives import OPERATIONS

V = 3  # lanes of either level: as many, so that calls share what is compiled
B = 2  # the batch inside: reading rows in a wrong order shows only with more than one

# every way to map three operands, one of them at least
LEVEL = [axes for axes in itertools.product([0, None], repeat=3) if axes != (None,) * 3]
LEVELS = list(itertools.product(LEVEL, LEVEL))


def level_id(level):
    return "".join("_" if axis is None else "v" for axis in level)


def name_of(levels):
    return "-".join(map(level_id, levels))


def random_like(rng, x, lead):
    """An array as x with leading axes: floats drawn anew, integers permuted."""
    shape = (*lead, *x.shape)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return cases.normal(rng, *shape, dtype=x.dtype)
    flat = np.stack([rng.permutation(np.ravel(x)) for _ in range(int(np.prod(lead)))])
    return jnp.asarray(flat.reshape(shape), x.dtype)


def mapped(rng, args, outer, inner):
    """The arguments with an axis for every level at which they are mapped."""

    def one(arg, o, i):
        lead = (V,) * ((o is not None) + (i is not None))
        return jax.tree.map(lambda x: random_like(rng, x, lead) if lead else x, arg)

    return [one(*x) for x in zip(args, outer, inner)]


def lane(arg, o, i, at):
    index = tuple(a for a, level in zip(at, (o, i)) if level is not None)
    return jax.tree.map(lambda x: x[index], arg)


def check_against_loop(fn, args, outer, inner, rng, tolerance=2e-6):
    """vmap(vmap(fn)) eagerly, against fn of each pair of lanes."""
    args = mapped(rng, args, outer, inner)
    out = jax.vmap(jax.vmap(fn, inner), outer)(*args)
    one = jax.jit(fn)
    for at in itertools.product(range(V), repeat=2):
        expected = one(*(lane(*x, at) for x in zip(args, outer, inner)))
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
            assert_close(x[at], y, tolerance, f"lane {at}")


def dense_args(rng):
    return (
        cases.normal(rng, B, 3, 4, 8), cases.normal(rng, B, 5, 2, 8), cases.normal(rng, B, 5, 2, 6)
    )  # fmt: skip


def dense(q, k, v):
    return jax_fa.flash_attention(q, k, v, causal=True, return_lse=True)


@pytest.mark.parametrize("outer, inner", LEVELS, ids=level_id)
def test_vmap_dense(outer, inner, rng):
    check_against_loop(dense, dense_args(rng), outer, inner, rng)


def dense_grads(q, k, v):
    def loss(q, k, v):
        out, lse = dense(q, k, v)
        w = jnp.arange(out.size, dtype=out.dtype).reshape(out.shape) % 7
        return (w * out).sum() + (lse**2).sum()

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("outer, inner", LEVELS, ids=level_id)
def test_vmap_of_grad(outer, inner, rng):
    check_against_loop(dense_grads, dense_args(rng), outer, inner, rng, 2e-5)


@pytest.mark.parametrize("outer, inner", [*zip(LEVEL, LEVEL), *zip(LEVEL, LEVEL[3:])], ids=level_id)
def test_grad_of_vmap_sums_over_lanes(outer, inner, rng):
    args = mapped(rng, dense_args(rng), outer, inner)

    def total(fn):
        return jax.grad(lambda *args: sum((o**2).sum() for o in fn(*args)), (0, 1, 2))

    def loop(*args):
        lanes = [
            dense(*(lane(*x, at) for x in zip(args, outer, inner)))
            for at in itertools.product(range(V), repeat=2)
        ]
        return [jnp.stack(x) for x in zip(*lanes)]

    actual = total(jax.vmap(jax.vmap(dense, inner), outer))(*args)
    for x, y in zip(actual, total(loop)(*args)):
        assert_close(x, y, 1e-4)


# --- one kind of call after another ---

VARLEN_Q, VARLEN_K = [2, 0, 3], [1, 2, 4]


def varlen(q, k, v):
    cu_q, cu_k = cases.cu_seqlens(VARLEN_Q), cases.cu_seqlens(VARLEN_K)
    return jax_fa.flash_attention_varlen(
        q, k, v, cu_q, cu_k, max_seqlen_q=3, max_seqlen_k=4, causal=True, return_lse=True
    )


def varlen_args(rng):
    return cases.normal(rng, 6, 4, 8), cases.normal(rng, 7, 2, 8), cases.normal(rng, 7, 2, 6)


@pytest.mark.parametrize("outer, inner", LEVELS, ids=level_id)
def test_vmap_varlen(outer, inner, rng):
    check_against_loop(varlen, varlen_args(rng), outer, inner, rng)


SOME = [(a, b) for a, b in LEVELS if LEVEL.index(a) + LEVEL.index(b) in (0, 5, 9)]


@pytest.mark.parametrize("outer, inner", SOME, ids=level_id)
def test_vmap_of_grad_of_varlen(outer, inner, rng):
    def grads(q, k, v):
        return jax.grad(lambda *x: sum((o[:, :5] ** 2).sum() for o in varlen(*x)), (0, 1, 2))(
            q, k, v
        )

    check_against_loop(grads, varlen_args(rng), outer, inner, rng, 2e-5)


def test_vmap_of_varlen_maps_every_other_operand(rng):
    q, k, v = varlen_args(rng)
    cu_q = jnp.array([[0, 2, 2, 5], [0, 0, 6, 6], [0, 1, 2, 3]], jnp.int32)
    cu_k = jnp.array([[0, 1, 3, 7], [0, 4, 4, 5], [0, 0, 0, 0]], jnp.int32)
    sinks, slopes = cases.normal(rng, V, 4), jnp.abs(cases.normal(rng, V, 3, 4))

    def one(cu_q, cu_k, sinks, slopes):
        return jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=6, max_seqlen_k=7, causal=True, return_lse=True,
            sinks=sinks, alibi_slopes=slopes,
        )  # fmt: skip

    out = jax.vmap(one)(cu_q, cu_k, sinks, slopes)
    for i in range(V):
        for x, y in zip(out, one(cu_q[i], cu_k[i], sinks[i], slopes[i])):
            assert_close(x[i], y, 2e-6)


CACHED = [("contiguous", None), ("contiguous", 2), ("paged", 2)]


def cache_args(rng, kind, layers):
    """k and v of a cache, and the operands that say where rows read."""
    lead = () if layers is None else (layers,)
    if kind == "contiguous":
        k, v = (cases.normal(rng, *lead, 4, 9, 2, h) for h in (8, 6))
        maps = {"batch_index": jnp.array([3, 1], jnp.int32)}
    else:
        k, v = (cases.normal(rng, *lead, 7, 4, 2, h) for h in (8, 6))
        maps = {"page_table": jnp.array([[4, 0, 6], [2, 5, 1]], jnp.int32)}
    maps["lengths"] = jnp.array([5, 9], jnp.int32)
    if layers is not None:
        maps["layer"] = jnp.int32(1)
    return (k, v), maps


def decode(q, cache, maps):
    return jax_fa.decode_attention(
        q, *cache, maps["lengths"], window=(6, None), return_lse=True,
        **{name: x for name, x in maps.items() if name != "lengths"},
    )  # fmt: skip


def hybrid(q, cache, maps):
    cu = jnp.array([0, 2, 5], jnp.int32)
    return jax_fa.hybrid_attention(
        q, *cache, cu, maps["lengths"], return_lse=True,
        **{name: x for name, x in maps.items() if name != "lengths"},
    )  # fmt: skip


@pytest.mark.parametrize("kind, layers", CACHED)
@pytest.mark.parametrize("outer, inner", LEVELS, ids=level_id)
def test_vmap_decode(kind, layers, outer, inner, rng):
    cache, maps = cache_args(rng, kind, layers)
    check_against_loop(decode, (cases.normal(rng, B, 2, 4, 8), cache, maps), outer, inner, rng)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("outer, inner", LEVELS, ids=level_id)
def test_vmap_hybrid(kind, outer, inner, rng):
    cache, maps = cache_args(rng, kind, 2)
    check_against_loop(hybrid, (cases.normal(rng, 6, 4, 8), cache, maps), outer, inner, rng)


def test_vmap_decode_without_a_map_of_rows(rng):
    args = (
        cases.normal(rng, 4, 4, 8),
        (cases.normal(rng, 2, 5, 2, 8),) * 2,
        jnp.array([3, 5, 0, 1], jnp.int32),
    )

    def call(q, cache, lengths):
        return jax_fa.decode_attention(q, *cache, lengths)

    for outer, inner in (((0, None, None), (0, 0, None)), ((None, 0, 0), (0, None, None))):
        check_against_loop(call, args, outer, inner, rng)


def append(kind, layers, quantized=False, rotary=None):
    def call(new, cache, maps):
        k, v = cache
        granularity = "head" if quantized else None
        if kind == "contiguous":
            lengths = jnp.zeros((4,), jnp.int32).at[maps["batch_index"]].set(maps["lengths"])
            full = jax_fa.KVCache(k, v, lengths, granularity)
            options = {"batch_index": maps["batch_index"]}
        else:
            full = jax_fa.PagedKVCache(k, v, maps["lengths"], maps["page_table"], granularity)
            options = {}
        after = full.append(*new, layer=maps.get("layer"), rotary=rotary, **options)
        return after.k, after.v, after.lengths

    return call


@pytest.mark.parametrize("kind, layers", CACHED)
@pytest.mark.parametrize("outer, inner", LEVELS, ids=level_id)
def test_vmap_append(kind, layers, outer, inner, rng):
    cache, maps = cache_args(rng, kind, layers)
    maps["lengths"] = jnp.array([5, 6], jnp.int32)  # known, so that they must not overflow
    new = tuple(cases.normal(rng, B, 3, 2, h) for h in (8, 6))
    check_against_loop(append(kind, layers), (new, cache, maps), outer, inner, rng, 0)


@pytest.mark.parametrize("kind, layers", CACHED)
def test_vmap_append_drops_what_overflows(kind, layers, rng):
    cache, maps = cache_args(rng, kind, layers)
    maps["lengths"] = jnp.array([5, 11], jnp.int32)
    if kind == "paged":  # a page that is none, one outside the pool
        maps["page_table"] = jnp.array([[4, -1, 6], [2, 7, 1]], jnp.int32)
    new = tuple(cases.normal(rng, B, 5, 2, h) for h in (8, 6))
    fn = jax.jit(append(kind, layers))
    for outer, inner in (((0, 0, None), (0, 0, None)), ((None, 0, 0), (0, 0, 0))):
        check_against_loop(fn, (new, cache, maps), outer, inner, rng, 0)


def test_vmap_append_packed_and_counts(rng):
    cache = jax_fa.KVCache.create(3, 9, 2, 8, dtype=jnp.float32)
    lengths = jnp.array([5, 0, 8], jnp.int32)

    def packed(k, cu, lengths):
        return dataclasses.replace(cache, lengths=lengths).append(k, k, cu_seqlens=cu)

    def counted(k, counts, lengths):
        return dataclasses.replace(cache, lengths=lengths).append(k, k, counts=counts)

    k, cu = (
        cases.normal(rng, 6, 2, 8),
        jnp.array([[0, 2, 2, 5], [0, 0, 6, 6], [0, 1, 2, 3]], jnp.int32),
    )
    out = jax.vmap(packed, (None, 0, None))(k, cu, lengths)
    for i in range(V):
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(jax.jit(packed)(k, cu[i], lengths))):
            np.testing.assert_array_equal(x[i], y)
    k, counts = cases.normal(rng, V, 3, 4, 2, 8), jnp.array([4, 0, 1], jnp.int32)
    out = jax.vmap(counted, (0, None, None))(k, counts, lengths)
    for i in range(V):
        for x, y in zip(
            jax.tree.leaves(out), jax.tree.leaves(jax.jit(counted)(k[i], counts, lengths))
        ):
            np.testing.assert_array_equal(x[i], y)


@pytest.mark.parametrize("scale_axis", [0, None])
@pytest.mark.parametrize("cache_axis", [0, None])
def test_vmap_append_quantized(cache_axis, scale_axis, rng):
    new = tuple(cases.normal(rng, V, B, 3, 2, h) for h in (8, 6))
    _, maps = cache_args(rng, "paged", None)
    lead = () if cache_axis is None else (V,)
    cache = tuple(
        jax_fa.QuantizedArray(
            jnp.asarray(rng.integers(-127, 127, (*lead, 7, 4, 2, h)), jnp.int8),
            jnp.abs(cases.normal(rng, *(() if scale_axis is None else (V,)), 7, 2, 4, 1)),
        )
        for h in (8, 6)
    )
    axes = (0, (jax_fa.QuantizedArray(cache_axis, scale_axis),) * 2, None)
    fn = append("paged", None, quantized=True)
    out = jax.vmap(fn, axes)(new, cache, maps)
    for i in range(V):
        one = tuple(
            jax_fa.QuantizedArray(
                x.values if cache_axis is None else x.values[i],
                x.scale if scale_axis is None else x.scale[i],
            )
            for x in cache
        )
        expected = jax.jit(fn)(tuple(x[i] for x in new), one, maps)
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
            np.testing.assert_array_equal(x[i], y)


def test_vmap_append_maps_rotary_tables(rng):
    new = tuple(cases.normal(rng, B, 3, 2, h) for h in (8, 6))
    cache, maps = cache_args(rng, "contiguous", None)
    tables = cases.normal(rng, V, 9, 4), cases.normal(rng, V, 9, 4)

    maps["lengths"] = jnp.array([5, 6], jnp.int32)

    def fn(rotary):
        return append("contiguous", None, rotary=rotary)(new, cache, maps)

    out = jax.vmap(fn)(tables)
    for i in range(V):
        expected = jax.jit(fn)(tuple(x[i] for x in tables))
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
            assert_close(x if x.ndim == y.ndim else x[i], y, 1e-6)


# --- vmap of what is less common ---


def test_vmap_maps_every_operand_of_dense(rng):
    q, k, v = dense_args(rng)
    options = {
        "alibi_slopes": jnp.abs(cases.normal(rng, V, B, 4)),
        "sinks": cases.normal(rng, V, 4),
        "bias": cases.normal(rng, V, 1, 4, 3, 5),
        "q_lengths": jnp.array([[3, 1], [0, 2], [2, 3]], jnp.int32),
        "kv_lengths": jnp.array([[5, 1], [0, 2], [4, 3]], jnp.int32),
    }

    def call(options):
        return jax_fa.flash_attention(q, k, v, causal=True, return_lse=True, **options)

    for name in options:  # each alone, then all of them
        one = {name: options[name]}
        out = jax.vmap(call)(one)
        for i in range(V):
            for x, y in zip(out, call({name: one[name][i]})):
                assert_close(x[i], y, 2e-6, name)
    out = jax.vmap(call)(options)
    for i in range(V):
        for x, y in zip(out, call({name: x[i] for name, x in options.items()})):
            assert_close(x[i], y, 2e-6)


def test_vmap_of_a_bias_gradient(rng):
    q, k, v = dense_args(rng)

    def grad(q, bias, sinks):
        def loss(bias, sinks):
            return (jax_fa.flash_attention(q, k, v, bias=bias, sinks=sinks) ** 2).sum()

        return jax.grad(loss, (0, 1))(bias, sinks)

    for bias_shape in ((1, 4, 3, 5), (B, 1, 1, 5)):
        args = q, cases.normal(rng, *bias_shape), cases.normal(rng, 4)
        for outer, inner in (
            ((0, None, None), (0, 0, 0)),
            ((0, 0, 0), (0, None, None)),
            ((None, 0, None), (None, None, 0)),
        ):
            check_against_loop(grad, args, outer, inner, rng, 1e-5)


def test_vmap_of_dropout_equals_a_loop(rng):
    q, k, v = dense_args(rng)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), V)

    def call(q, key):
        return jax_fa.flash_attention(q, k, v, dropout_rate=0.5, dropout_rng=key)

    qs = jnp.stack([q] * V)
    out = jax.vmap(call)(qs, keys)
    for i in range(V):
        assert_close(out[i], call(q, keys[i]), 2e-6)
    assert (out[0] != out[1]).any()
    same = jax.vmap(call, (0, None))(qs, keys[0])
    assert (same[0] == same[1]).all()


@pytest.mark.parametrize("axes", [(1, 2, 3), (4, None, 1), (None, 4, 0)], ids=str)
def test_vmap_of_other_axes(axes, rng):
    args = dense_args(rng)
    full = [x if a is None else cases.normal(rng, V, *x.shape) for x, a in zip(args, axes)]
    moved = [x if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(full, axes)]
    out = jax.vmap(dense, axes)(*moved)
    for i in range(V):
        for x, y in zip(out, dense(*(x if a is None else x[i] for x, a in zip(full, axes)))):
            assert_close(x[i], y, 2e-6)


def test_vmap_of_packed_buffers(rng):
    qkv = cases.normal(rng, V, B, 5, 3, 4, 8)
    out = jax.vmap(lambda x: jax_fa.flash_attention_qkvpacked(x, causal=True, return_lse=True))(qkv)
    grad = jax.vmap(jax.grad(lambda x: (jax_fa.flash_attention_qkvpacked(x) ** 2).sum()))(qkv)
    for i in range(V):
        expected = jax_fa.flash_attention_qkvpacked(qkv[i], causal=True, return_lse=True)
        for x, y in zip(out, expected):
            assert_close(x[i], y, 2e-6)
        one = jax.grad(lambda x: (jax_fa.flash_attention_qkvpacked(x) ** 2).sum())(qkv[i])
        assert_close(grad[i], one, 1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "token", "head"])
@pytest.mark.parametrize("values, scale", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_quantized_keys(granularity, values, scale, rng):
    q, k, v = (cases.normal(rng, V, B, n, h, 8) for n, h in ((3, 4), (5, 2), (5, 2)))
    kq, vq = (jax_fa.quantize(x.reshape(V * B, *x.shape[2:]), "int8", granularity) for x in (k, v))

    def lanes(x):
        s = x.scale
        s = (
            jnp.stack([s * (i + 1) for i in range(V)])
            if s.shape[0] == 1
            else s.reshape(V, B, *s.shape[1:])
        )
        vals = x.values.reshape(V, B, *x.values.shape[1:])
        return jax_fa.QuantizedArray(vals if values == 0 else vals[0], s if scale == 0 else s[0])

    kq, vq = lanes(kq), lanes(vq)
    axes = jax_fa.QuantizedArray(values, scale)
    out = jax.vmap(jax_fa.flash_attention, (0, axes, axes))(q, kq, vq)

    def one(x, i):
        return jax_fa.QuantizedArray(
            x.values[i] if values == 0 else x.values, x.scale[i] if scale == 0 else x.scale
        )

    for i in range(V):
        expected = jax_fa.flash_attention(q[i], one(kq, i).dequantize(), one(vq, i).dequantize())
        assert_close(out[i], expected, 2e-6)


# --- what vmap copies ---


def inner_jaxprs(eqn):
    for value in eqn.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def copies(jaxpr, tail):
    """Equations that make an array with those last axes, but reshapes and this library's."""
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = list(inner_jaxprs(eqn))
        for one in inner:
            found += copies(one, tail)
        if inner or name in OPERATIONS or name in ("reshape", "squeeze"):
            continue
        found += [name for x in eqn.outvars if x.aval.shape[-len(tail) :] == tail]
    return found


def copies_of(fn, args, outer, inner, tails, rng):
    """Which of the arrays with those last axes vmap(vmap(fn)) copies."""
    args = jax.eval_shape(lambda: mapped(rng, args, outer, inner))
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(fn, inner), outer))(*args).jaxpr
    return [bool(copies(jaxpr, tail)) for tail in tails]


def no_order_fits(mine, other):
    """Mapped at the outer level and not at the inner, where the other array is."""
    return mine[0] == 0 and mine[1] is None and other[1] == 0


def test_vmap_copies_keys_only_where_no_order_of_rows_fits(rng):
    copied = set()
    for outer, inner in LEVELS:
        k, v = ((outer[i], inner[i]) for i in (1, 2))
        expected = [no_order_fits(k, v), no_order_fits(v, k)]
        args = dense_args(rng)
        have = copies_of(dense, args, outer, inner, [(5, 2, 8), (5, 2, 6)], rng)
        assert have == expected, name_of((outer, inner))
        copied |= {(k, v)} if any(have) else set()
    # the list: keys mapped at one level only and values at another, or at both
    assert {name_of((k, v)) for k, v in copied} == {"v_-_v", "_v-v_", "v_-vv", "vv-v_"}


@pytest.mark.parametrize("kind, layers", CACHED)
def test_vmap_never_copies_a_cache_that_is_read(kind, layers, rng):
    cache, maps = cache_args(rng, kind, layers)
    q, packed = cases.normal(rng, B, 2, 4, 8), cases.normal(rng, 6, 4, 8)
    tails = [x.shape[1:][-3:] for x in cache]
    for outer, inner in LEVELS:
        for fn, x in ((decode, q), (hybrid, packed)):
            have = copies_of(fn, (x, cache, maps), outer, inner, tails, rng)
            assert not any(have), f"{fn.__name__} {name_of((outer, inner))}"


@pytest.mark.parametrize("kind, layers", CACHED)
def test_vmap_of_append_copies_a_cache_only_if_it_is_shared(kind, layers, rng):
    cache, maps = cache_args(rng, kind, layers)
    new = tuple(cases.normal(rng, B, 3, 2, h) for h in (8, 6))
    tails = [x.shape[-3:] for x in cache]
    for outer, inner in LEVELS:
        have = copies_of(append(kind, layers), (new, cache, maps), outer, inner, tails, rng)
        shared = outer[1] is None or inner[1] is None
        assert have == [shared, shared], name_of((outer, inner))


def test_vmap_copies_packed_keys_only_in_part_or_for_gradients(rng):
    for outer, inner in LEVELS:
        have = copies_of(varlen, varlen_args(rng), outer, inner, [(2, 8), (2, 6)], rng)
        unmapped = all(axes[1] is None and axes[2] is None for axes in (outer, inner))
        whole = all(axes[1] == axes[2] for axes in (outer, inner))
        if unmapped or (whole and (outer[1] == 0) <= (inner[1] == 0)):
            assert not any(have), name_of((outer, inner))


def test_vmap_over_no_lanes(rng):
    shapes = [(0, 2, 5, 4, 8), (2, 7, 2, 8), (0, 2, 7, 2, 8)]
    q, k, v = (cases.normal(rng, *shape) for shape in shapes)
    attend = jax.vmap(jax_fa.flash_attention, in_axes=(0, None, 0))
    assert attend(q, k, v).shape == jax.jit(attend)(q, k, v).shape == (0, 2, 5, 4, 8)
    grads = jax.vmap(jax.grad(lambda q, k, v: jax_fa.flash_attention(q, k, v).sum()), (0, None, 0))
    assert grads(q, k, v).shape == (0, 2, 5, 4, 8)
    lengths = jnp.zeros((0, 2), jnp.int32)
    decode = jax.vmap(lambda q, n: jax_fa.decode_attention(q, k, k, n))
    assert decode(q[:, :, 0], lengths).shape == (0, 2, 4, 8)
    cache = jax.tree.map(lambda x: x[:0], jax.vmap(lambda _: jax_fa.KVCache.create(
        2, 9, 2, 8, dtype=jnp.float32))(jnp.arange(1)))  # fmt: skip
    angles = jnp.ones((0, 9, 4))
    append = jax.vmap(lambda cache, k, angle: cache.append(k, k, rotary=(angle, angle)))
    assert append(cache, q[..., :2, :], angles).k.shape == (0, 2, 9, 2, 8)
