"""Hybrid batches: rows that decode one token beside rows that prefill, in one call and apart."""

import dataclasses
import functools

import jax.numpy as jnp
from _peers import (
    Pending,
    implementation,
    jax_nn,
    pages,
    pool,
    reads,
    torch_launch,
    torch_view,
)

import jax_fa

OPERATION = "hybrid"
of = functools.partial(implementation, OPERATION)


def test_hybrid(record):
    record(cold=True)


@of("jax_fa", on_cpu=True)
def jax_fa_hybrid(case, x):
    args = (x.q, x.k, x.v, x.cu_seqlens_q, x.kv_lengths)
    return Pending(jax_fa.hybrid_attention, args, reads(case, x))


@of("jax_fa paged", on_cpu=True, covers=lambda c: c.sweep != "hybrid" and pages(c))
def jax_fa_paged(case, x):
    k, v, table = pool(case, x)

    def fn(q, k, v, cu, lengths, table):
        return jax_fa.hybrid_attention(q, k, v, cu, lengths, page_table=table)

    return Pending(fn, (x.q, k, v, x.cu_seqlens_q, x.kv_lengths, table), reads(case, x))


def apart(case, x, decode, prefill):
    """The decode rows in one call, the prefill rows in another, each on arrays of its own."""
    n = case.decode_rows
    shape = (case.batch - n, case.len_q, case.heads_q, case.head_dim)
    halves = (
        (x.q[:n, None], x.k[:n, : case.len_kv], x.v[:n, : case.len_kv]),
        (x.q[n:].reshape(shape), x.k[n:, : case.prefill_kv], x.v[n:, : case.prefill_kv]),
    )

    def fn(decoding, prefilling):
        outs = []
        if n:
            outs.append(decode(*decoding).reshape(-1, *shape[2:]))
        if shape[0]:
            outs.append(prefill(*prefilling).reshape(-1, *shape[2:]))
        return outs

    return Pending(fn, halves, {"out": jnp.concatenate, **reads(case, x)})


@of("jax_fa apart", on_cpu=True)
def jax_fa_apart(case, x):
    lengths = x.kv_lengths[: case.decode_rows]
    return apart(
        case, x,
        lambda q, k, v: jax_fa.decode_attention(q, k, v, lengths),
        functools.partial(jax_fa.flash_attention, causal=True),
    )  # fmt: skip


@of("cudnn apart", covers=lambda c: c.len_q == c.prefill_kv)
def cudnn_apart(case, x):
    decoding = dataclasses.replace(case, len_q=1)
    return apart(case, x, jax_nn(decoding, "cudnn"), jax_nn(case, "cudnn"))


@of("flash-attn3-jax", "flash_attn3_jax", covers=lambda c: c.len_kv == c.prefill_kv)
def flash_attn3(case, x):
    import flash_attn3_jax

    k, v = (a.reshape(-1, *a.shape[2:]) for a in (x.k, x.v))
    starts = jnp.arange(case.batch + 1, dtype=jnp.int32) * case.len_kv
    fn = functools.partial(
        flash_attn3_jax.flash_mha_varlen, max_seqlen_q=int(case.rows[:, 0].max()),
        max_seqlen_k=case.len_kv, is_causal=True,
    )  # fmt: skip
    return Pending(fn, (x.q, k, v, x.cu_seqlens_q, starts), reads(case, x))


@of("fa3-fwd", "fa3_fwd_interface", covers=lambda c: c.dtype == "bfloat16")
def fa3_fwd(case, x):
    import fa3_fwd_interface

    q, k, v, cu, lengths = (torch_view(a) for a in (x.q, x.k, x.v, x.cu_seqlens_q, x.kv_lengths))
    longest = int(case.rows[:, 0].max())

    def run():
        return fa3_fwd_interface.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, cu_seqlens_q=cu, max_seqlen_q=longest, causal=True
        )

    return torch_launch(run, **reads(case, x))
