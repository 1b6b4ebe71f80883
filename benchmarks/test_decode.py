"""Decoding: the last tokens of each row over its cache, which comes from memory, not from L2."""

import functools

from _peers import (
    Pending,
    attention,
    few_scores,
    implementation,
    jax_nn,
    pages,
    pool,
    reads,
    torch_launch,
    torch_view,
)

import jax_fa

OPERATION = "decode"
of = functools.partial(implementation, OPERATION)


def test_decode(record):
    record(cold=True)


@of("jax_fa", on_cpu=True)
def jax_fa_decode(case, x):
    return attention(case, x, jax_fa.decode_attention, x.kv_lengths)


@of(
    "jax_fa paged", on_cpu=True,
    covers=lambda c: pages(c) and not c.sweep.endswith(("_seq", "_batch", "_tokens")),
)  # fmt: skip
def jax_fa_paged(case, x):
    k, v, table = pool(case, x)

    def fn(q, k, v, lengths, table):
        return jax_fa.decode_attention(q, k, v, lengths, page_table=table)

    return Pending(fn, (x.q, k, v, x.kv_lengths, table), reads(case, x))


def jax_nn_decode(case, x, implementation):
    if not case.ragged:
        return attention(case, x, jax_nn(case, implementation))

    def fn(q, k, v, lengths):
        return jax_nn(case, implementation)(q, k, v, key_value_seq_lengths=lengths)

    return Pending(fn, (x.q, x.k, x.v, x.kv_lengths), reads(case, x))


@of("cudnn", covers=lambda c: c.len_q == 1)
def cudnn(case, x):
    return jax_nn_decode(case, x, "cudnn")


@of("xla", on_cpu=True, covers=lambda c: c.len_q == 1 and few_scores(c))
def xla(case, x):
    return jax_nn_decode(case, x, "xla")


@of("flash-attn3-jax", "flash_attn3_jax", covers=lambda c: c.head_dim == 128)
def flash_attn3(case, x):
    import flash_attn3_jax

    # it leaves the number of splits to the caller: fill 132 multiprocessors
    longest = int(case.rows[:, 1].max())
    splits = max(1, min(32, 132 // (case.batch * case.heads_kv), longest // 256))

    def fn(q, k, v, lengths):
        return flash_attn3_jax.flash_mha_with_kvcache(
            q, k, v, cache_seqlens=lengths, is_causal=case.len_q > 1, num_splits=splits
        )

    return Pending(fn, (x.q, x.k, x.v, x.kv_lengths), reads(case, x))


@of("fa3-fwd", "fa3_fwd_interface", covers=lambda c: c.dtype == "bfloat16")
def fa3_fwd(case, x):
    import fa3_fwd_interface

    q, k, v, lengths = (torch_view(a) for a in (x.q, x.k, x.v, x.kv_lengths))

    def run():
        return fa3_fwd_interface.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, causal=case.len_q > 1
        )

    return torch_launch(run, **reads(case, x))
