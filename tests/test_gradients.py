"""First derivatives of out and lse against float64 autodiff of a naive implementation."""

import functools as ft

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, dropout_keep

import jax_fa

SHAPE = cases.Shape(2, 21, 37, 4, 2, 16)
LOSS_SEED = 11


def naive(
    q, k, v, *, scale=None, causal=False, window=None, softcap=None, alibi_slopes=None, sinks=None,
    bias=None, q_lengths=None, kv_lengths=None, keep=None, dropout_rate=0.0,
):  # fmt: skip
    """Section 2 with the whole matrix of scores, differentiable; lse is 0 where it is -inf."""
    batch, len_q, heads, dim = q.shape
    len_kv, group = k.shape[1], heads // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    t = jnp.full((batch,), len_q) if q_lengths is None else q_lengths.astype(int)
    s = jnp.full((batch,), len_kv) if kv_lengths is None else kv_lengths.astype(int)
    i, j = jnp.arange(len_q)[None, :, None], jnp.arange(len_kv)[None, None]
    center = i + (s - t)[:, None, None]
    visible = (j < s[:, None, None]) & (i < t[:, None, None])
    left, right = (window, window) if isinstance(window, int) else window or (None, None)
    if causal:
        visible &= j <= center
    if left is not None:
        visible &= j - center >= -left
    if right is not None:
        visible &= j - center <= right
    score = jnp.einsum("btnh,bsnh->bnts", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap:
        score = softcap * jnp.tanh(score / softcap)
    if alibi_slopes is not None:
        slopes = jnp.broadcast_to(jnp.atleast_2d(alibi_slopes), (batch, heads))
        score -= slopes[:, :, None, None] * abs(center - j)[:, None].astype(float)
    if bias is not None:
        score += bias
    score = jnp.where(visible[:, None], score, -1e30)
    some = visible.any(-1)[:, None]
    extra = jnp.full((batch, heads, len_q, 1), -1e30)
    if sinks is not None:
        sinks = jnp.broadcast_to(jnp.atleast_2d(sinks), (batch, heads))
        extra = jnp.broadcast_to(sinks[:, :, None, None], extra.shape)
        some = (i < t[:, None, None])[:, None, :, 0]
    lse = jax.nn.logsumexp(jnp.concatenate([score, extra], -1), -1)
    p = jnp.where(visible[:, None] & some[..., None], jnp.exp(score - lse[..., None]), 0)
    if keep is not None:
        p = jnp.where(keep, p / (1 - dropout_rate), 0)
    return jnp.einsum("bnts,bsnh->btnh", p, v), jnp.where(some, lse, 0)


def weights(shape):
    rng = np.random.default_rng(LOSS_SEED)
    b, t, _, n = shape[0], shape[1], shape[2], shape[3]
    return rng.standard_normal((b, t, n, shape.dim_v or shape.head_dim)), rng.standard_normal(
        (b, n, t)
    )


def loss_of(fn, shape):
    """A scalar of out and lse in which every element has its own weight."""

    def loss(q, k, v, arrays):
        out, lse = fn(q, k, v, **arrays)
        w, u = (jnp.asarray(x, out.dtype) for x in weights(shape))
        lse = jnp.where(lse == -jnp.inf, 0, lse).astype(out.dtype)
        return (w * out).sum() + (u * lse).sum()

    return loss


def expected_grads(qkv, options, shape):
    """Gradients in float64 of q, k, v and the floating options."""
    arrays, static = cases.split_options(cases.oracle_options(options, shape.batch))
    seeds = static.pop("seeds", None)
    if seeds is not None:
        rate, broadcast = static["dropout_rate"], static.pop("broadcast_dropout", False)
        static["keep"] = np.stack([
            dropout_keep(seed, shape.heads, shape.len_q, shape.len_kv, rate, broadcast)
            for seed in seeds
        ])  # fmt: skip
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in qkv]
        arrays = {
            name: jnp.asarray(np.asarray(x), jnp.float64 if x.dtype == np.float32 else x.dtype)
            for name, x in arrays.items()
        }
        floats = {name: x for name, x in arrays.items() if x.dtype == np.float64}
        rest = {name: x for name, x in arrays.items() if name not in floats}
        loss = loss_of(ft.partial(naive, **rest, **static), shape)
        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*wide, floats)


