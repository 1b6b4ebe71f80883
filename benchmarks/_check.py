"""Inputs of a case, and what attention over them must give, in float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa
from jax_fa._reference import dropout_keep

ROWS = 16  # outputs that are compared

# Largest ||out - expected|| / ||expected|| of an output row. Rounding P and the output to the type
# gives about a fifth of it; TF32 products bound float32.
LIMITS = {"float16": 4e-3, "bfloat16": 2e-2, "float32": 4e-3}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Random normal inputs of a case.

    Attributes:
      q: `[B, T, N, H]`, packed `[total_q, N, H]` where rows have different numbers of queries.
      k, v: `[B, S, K, H]`.
      kv_lengths: int32 `[B]`.
      cu_seqlens_q: int32 `[B + 1]`.
      dout: As q, where gradients are measured.
      slopes: float32 `[N]` or None.
      dropout_rng: A key, where a case drops probabilities.
      derived: What implementations made of these and can share, by a key of their choice.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    kv_lengths: jax.Array
    cu_seqlens_q: jax.Array
    dout: jax.Array | None
    slopes: jax.Array | None
    dropout_rng: jax.Array | None
    derived: dict = dataclasses.field(default_factory=dict)


def inputs(case):
    """Random normal inputs; each key of a row differs from every other."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    queries, lengths = case.rows.T
    uniform = len(set(queries)) == 1 and not case.decode_rows and not case.prefill_kv
    shape = (case.batch, case.len_q) if uniform else (1, int(queries.sum()))
    q = _normal(keys[0], (*shape, case.heads_q, case.head_dim), case.dtype)
    q = q if uniform else q[0]
    capacity = int(lengths.max())
    shape = (case.batch, capacity, case.heads_kv, case.head_dim)
    dim_v = case.values_dim or case.head_dim
    slopes = 2.0 ** (-8 * np.arange(1, case.heads_q + 1) / case.heads_q)
    return Inputs(
        q=q,
        k=_normal(keys[1], shape, case.dtype),
        v=_normal(keys[2], (*shape[:-1], dim_v), case.dtype),
        kv_lengths=jnp.asarray(lengths, jnp.int32),
        cu_seqlens_q=jnp.asarray([0, *np.cumsum(queries)], jnp.int32),
        dout=_normal(keys[3], (*q.shape[:-1], dim_v), case.dtype) if case.backward else None,
        slopes=jnp.asarray(slopes, jnp.float32) if case.alibi else None,
        dropout_rng=jax.random.key(3) if case.dropout else None,
    )


def _seeds(case, x):
    """uint32 `[B, 2]`, as `flash_attention` draws them."""
    if x.dropout_rng is None:
        return np.zeros((case.batch, 2), np.uint32)
    return np.asarray(jax.random.bits(x.dropout_rng, (case.batch, 2), jnp.uint32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    """Row by row, so that no temporary is of the size of a whole cache."""
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda k: jax.random.normal(k, shape[1:], jnp.float32).astype(dtype), keys)


class Expected:
    """Sampled rows of the right result of a case, for each set of keys that is read."""

    def __init__(self, case, x):
        rng = np.random.default_rng(1)
        queries, lengths = case.rows.T
        row = rng.choice(np.flatnonzero(queries), ROWS)
        row[0] = np.flatnonzero(queries)[0]
        row[1] = np.flatnonzero(queries)[-1]
        index = rng.integers(0, queries[row])
        index[1] = queries[row[1]] - 1
        position = lengths[row] - queries[row] + index
        self.head = rng.integers(0, case.heads_q, ROWS)
        self.token = (np.cumsum(queries) - queries)[row] + index
        self._case, self._x = case, x
        self._where = {
            "row": row,
            "query_head": self.head,
            "query": index,
            "seeds": _seeds(case, x)[row],
            "head": self.head // (case.heads_q // case.heads_kv),
            "position": position,
            "low": np.maximum(position - case.window, 0) if case.window else np.zeros(ROWS, int),
            "high": np.minimum(position + 1, lengths[row]) if case.causal else lengths[row],
            "slope": np.zeros(ROWS) if x.slopes is None else np.asarray(x.slopes)[self.head],
        }
        self._of_keys = {}

    def error(self, out, keys, values):
        """Largest relative error of the sampled rows; inf if anything in `out` is not finite.

        Args:
          out: As the case's queries.
          keys, values: What they were computed from: `[B, S, K, H]`, maybe a `QuantizedArray`.
        """
        case = self._case
        if id(keys) not in self._of_keys:  # kept beside the result, so that no other has its id
            q = _rows(self._x.q.reshape(-1, case.heads_q, case.head_dim), self.token, self.head)
            where = {name: jnp.asarray(value) for name, value in self._where.items()}
            fixed = case.head_dim**-0.5, case.softcap, case.dropout
            right = _attend(q, keys, values, where, *fixed)
            self._of_keys[id(keys)] = keys, np.asarray(right)
        _, right = self._of_keys[id(keys)]
        packed = out.reshape(-1, case.heads_q, out.shape[-1])
        if not _finite(packed):
            return np.inf
        got = np.asarray(_rows(packed, self.token, self.head))
        return relative(got, right)

    def error_of_gradients(self, results, keys, values):
        """Likewise of `(out, dq, dk, dv)`: of the gradients all rows of one head."""
        case, x = self._case, self._x
        out, *gradients = results
        error = self.error(out, keys, values)
        row, head = case.batch - 1, case.heads_kv - 1
        group = case.heads_q // case.heads_kv
        heads = slice(head * group, (head + 1) * group)
        q, dout = x.q[row, :, heads], x.dout[row, :, heads]
        slopes = None if x.slopes is None else x.slopes[heads]
        right = _gradients(
            q, keys[row, :, head], values[row, :, head], dout, slopes, _seeds(case, x)[row],
            heads.start, case.causal, case.window, case.softcap, case.dropout,
        )  # fmt: skip
        dq, dk, dv = gradients
        got = dq[row, :, heads], dk[row, :, head], dv[row, :, head]
        for mine, other in zip(got, right, strict=True):
            # as a whole: single rows of a gradient can be nearly zero
            error = max(error, relative(mine.reshape(1, -1), other.reshape(1, -1)))
        return error


def relative(got, right):
    """Largest ||got - right|| / ||right|| of a row."""
    got, right = (np.asarray(x, np.float32) for x in (got, right))
    error = np.linalg.norm(got - right, axis=-1) / np.linalg.norm(right, axis=-1)
    return float(np.inf if np.isnan(error).any() else error.max())


@jax.jit
def _finite(x):
    return jnp.isfinite(x).all()


@jax.jit
def _rows(x, token, head):
    return x[token, head].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "dropout"))
