"""Gradients of `attend`, recomputed from lse block by block."""

import jax
import jax.numpy as jnp
from jax import lax

from ._core import (
    Queries,
    acc_dtype,
    bias_block,
    block_size,
    cdiv,
    chunk_bounds,
    chunk_of,
    einsum,
    keep_block,
    load_chunk,
    pad_queries,
    score,
    take_rows,
)


def attend_bwd(q, keys, values, rows, bias, chunk, params, o, lse, do, dlse):
    """Gradients of `attend`: dq `[B, T, N, H]`, dk and dv `[B, S, K, .]` per batch row of the
    queries, dsinks `[B, T, N]` or None, dbias with bias's axes N, T, S and batch B or None."""
    batch, len_q, heads_q, dim = q.shape
    acc = acc_dtype(q)
    k0, v0 = (jax.eval_shape(x.load, jnp.int32(0)) for x in (keys, values))
    heads_kv, dim_v, length = k0.shape[2], v0.shape[-1], keys.length
    block = block_size(batch, len_q, heads_q, chunk)
    count = cdiv(len_q, block)
    padded = count * block
    len_bias = None if bias is None else bias.shape[2]
    if padded != len_q:
        rows = Queries(*(pad_queries(x, 1, padded) for x in rows))
        bias = None if bias is None else pad_queries(bias, 2, padded)
        q, o, do = (jnp.pad(x, [(0, 0), (0, padded - len_q), (0, 0), (0, 0)]) for x in (q, o, do))
        lse, dlse = (jnp.pad(x, [(0, 0), (0, 0), (0, padded - len_q)]) for x in (lse, dlse))

    def one_block(i, grads):
        dq, dk, dv, dsinks, dbias = grads
        query = i * block
        r = take_rows(rows, query, block)
        valid = r.valid[..., None, None]
        q_block, o_block, do_block = (
            jnp.where(valid, lax.dynamic_slice_in_dim(x, query, block, 1).astype(acc), 0)
            for x in (q, o, do)
        )
        lse_block, dlse_block = (
            lax.dynamic_slice_in_dim(x, query, block, 2).astype(acc) for x in (lse, dlse)
        )
        dlse_block = jnp.where(lse_block == -jnp.inf, 0, dlse_block)
        delta = jnp.swapaxes((o_block * do_block).sum(-1), 1, 2) - dlse_block  # [B, N, T]
        lse_safe = jnp.where(lse_block == -jnp.inf, 0, lse_block)

        def step(c, carry):
            dq_block, dk, dv, dbias = carry
            begin, start, positions = chunk_of(keys, chunk, c)
            bias_part = bias_block(bias, query, block, start, chunk, acc)
            k, v = load_chunk(keys, start), load_chunk(values, start)
            s, slope = score(q_block, k, r, bias_part, positions, begin, params)
            p = jnp.exp(s - lse_safe[..., None])
            rows_k, rows_v = k.shape[0], v.shape[0]
            group = heads_q // heads_kv
            do_rows = do_block.reshape(batch // rows_v, rows_v, block, heads_kv, group, dim_v)
            dp = einsum("rbtkgh,bskh->rbkgts", do_rows, v).reshape(s.shape)
            p_out = p
            if params.dropout_rate:
                keep = keep_block(r, positions, heads_q, params).astype(acc)
                dp, p_out = dp * keep, p * keep
            ds = p * (dp - delta[..., None])
            ds = jnp.where(s == -jnp.inf, 0, ds)
            if dbias is not None:
                part = ds
                for axis in (1, 2, 3):
                    if bias.shape[axis] == 1:
                        part = part.sum(axis, keepdims=True)
                at = (0, 0, query if len_bias > 1 else 0, start if bias.shape[3] > 1 else 0)
                dbias = _add_at(dbias, part, at)
            ds = ds * slope
            by_key = (batch // rows_k, rows_k, heads_kv, group, block, chunk)
            dq_part = einsum("rbkgts,bskh->rbtkgh", ds.reshape(by_key), k)
            one = (batch, heads_kv, group, block, chunk)
            q_heads = q_block.reshape(batch, block, heads_kv, group, dim)
            dk_part = einsum("bkgts,btkgh->bskh", ds.reshape(one), q_heads)
            do_heads = do_block.reshape(batch, block, heads_kv, group, dim_v)
            dv_part = einsum("bkgts,btkgh->bskh", p_out.reshape(one), do_heads)
            at = (0, start, 0, 0)
            dk, dv = _add_at(dk, dk_part, at), _add_at(dv, dv_part, at)
            return dq_block + dq_part.reshape(dq_block.shape), dk, dv, dbias

        first, last = chunk_bounds(r, chunk, length)
        carry = (jnp.zeros_like(q_block), dk, dv, dbias)
        dq_block, dk, dv, dbias = lax.fori_loop(first, last, step, carry)
        dq = lax.dynamic_update_slice_in_dim(dq, dq_block, query, 1)
        if dsinks is not None:
            sinks = jnp.swapaxes(r.sinks, 1, 2).astype(acc)
            p_sink = jnp.where(lse_block == -jnp.inf, 0, jnp.exp(sinks - lse_safe))
            part = jnp.swapaxes(-p_sink * delta, 1, 2)
            dsinks = lax.dynamic_update_slice_in_dim(dsinks, part, query, 1)
        return dq, dk, dv, dsinks, dbias

    zero = jnp.where(jnp.isnan(q[:, :1, :1, :1]), 0, q[:, :1, :1, :1] * 0).astype(acc)
    grads = (
        jnp.broadcast_to(zero, q.shape),
        jnp.broadcast_to(zero, (batch, length, heads_kv, dim)),
        jnp.broadcast_to(zero, (batch, length, heads_kv, dim_v)),
        None if rows.sinks is None else jnp.broadcast_to(zero[..., 0], q.shape[:3]),
        None if bias is None else jnp.broadcast_to(zero, (batch, *bias.shape[1:])),
    )
    grads = lax.fori_loop(0, count, one_block, grads)
    dq, dk, dv, dsinks, dbias = grads
    dq = dq[:, :len_q]
    dsinks = None if dsinks is None else dsinks[:, :len_q]
    dbias = None if dbias is None else dbias[:, :, :len_bias]
    return dq, dk, dv, dsinks, dbias


def _add_at(x, part, start):
    start = [jnp.int32(i) for i in start]
    old = lax.dynamic_slice(x, start, part.shape)
    return lax.dynamic_update_slice(x, old + part, start)