def actual_grads(qkv, options, shape, **fixed):
    arrays, static = cases.split_options(options)
    key = static.pop("dropout_rng", arrays.pop("dropout_rng", None))
    floats = {name: x for name, x in arrays.items() if x.dtype == np.float32}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    static |= {} if key is None else {"dropout_rng": key}
    fn = ft.partial(jax_fa.flash_attention, return_lse=True, **rest, **static, **fixed)
    return jax.jit(jax.grad(loss_of(fn, shape), (0, 1, 2, 3)))(*qkv, floats)


def check(qkv, options, shape, tolerance=1e-5, **fixed):
    actual = actual_grads(qkv, options, shape, **fixed)
    expected = expected_grads(qkv, options, shape)
    for name, x, y in zip(("dq", "dk", "dv"), actual[:3], expected[:3]):
        assert_close(x, y, tolerance, name, relative=tolerance)
    assert actual[3].keys() == expected[3].keys()
    for name, x in actual[3].items():
        if name == "alibi_slopes":
            assert (x == 0).all()
        else:
            assert_close(x, expected[3][name], 4 * tolerance, f"d{name}", relative=tolerance)
    return actual


PAIRS = [
    *((name,) for name in cases.FEATURES),
    ("causal", "softcap"), ("causal", "sinks"), ("causal", "dropout"), ("window", "alibi"),
    ("softcap", "bias"), ("sinks", "q_lengths"), ("sinks", "kv_lengths"), ("bias", "dropout"),
    ("causal", "q_lengths", "kv_lengths"),
]  # fmt: skip


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_gradients(names, rng):
    qkv = cases.qkv(rng, SHAPE)
    check(qkv, cases.options_of(names, rng, SHAPE), SHAPE)


@pytest.mark.parametrize(
    "shape",
    [
        cases.Shape(1, 37, 21, 3, 1, 40),
        cases.Shape(3, 1, 33, 8, 1, 8),
        cases.Shape(2, 17, 1, 2, 2, 24),
        cases.Shape(2, 16, 32, 4, 4, 24, 40),
    ],
    ids=str,
)
def test_gradients_of_shapes(shape, rng):
    options = cases.options_of(("causal", "kv_lengths", "sinks"), rng, shape)
    check(cases.qkv(rng, shape), options, shape)


@pytest.mark.parametrize(
    "axes", [(1, 1, 1, 1), (2, 4, 1, 1), (1, 1, 21, 37), (2, 1, 21, 1)], ids=str
)
def test_gradient_of_a_broadcast_bias_is_summed(axes, rng):
    check(cases.qkv(rng, SHAPE), {"bias": cases.normal(rng, *axes), "causal": True}, SHAPE)


def test_gradient_of_sinks_per_row(rng):
    check(cases.qkv(rng, SHAPE), {"sinks": cases.normal(rng, 2, 4), "causal": True}, SHAPE)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-2), ("bfloat16", 1.5e-1)])
def test_gradients_keep_the_dtype(dtype, tolerance, rng):
    qkv = cases.qkv(rng, SHAPE, jnp.dtype(dtype))
    grads = check(qkv, {"causal": True}, SHAPE, tolerance)
    assert all(g.dtype == jnp.dtype(dtype) for g in grads[:3])


def test_gradients_in_float64(rng):
    with jax.enable_x64(True):
        qkv = cases.qkv(rng, SHAPE, jnp.float64)
        check(qkv, {"causal": True, "softcap": 2.0}, SHAPE, 1e-12)


def test_deterministic_gives_the_same_gradients_twice(rng):
    qkv = cases.qkv(rng, SHAPE)
    first, second = (actual_grads(qkv, {"causal": True}, SHAPE, deterministic=True) for _ in "12")
    for x, y in zip(first[:3], second[:3]):
        np.testing.assert_array_equal(x, y)


def test_poison_past_lengths_never_reaches_gradients(rng):
    q, k, v = cases.qkv(rng, SHAPE)
    q_lengths, kv_lengths = jnp.array([9, 0], jnp.int32), jnp.array([20, 37], jnp.int32)

    @jax.jit
    def grads(q, k, v, bias, wo, wl):
        def loss(q, k, v, bias):
            out, lse = jax_fa.flash_attention(
                q, k, v, causal=True, bias=bias, q_lengths=q_lengths, kv_lengths=kv_lengths,
                return_lse=True,
            )  # fmt: skip
            return (out, lse), None

        _, vjp, _ = jax.vjp(loss, q, k, v, bias, has_aux=True)
        return vjp((wo, wl))

    past_q = jnp.arange(21)[None] >= q_lengths[:, None]
    past_k = jnp.arange(37)[None] >= kv_lengths[:, None]
    bias, wo, wl = (cases.normal(rng, *s) for s in ((2, 4, 21, 37), (2, 21, 4, 16), (2, 4, 21)))
    clean = grads(q, k, v, bias, wo, wl)

    def poison(x, where):
        return jnp.where(where, jnp.nan, x)

    q, wo = (poison(x, past_q[..., None, None]) for x in (q, wo))
    k, v = (poison(x, past_k[..., None, None]) for x in (k, v))
    bias = poison(bias, past_q[:, None, :, None] | past_k[:, None, None])
    for x, y in zip(grads(q, k, v, bias, wo, poison(wl, past_q[:, None])), clean):
        np.testing.assert_array_equal(x, y)
    assert (clean[0][0, 9:] == 0).all() and (clean[1][0, 20:] == 0).all()