def _attend(q, keys, values, where, scale, softcap, dropout):
    """[R, H] of float32 queries `[R, H]`, each over one head of one row of the keys."""

    def one(args):
        q, at = args
        k, v = (_one_head(x, at["row"], at["head"]) for x in (keys, values))
        score = scale * jnp.matmul(k, q, precision="highest")
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        j = jnp.arange(score.shape[0])
        score -= at["slope"] * jnp.abs(at["position"] - j)
        seen = (at["low"] <= j) & (j < at["high"])
        weight = jax.nn.softmax(jnp.where(seen, score, -jnp.inf))
        weight = _drop(weight, at["seeds"], at["query_head"], at["query"], j, dropout)
        return jnp.matmul(weight, jnp.where(seen[:, None], v, 0), precision="highest")

    return jax.lax.map(one, (q, where))


def _drop(weight, seeds, head, query, key, rate):
    if not rate:
        return weight
    positions = (x.astype(jnp.int32) for x in (head, query, key))
    return jnp.where(dropout_keep(tuple(seeds), *positions, rate), weight / (1 - rate), 0)


def _one_head(x, row, head):
    """[S, H] float32."""
    if not isinstance(x, jax_fa.QuantizedArray):
        return x[row, :, head].astype(jnp.float32)
    scale = x.scale
    if scale is not None:
        for i in (row, head):
            scale = scale[jnp.minimum(i, scale.shape[0] - 1)]
        scale = scale[None]
    one = jax_fa.QuantizedArray(x.values[row, :, head][:, None], scale)
    return one.dequantize()[:, 0]


@functools.partial(jax.jit, static_argnames=("head0", "causal", "window", "softcap", "dropout"))
def _gradients(q, k, v, dout, slopes, seeds, head0, causal, window, softcap, dropout):
    """float32 gradients of q `[T, G, H]` of heads from head0 on, k and v `[S, H]`."""
    len_q, heads, _ = q.shape
    i, j = jnp.arange(len_q)[:, None], jnp.arange(k.shape[0])[None]
    offset = j - (i + k.shape[0] - len_q)
    seen = (offset <= 0) | (not causal)
    if window is not None:
        seen &= offset >= -window

    def attend(q, k, v):
        score = jnp.einsum("tgh,sh->gts", q, k, precision="highest") * q.shape[-1] ** -0.5
        if softcap is not None:
            score = softcap * jnp.tanh(score / softcap)
        if slopes is not None:
            score -= slopes[:, None, None] * jnp.abs(offset)
        weight = jax.nn.softmax(jnp.where(seen, score, -jnp.inf))
        head = head0 + jnp.arange(heads)[:, None, None]
        weight = _drop(weight, seeds, head, i[None], j[None], dropout)
        return jnp.einsum("gts,sh->tgh", weight, v, precision="highest")

    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.vjp(attend, *wide)[1](dout.astype(jnp.float32))
