"""Gradients by the kernels against the float64 gradient of the oracle (`pytest -m gpu`).

A gradient may be off by three times as much as the same formulas with the scores, probabilities and
their gradients in the input's dtype, plus an atol of that dtype; where nan and inf sit comes first.
"""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gpu import DTYPES, same_bits

import jax_fa

pytestmark = pytest.mark.gpu

ATOL = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-3}
HEAD_DIMS = [40, 64, 72, 96, 128, 160, 192, 200, 256]
NAMES = ("dq", "dk", "dv", "dbias", "dsinks")


def gradients_of_row(q, k, v, do, dlse, *, scale=None, causal=False, window=None, softcap=None,
                     slopes=None, sinks=None, bias=None, keep=None, dropout_rate=0.0,
                     top_left=False, rounded=None):  # fmt: skip
    """One row's dq, dk, dv, dbias `[N, T', S']` and dsinks `[N]`, from the formulas, as
    `reference.attention_row` has the forward's."""
    to = reference.rounding_to(rounded)
    options = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap, "slopes": slopes,
        "sinks": sinks, "bias": bias, "keep": keep, "dropout_rate": dropout_rate,
        "top_left": top_left,
    }  # fmt: skip
    out, lse = reference.attention_row(q, k, v, rounded=rounded, **options)
    q, k, v, do = (to(x) for x in (q, k, v, do))
    len_q, heads, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias, dsinks = np.zeros((heads, len_q, k.shape[0])), np.zeros(heads)
    for n in range(heads):
        seen = lse[n] > -np.inf
        safe = np.where(seen, lse[n], 0)
        raw = to(scale * (q[:, n] @ k[:, n // group].T))
        slope = np.ones_like(raw)
        if softcap:
            t = np.tanh(raw / softcap)
            raw, slope = softcap * t, 1 - t * t
        score = raw + mask_of(len_q, k.shape[0], causal, window, top_left)
        if slopes is not None:
            diagonal = np.arange(len_q)[:, None] + (0 if top_left else k.shape[0] - len_q)
            score -= slopes[n] * np.abs(diagonal - np.arange(k.shape[0]))
        if bias is not None:
            score += bias[n]
        p = np.where(seen[:, None], np.exp(score - safe[:, None]), 0)
        delta = np.where(seen, (out[:, n] * do[:, n]).sum(-1) - dlse[n], 0)
        kept = 1 if keep is None else keep[n] / (1 - dropout_rate)
        ds = p * (kept * to(do[:, n] @ v[:, n // group].T) - delta[:, None])
        dbias[n] = ds
        inner = to(ds * slope)
        dq[:, n] = to(scale * (inner @ k[:, n // group]))
        dk[:, n // group] += scale * (inner.T @ q[:, n])
        dv[:, n // group] += to(kept * p).T @ do[:, n]
        if sinks is not None:
            dsinks[n] = -(np.where(seen, np.exp(sinks[n] - safe), 0) * delta).sum()
    return dq, to(dk), to(dv), dbias, dsinks


def mask_of(len_q, len_kv, causal, window, top_left):
    """0 where a key is seen, else -inf."""
    left, right = (window, window) if isinstance(window, int) else window or (None, None)
    right = 0 if causal else right
    offset = np.arange(len_kv)[None] - np.arange(len_q)[:, None]
    offset = offset - (0 if top_left else len_kv - len_q)
    hidden = np.zeros((len_q, len_kv), bool)
    if left is not None:
        hidden |= offset < -left
    if right is not None:
        hidden |= offset > right
    return np.where(hidden, -np.inf, 0)


def oracle(q, k, v, do, dlse, *, q_lengths=None, kv_lengths=None, alibi_slopes=None, sinks=None,
           bias=None, dropout_rate=0.0, seeds=None, **options):  # fmt: skip
    """Gradients by name of a dense call; dsinks `[B, N]`, dbias of bias's shape."""
    q, k, v, do, dlse, slopes, sinks, wide = (
        reference.as_float64(x) for x in (q, k, v, do, dlse, alibi_slopes, sinks, bias)
    )
    batch, len_q, heads, _ = q.shape
    len_kv = k.shape[1]
    slopes, sinks = (
        None if x is None else np.broadcast_to(x, (batch, heads)) for x in (slopes, sinks)
    )
    if wide is not None:
        wide = np.broadcast_to(wide, (batch, heads, len_q, len_kv))
    grads = [np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)]
    dbias, dsinks = np.zeros((batch, heads, len_q, len_kv)), np.zeros((batch, heads))
    for b in range(batch):
        t = len_q if q_lengths is None else int(q_lengths[b])
        s = len_kv if kv_lengths is None else int(kv_lengths[b])
        keep = None
        if dropout_rate:
            keep = reference.dropout_keep(seeds[b], heads, t, s, dropout_rate, False)
        parts = gradients_of_row(
            q[b, :t], k[b, :s], v[b, :s], do[b, :t], dlse[b, :, :t],
            slopes=None if slopes is None else slopes[b],
            sinks=None if sinks is None else sinks[b],
            bias=None if wide is None else wide[b, :, :t, :s], keep=keep,
            dropout_rate=dropout_rate, **options,
        )  # fmt: skip
        for x, part, size in zip(grads, parts, (t, s, s)):
            x[b, :size] = part
        dbias[b, :, :t, :s], dsinks[b] = parts[3:]
    out = dict(zip(NAMES, grads))
    if bias is not None:
        axes = tuple(i for i in range(4) if bias.shape[i] == 1)
        out["dbias"] = dbias.sum(axes, keepdims=True)
    if sinks is not None:
        out["dsinks"] = dsinks
    return out


def cotangents(rng, q, dtype, dim_v=None):
    """do and dlse; lse's where a row sees nothing is not used."""
    *lead, len_q, heads, dim = q.shape
    return (
        cases.normal(rng, *lead, len_q, heads, dim_v or dim, dtype=dtype),
        cases.normal(rng, *lead, heads, len_q),
    )


def vjp_of(fn):
    """Gradients by name of fn(q, k, v, **arrays) -> out, lse."""

    @jax.jit
    def grads(q, k, v, arrays, do, dlse):
        floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        rest = {name: x for name, x in arrays.items() if name not in floats}
        _, vjp = jax.vjp(lambda q, k, v, floats: fn(q, k, v, **floats, **rest), q, k, v, floats)
        dq, dk, dv, dfloats = vjp((do, dlse))
        return {"dq": dq, "dk": dk, "dv": dv, **{f"d{name}": x for name, x in dfloats.items()}}

    return grads


def run_dense(q, k, v, do, dlse, options, **fixed):
    arrays, static = cases.split_options(options)

    def fn(q, k, v, **arrays):
        return jax_fa.flash_attention(q, k, v, return_lse=True, **arrays, **static, **fixed)

    return vjp_of(fn)(q, k, v, arrays, do, dlse)


def compare(actual, expected, low, dtype):
    """Every gradient under the rule; those of ALiBi's slopes are 0."""
    for name, x in actual.items():
        if name == "dalibi_slopes":
            assert (x == 0).all()
            continue
        y, z = expected[name], low[name]
        if x.ndim < y.ndim:  # sinks of all rows
            y, z = y.sum(0), z.sum(0)
        seen = np.isfinite(y)
        error = np.abs(np.where(seen, z, 0) - np.where(seen, y, 0))
        size = np.abs(np.where(seen, y, 0)).max(initial=0)
        atol = ATOL[dtype] * max(1.0, size / 4)
        reference.assert_close(x, y, 3 * error.max(initial=0) + atol, name)


def check_dense(shape, dtype, options, rng, **fixed):
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    do, dlse = cotangents(rng, q, jnp.dtype(dtype), shape.dim_v)
    actual = run_dense(q, k, v, do, dlse, options, **fixed)
    assert all(actual[name].dtype == jnp.dtype(dtype) for name in NAMES[:3])
    options = cases.oracle_options(options, shape.batch)
    low = oracle(q, k, v, do, dlse, rounded=jnp.dtype(dtype), **options)
    compare(actual, oracle(q, k, v, do, dlse, **options), low, dtype)


# --- dense ---


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype, deterministic, rng):
    shape = cases.Shape(1, 149, 217, 4, 2, head_dim)
    check_dense(shape, dtype, {"causal": True}, rng, deterministic=deterministic)


VALUE_DIMS = [(64, 128), (128, 64), (40, 72), (72, 96), (192, 128), (64, 160), (256, 96)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", VALUE_DIMS, ids=str)
def test_values_of_another_head_dim(dims, dtype, deterministic, rng):
    shape = cases.Shape(2, 149, 217, 4, 2, *dims)
    check_dense(shape, dtype, {"causal": True}, rng, deterministic=deterministic)


@pytest.mark.parametrize(
    "names",
    [
        ("causal", "softcap"), ("bias", "sinks"), ("window", "alibi", "q_lengths", "kv_lengths"),
        ("causal", "dropout"),
    ],
    ids="-".join,
)  # fmt: skip
@pytest.mark.parametrize("dims", [(64, 128), (128, 64), (192, 128)], ids=str)
def test_features_with_values_of_another_head_dim(dims, names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, *dims)
    check_dense(shape, "bfloat16", cases.options_of(names, rng, shape), rng)


def test_heads_without_a_kernel_have_gradients(rng):
    check_dense(cases.Shape(1, 65, 99, 4, 1, 512), "bfloat16", {"causal": True}, rng)


@pytest.mark.parametrize("names", cases.PAIRS, ids="-".join)
def test_features(names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, 64)
    check_dense(shape, "bfloat16", cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("names", [(name,) for name in cases.FEATURES], ids="-".join)
def test_features_without_atomics(names, rng):
    shape = cases.Shape(3, 113, 139, 6, 2, 64)
    options = cases.options_of(names, rng, shape)
    check_dense(shape, "float16", options, rng, deterministic=True)


@pytest.mark.parametrize(
    "names",
    [
        ("causal", "softcap"),
        ("bias", "sinks"),
        ("window", "alibi", "kv_lengths"),
        ("dropout",),
        ("causal", "softcap", "dropout"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize(
    "dtype, head_dim",
    [("float16", 128), ("float32", 96), ("bfloat16", 96), ("float16", 192), ("bfloat16", 256)],
)
def test_features_of_other_dtypes(dtype, head_dim, names, rng):
    shape = cases.Shape(2, 67, 131, 4, 4, head_dim)
    check_dense(shape, dtype, cases.options_of(names, rng, shape), rng)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale_that_is_not_positive(scale, rng):
    shape = cases.Shape(1, 65, 99, 2, 1, 64)
    check_dense(shape, "bfloat16", {"scale": scale, "causal": True}, rng)


SIZES = [(1, 1), (1, 3), (3, 1), (63, 65), (65, 63), (1, 1023), (239, 113), (129, 1023), (799, 799)]


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("len_q, len_kv", SIZES)
def test_sizes(len_q, len_kv, group, rng):
    shape = cases.Shape(2, len_q, len_kv, group, 1, 64)
    check_dense(shape, "bfloat16", {"causal": True, "window": (300, None)}, rng)


@pytest.mark.parametrize("group", [2, 5, 7, 16])
def test_groups(group, rng):
    check_dense(cases.Shape(1, 77, 199, 2 * group, 2, 128), "float16", {"causal": True}, rng)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (200, 30)}], ids=str)
@pytest.mark.parametrize(
    "dtype, head_dim",
    [("bfloat16", 64), ("float16", 96), ("bfloat16", 128), ("float16", 192), ("bfloat16", 256)],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_more_tiles_of_keys_than_multiprocessors(deterministic, dtype, head_dim, options, rng):
    shape = cases.Shape(4, 300, 700, 12, 6, head_dim)
    check_dense(shape, dtype, options, rng, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [128, 200])
@pytest.mark.parametrize("deterministic", [False, True])
def test_lengths_that_leave_whole_tiles_of_keys_to_nobody(deterministic, head_dim, rng):
    options = {
        "q_lengths": jnp.array([300, 0, 129, 64], jnp.int32),
        "kv_lengths": jnp.array([400, 77, 0, 128], jnp.int32),
        "causal": True,
    }
    shape = cases.Shape(4, 300, 400, 4, 2, head_dim)
    check_dense(shape, "bfloat16", options, rng, deterministic=deterministic)


@pytest.mark.parametrize(
    "shape",
    [
        cases.Shape(4, 300, 640, 8, 8, 128),
        cases.Shape(80, 64, 128, 8, 8, 64),
        cases.Shape(4, 300, 640, 8, 8, 256),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_blocks_that_take_keys_of_nobody_after_others(deterministic, shape, rng):
    """More tiles than multiprocessors, with keys that half of a block or all of it skips."""
    lengths = jnp.full(shape.batch, 60, jnp.int32)
    check_dense(shape, "bfloat16", {"kv_lengths": lengths}, rng, deterministic=deterministic)


@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("float32", 128)])
@pytest.mark.parametrize(
    "axes",
    [(1, 1, 1, 1), (2, 4, 1, 1), (1, 1, 65, 1), (1, 4, 1, 331), (2, 1, 65, 331), (2, 4, 65, 331)],
    ids=str,
)
def test_gradient_of_a_bias_is_summed_where_it_is_broadcast(axes, dtype, head_dim, rng):
    bias = cases.normal(rng, *axes, dtype=jnp.float32)
    shape = cases.Shape(2, 65, 331, 4, 2, head_dim)
    check_dense(shape, dtype, {"bias": bias, "causal": True}, rng)


def test_bias_of_16_bits_and_minus_infinity(rng):
    shape = cases.Shape(2, 65, 131, 4, 2, 64)
    bias = cases.normal(rng, 1, 2, 65, 131).at[:, :, :, 30:90].set(-jnp.inf)
    bias = jnp.tile(bias.at[:, 1, 7].set(-jnp.inf), (1, 2, 1, 1)).astype(jnp.bfloat16)
    check_dense(shape, "bfloat16", {"bias": bias}, rng)


def test_top_left_masks(rng):
    """Those of the drop-in, whose causal mask is aligned at the first query and key."""
    q, k, v = cases.qkv(rng, cases.Shape(2, 65, 131, 4, 2, 64), jnp.bfloat16)
    do, dlse = cotangents(rng, q, jnp.bfloat16)

    def fn(q, k, v):
        return jax_fa.dot_product_attention(q, k, v, is_causal=True), jnp.zeros_like(dlse)

    actual = vjp_of(fn)(q, k, v, {}, do, dlse)
    args, options = (q, k, v, do, jnp.zeros_like(dlse)), {"causal": True, "top_left": True}
    low = oracle(*args, rounded=jnp.bfloat16, **options)
    compare(actual, oracle(*args, **options), low, "bfloat16")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "dtype, head_dim",
    [*((dtype, 64) for dtype in DTYPES), ("bfloat16", 192), ("bfloat16", 256), ("float16", 256)],
)
def test_poison_past_lengths_never_reaches_gradients(dtype, head_dim, with_bias, rng):
    shape = cases.Shape(3, 97, 139, 4, 2, head_dim)
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    do, dlse = cotangents(rng, q, jnp.dtype(dtype))
    options = {
        "q_lengths": jnp.array([70, 97, 0], jnp.int32),
        "kv_lengths": jnp.array([33, 0, 100], jnp.int32),
        "causal": True, "sinks": cases.normal(rng, 4),
    }  # fmt: skip
    if with_bias:
        options["bias"] = cases.normal(rng, 3, 4, 97, 139)
    clean = run_dense(q, k, v, do, dlse, options, deterministic=True)
    past_q = jnp.arange(97)[None] >= options["q_lengths"][:, None]
    past_k = jnp.arange(139)[None] >= options["kv_lengths"][:, None]
    q, do = (jnp.where(past_q[..., None, None], jnp.nan, x) for x in (q, do))
    k, v = (jnp.where(past_k[..., None, None], jnp.nan, x) for x in (k, v))
    dlse = jnp.where(past_q[:, None], jnp.nan, dlse)
    if with_bias:
        past = past_q[:, None, :, None] | past_k[:, None, None]
        options["bias"] = jnp.where(past, jnp.nan, options["bias"])
    same_bits(run_dense(q, k, v, do, dlse, options, deterministic=True), clean)
    dirty = run_dense(q, k, v, do, dlse, options)
    for name, x in dirty.items():
        reference.assert_close(x, clean[name], 5e-2, name)
    assert (dirty["dk"][0, 33:] == 0).all() and (dirty["dq"][0, 70:] == 0).all()


@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 64), ("float16", 128)])
def test_packed_buffers_get_one_gradient(dtype, head_dim, rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 113, 113, 4, 4, head_dim), jnp.dtype(dtype))
    do, dlse = cotangents(rng, q, jnp.dtype(dtype))
    options = {"causal": True, "return_lse": True, "deterministic": True}
    expected = run_dense(q, k, v, do, dlse, {"causal": True}, deterministic=True)
    expected = [expected[name] for name in NAMES[:3]]

    @jax.jit
    def packed(qkv, q, kv):
        _, one = jax.vjp(lambda x: jax_fa.flash_attention_qkvpacked(x, **options), qkv)
        _, two = jax.vjp(lambda q, x: jax_fa.flash_attention_kvpacked(q, x, **options), q, kv)
        return one((do, dlse))[0], two((do, dlse))

    one, (dq, dkv) = packed(jnp.stack([q, k, v], 2), q, jnp.stack([k, v], 2))
    same_bits([one[:, :, i] for i in range(3)], expected)
    same_bits([dq, dkv[:, :, 0], dkv[:, :, 1]], expected)


# --- varlen ---

LENGTHS_Q, LENGTHS_K = [0, 70, 1, 0, 129, 5], [3, 70, 200, 0, 131, 0]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "names", [(), ("causal",), ("causal", "sinks"), ("window", "softcap"), ("causal", "alibi"),
              ("causal", "dropout")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "dtype, dim, dim_v",
    [
        ("bfloat16", 64, 64), ("float16", 128, 128), ("float32", 72, 72), ("bfloat16", 128, 64),
        ("bfloat16", 40, 128), ("bfloat16", 256, 256), ("float16", 160, 192),
    ],
)  # fmt: skip
def test_varlen(dtype, dim, dim_v, names, deterministic, rng):
    """Padded to a dense batch it is the same call; 5 queries and 7 keys belong to no row."""
    total_q, total_k = sum(LENGTHS_Q) + 5, sum(LENGTHS_K) + 7
    shape = cases.Shape(6, 129, 200, 4, 2, dim, dim_v)
    options = cases.options_of(names, rng, shape)
    arrays, static = cases.split_options(options)
    dtype_ = jnp.dtype(dtype)
    q = cases.normal(rng, total_q, 4, dim, dtype=dtype_)
    k, v = (cases.normal(rng, total_k, 2, d, dtype=dtype_) for d in (dim, dim_v))
    do, dlse = cotangents(rng, q, dtype_, dim_v)
    cu_q, cu_k = cases.cu_seqlens(LENGTHS_Q), cases.cu_seqlens(LENGTHS_K)

    def fn(q, k, v, **arrays):
        return jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=129, max_seqlen_k=200, return_lse=True,
            deterministic=deterministic, **arrays, **static,
        )  # fmt: skip

    actual = vjp_of(fn)(q, k, v, arrays, do, dlse)

    def rows_of(x, cu, size):
        rows = np.zeros((6, size, *x.shape[1:]))
        for b, (start, end) in enumerate(itertools.pairwise(np.asarray(cu))):
            rows[b, : end - start] = reference.as_float64(x)[start:end]
        return rows

    wanted = cases.oracle_options(options, 6)

    def expected(rounded):
        lengths = {"q_lengths": LENGTHS_Q, "kv_lengths": LENGTHS_K}
        padded = (rows_of(x, cu, n) for x, cu, n in (
            (q, cu_q, 129), (k, cu_k, 200), (v, cu_k, 200), (do, cu_q, 129)))  # fmt: skip
        rows_lse = np.moveaxis(rows_of(np.asarray(dlse).T, cu_q, 129), 1, 2)
        out = oracle(*padded, rows_lse, rounded=rounded, **lengths, **wanted)
        for name, lengths, total in (
            ("dq", LENGTHS_Q, total_q), ("dk", LENGTHS_K, total_k), ("dv", LENGTHS_K, total_k)
        ):  # fmt: skip
            flat = np.concatenate([x[:n] for x, n in zip(out[name], lengths)])
            out[name] = np.pad(flat, [(0, total - len(flat)), (0, 0), (0, 0)])
        return out

    compare(actual, expected(None), expected(jnp.dtype(dtype)), dtype)
    assert (actual["dq"][-5:] == 0).all() and (actual["dk"][-7:] == 0).all()


# --- order, transforms ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window": (250, 40)}, {"dropout_rate": 0.2}], ids=str
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_deterministic_reruns_have_the_same_bits(with_bias, mask, head_dim, dtype, rng):
    shape = cases.Shape(5, 439, 1517, 8, 4, head_dim)  # more tiles of keys than multiprocessors
    q, k, v = cases.qkv(rng, shape, jnp.dtype(dtype))
    do, dlse = cotangents(rng, q, jnp.dtype(dtype))
    options = {"sinks": cases.normal(rng, 8), "dropout_rng": jax.random.key(5), **mask}
    if with_bias:
        options["bias"] = cases.normal(rng, 1, 1, 1, 1)
    first = run_dense(q, k, v, do, dlse, options, deterministic=True)
    for _ in range(3):
        same_bits(run_dense(q, k, v, do, dlse, options, deterministic=True), first)


@pytest.mark.parametrize("in_axes", cases.VMAP_AXES, ids=str)
def test_vmap_of_grad_equals_a_loop(in_axes, rng):
    shape = cases.Shape(2, 65, 99, 4, 2, 64)
    args = cases.mapped(rng, shape, jnp.bfloat16, in_axes)

    def loss(q, k, v):
        out, lse = jax_fa.flash_attention(q, k, v, causal=True, return_lse=True, deterministic=True)
        return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

    grad = jax.grad(loss, (0, 1, 2))
    nested = jax.jit(jax.vmap(grad, in_axes))(*args)
    for i in range(3):
        one = jax.jit(grad)(*cases.lane(args, in_axes, i))
        same_bits([x[i] for x in nested], one)


def test_varlen_with_a_long_tail_of_padding(rng):
    q = cases.normal(rng, 50, 4, 64, dtype=jnp.bfloat16)
    k, v = (cases.normal(rng, 20000, 2, 64, dtype=jnp.bfloat16) for _ in "kv")
    do, dlse = cotangents(rng, q, jnp.bfloat16)
    cu_q, cu_k = cases.cu_seqlens([50]), cases.cu_seqlens([200])

    def fn(q, k, v):
        return jax_fa.flash_attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=50, max_seqlen_k=200, return_lse=True
        )

    actual = vjp_of(fn)(q, k, v, {}, do, dlse)
    dense = run_dense(q[None], k[None, :200], v[None, :200], do[None], dlse[None], {})
    assert (actual["dk"][200:] == 0).all() and (actual["dv"][200:] == 0).all()
    for name, size in (("dq", 50), ("dk", 200), ("dv", 200)):
        reference.assert_close(actual[name][:size], dense[name][0], 5e-2, name)


def test_vmap_of_grad_of_varlen_equals_a_loop(rng):
    q, k = (cases.normal(rng, 3, n, h, 64, dtype=jnp.bfloat16) for n, h in ((90, 4), (140, 2)))
    cu_q, cu_k = cases.cu_seqlens([5, 0, 85]), cases.cu_seqlens([60, 3, 70])

    def loss(q, k):
        out = jax_fa.flash_attention_varlen(
            q, k, k, cu_q, cu_k, max_seqlen_q=85, max_seqlen_k=70, causal=True, deterministic=True
        )
        return (out.astype(jnp.float32) ** 2).sum()

    grad = jax.grad(loss, (0, 1))
    for k_axis in (0, None):
        keys = k if k_axis == 0 else k[0]
        nested = jax.jit(jax.vmap(grad, (0, k_axis)))(q, keys)
        for i in range(3):
            one = jax.jit(grad)(q[i], k[i] if k_axis == 0 else keys)
            same_bits([x[i] for x in nested], one)


def test_layers_under_scan_and_remat(rng):
    q, k, v = cases.qkv(rng, cases.Shape(2, 65, 65, 4, 4, 64), jnp.bfloat16)

    def layer(x, _):
        out = jax_fa.flash_attention(x, k, v, causal=True, deterministic=True)
        return x + out, None

    def total(layer, x):
        return jax.lax.scan(layer, x, length=3)[0].astype(jnp.float32).sum()

    names = jax.checkpoint_policies.save_only_these_names("jax_fa_out", "jax_fa_lse")
    expected = jax.jit(jax.grad(lambda x: total(layer, x)))(q)
    for policy in (None, names):
        remat = jax.checkpoint(layer, policy=policy)
        same_bits(jax.jit(jax.grad(lambda x, f=remat: total(f, x)))(q), expected)


def test_quantized_keys_run_through_the_reference(rng):
    q, k, v = cases.qkv(rng, cases.Shape(1, 33, 65, 4, 2, 64), jnp.bfloat16)
    kq, vq = jax_fa.quantize(k, "int8"), jax_fa.quantize(v, "int8")

    def loss(q, k, v):
        return (jax_fa.flash_attention(q, k, v, causal=True).astype(jnp.float32) ** 2).sum()

    actual = jax.jit(jax.grad(loss))(q, kq, vq)
    wide = [x.dequantize(jnp.bfloat16) for x in (kq, vq)]
    reference.assert_close(actual, jax.jit(jax.grad(loss))(q, *wide), 0.1)


# --- tiny cases, for compute-sanitizer ---


@pytest.mark.sanitize
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", [(d, d) for d in (40, 64, 96, 128, 192, 256)] + [(64, 128)], ids=str
)
def test_sanitize_gradients(dims, dtype, deterministic, rng):
    shape = cases.Shape(2, 17, 35, 2, 1, *dims)
    names = ("causal", "softcap", "alibi", "sinks", "bias", "kv_lengths")
    options = cases.options_of(names, rng, shape)
    check_dense(shape, dtype, options, rng, deterministic=deterministic)
    check_dense(shape, dtype, {"causal": True}, rng, deterministic=deterministic)
    dropout = cases.options_of(("causal", "dropout"), rng, shape)
    check_dense(shape, dtype, dropout, rng, deterministic=deterministic)