def test_rows_that_see_nothing_have_no_gradient(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 9, 5, 2, 2, 8))

    def loss(q, k, v):
        out, lse = jax_fa.flash_attention(q, k, v, causal=True, return_lse=True)
        return (out**2).sum() + lse[..., 4:].sum()

    dq, dk, dv = jax.grad(loss, (0, 1, 2))(q, k, v)
    assert (dq[0, :4] == 0).all() and (dq[0, 4:] != 0).any()
    assert jnp.isfinite(dk).all() and jnp.isfinite(dv).all()


def test_packed_buffers_get_one_gradient(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 17, 17, 4, 4, 16))
    w = cases.normal(rng, 2, 17, 4, 16)
    options = {"causal": True, "softcap": 2.0}

    def separate(q, k, v):
        return (w * jax_fa.flash_attention(q, k, v, **options)).sum()

    expected = jax.grad(separate, (0, 1, 2))(q, k, v)
    qkv = jax.grad(lambda x: (w * jax_fa.flash_attention_qkvpacked(x, **options)).sum())
    np.testing.assert_array_equal(qkv(jnp.stack([q, k, v], 2)), jnp.stack(expected, 2))
    kv = jax.grad(lambda q, x: (w * jax_fa.flash_attention_kvpacked(q, x, **options)).sum(), (0, 1))
    dq, dkv = kv(q, jnp.stack([k, v], 2))
    np.testing.assert_array_equal(dq, expected[0])
    np.testing.assert_array_equal(dkv, jnp.stack(expected[1:], 2))


LENGTHS_Q, LENGTHS_K = [0, 7, 1, 20, 5], [3, 7, 30, 12, 0]


@pytest.mark.parametrize(
    "names", [(), ("causal", "sinks"), ("window", "softcap"), ("causal", "dropout")]
)
def test_varlen_gradients_equal_those_of_each_row(names, rng):
    shape = cases.Shape(5, 20, 30, 4, 2, 8)
    options = cases.options_of(names, rng, shape)
    q, w = cases.normal(rng, 37, 4, 8), cases.normal(rng, 37, 4, 8)
    k, v = cases.normal(rng, 55, 2, 8), cases.normal(rng, 55, 2, 8)
    u = cases.normal(rng, 4, 37)
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)
    arrays, static = cases.split_options(options)
    key = arrays.pop("dropout_rng", None)

    def loss(q, k, v, arrays):
        out, lse = jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=20, max_seqlen_k=30, return_lse=True,
            dropout_rng=key, **arrays, **static,
        )  # fmt: skip
        return (w * out).sum() + (u * jnp.where(lse == -jnp.inf, 0, lse)).sum()

    actual = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, arrays)
    # the same rows, padded to a dense batch: gathered so that autodiff scatters back
    index_q, index_k = (
        np.minimum(np.arange(n)[None] + np.asarray(cu)[:-1, None], total - 1)
        for n, cu, total in ((20, cu_q, 37), (30, cu_k, 55))
    )

    def dense(q, k, v, arrays):
        out, lse = jax_fa.flash_attention(
            q[index_q], k[index_k], v[index_k], return_lse=True, dropout_rng=key,
            q_lengths=jnp.array(LENGTHS_Q, jnp.int32), kv_lengths=jnp.array(LENGTHS_K, jnp.int32),
            **arrays, **static,
        )  # fmt: skip
        inside = jnp.arange(20)[None] < np.array(LENGTHS_Q)[:, None]
        out = jnp.where(inside[..., None, None], w[index_q] * out, 0)
        u_rows = jnp.moveaxis(u[:, index_q], 0, 1)
        return out.sum() + jnp.where(inside[:, None] & (lse != -jnp.inf), u_rows * lse, 0).sum()

    expected = jax.jit(jax.grad(dense, (0, 1, 2, 3)))(q, k, v, arrays)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert_close(x, y, 1e-5)
    assert (actual[0][33:] == 0).all() and (actual[1][52:] == 0).all()


def test_quantized_keys_get_zeros_and_queries_their_gradient(rng):
    q, k, v = cases.qkv(rng, SHAPE)
    kq, vq = jax_fa.quantize(k, "int8"), jax_fa.quantize(v, jnp.float8_e4m3fn)

    def loss(q, k, v):
        return (jax_fa.flash_attention(q, k, v, causal=True) ** 2).sum()

    dq, dk, dv = jax.grad(loss, (0, 1, 2), allow_int=True)(q, kq, vq)
    assert_close(dq, jax.grad(loss)(q, kq.dequantize(), vq.dequantize()), 1e-5)
    assert dk.values.dtype == jax.dtypes.float0
    assert (dk.scale == 0).all() and (dv.scale == 0).all()


def test_integers_get_float0(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 5, 7, 2, 1, 8))

    def loss(lengths):
        return jax_fa.flash_attention(q, k, v, kv_lengths=lengths).sum()

    grad = jax.grad(loss, allow_int=True)(jnp.array([3, 7], jnp.int32))
    assert grad.dtype == jax.dtypes.float0


def calls(jaxpr, name):
    """How often a primitive occurs in a jaxpr, inner ones included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == name
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                count += calls(inner, name) if hasattr(inner, "eqns") else 0
    return count


POLICIES = {
    None: (2, "nothing is kept: the forward runs again"),
    ("jax_fa_out", "jax_fa_lse"): (1, "both are kept"),
    ("jax_fa_out",): (2, "a policy keeps both or the forward runs again"),
}


@pytest.mark.parametrize("names", POLICIES, ids=str)
@pytest.mark.parametrize("varlen", [False, True])
def test_remat_policies(names, varlen, rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 17, 17, 2, 2, 8))
    w = cases.normal(rng, 8, 8)
    cu = jnp.array([0, 5, 17], jnp.int32)

    def layer(q, k, v):
        q = jnp.einsum("btnh,hi->btni", q, w)
        if varlen:
            q, k, v = q[0], k[0], v[0]
            return jax_fa.flash_attention_varlen(q, k, v, cu, cu, max_seqlen_q=12, max_seqlen_k=12)
        return jax_fa.flash_attention(q, k, v, causal=True)

    policy = names and jax.checkpoint_policies.save_only_these_names(*names)
    remat = jax.checkpoint(layer, policy=policy)
    grad = jax.jit(jax.grad(lambda *x: (remat(*x) ** 2).sum(), (0, 1, 2)))
    plain = jax.grad(lambda *x: (layer(*x) ** 2).sum(), (0, 1, 2))
    jaxpr = grad.trace(q, k, v).jaxpr.jaxpr
    name = "jax_fa_varlen" if varlen else "jax_fa_fwd"
    forward, backward = (f"{name}_fwd", f"{name}_bwd") if varlen else (name, f"{name}_bwd")
    assert calls(jaxpr, forward) == POLICIES[names][0], POLICIES[names][1]
    assert calls(jaxpr, backward) == 1
    if names is None:
        for x, y in zip(grad(q, k, v), plain(q, k, v)):
            assert_close(x, y, 1e-5)


def test_gradient_through_a_scan(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 9, 9, 2, 2, 8))

    def scanned(q):
        return jax.lax.scan(lambda x, _: (jax_fa.flash_attention(x, k, v), None), q, length=3)[
            0
        ].sum()

    def unrolled(q):
        for _ in range(3):
            q = jax_fa.flash_attention(q, k, v)
        return q.sum()

    assert_close(jax.grad(scanned)(q), jax.grad(unrolled)(q), 1e-6)


def test_second_derivatives_say_that_there_are_none(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 5, 7, 2, 1, 8))
    first = jax.grad(lambda q: (jax_fa.flash_attention(q, k, v) ** 2).sum())
    with pytest.raises(NotImplementedError, match="first derivatives in reverse mode only"):
        jax.grad(lambda q: first(q).sum())(q)


def test_forward_mode_raises(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 5, 7, 2, 1, 8))
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda q: jax_fa.flash_attention(q, k, v), (q,), (q,))


def test_caches_have_no_derivative_and_say_so(rng):
    q, k = cases.normal(rng, 2, 4, 8), cases.normal(rng, 2, 9, 2, 8)
    lengths = jnp.array([3, 9], jnp.int32)
    with pytest.raises(NotImplementedError, match="use flash_attention to train"):
        jax.grad(lambda q: jax_fa.decode_attention(q, k, k, lengths).sum())(q)
