"""Prefill: many queries over as many keys, forward, and with `--backward` gradients too."""

import functools
import importlib.util
import sys
import unittest.mock

import numpy as np
from _peers import (
    Pending,
    attention,
    few_scores,
    first,
    implementation,
    jax_nn,
    plain,
    reads,
    torch_launch,
    torch_view,
    window,
)

import jax_fa

OPERATION = "prefill"
of = functools.partial(implementation, OPERATION)


def test_prefill(record):
    record(cold=False)


def options(case, x):
    return {
        "causal": case.causal,
        "window": None if case.window is None else (case.window, 0),
        "softcap": case.softcap,
        "alibi_slopes": x.slopes,
        "dropout_rate": case.dropout,
        "dropout_rng": x.dropout_rng,
    }


def packed(case, x, fn):
    """Of `fn(q, k, v, cu_seqlens)` for rows with as many keys as queries."""
    row, index = np.nonzero(np.arange(x.k.shape[1]) < case.rows[:, 1:])
    k, v = (a[row, index] for a in (x.k, x.v))
    return Pending(fn, (x.q, k, v, x.cu_seqlens_q), reads(case, x))


@of("jax_fa", on_cpu=True)
def jax_fa_prefill(case, x):
    if not case.ragged:
        return attention(case, x, functools.partial(jax_fa.flash_attention, **options(case, x)))
    longest = int(case.rows.max())

    def fn(q, k, v, cu):
        return jax_fa.flash_attention_varlen(
            q, k, v, cu, cu, max_seqlen_q=longest, max_seqlen_k=longest, **options(case, x)
        )

    return packed(case, x, fn)


@of("jax_fa deterministic", on_cpu=True, covers=lambda c: c.backward)
def jax_fa_deterministic(case, x):
    fn = functools.partial(jax_fa.flash_attention, deterministic=True, **options(case, x))
    return attention(case, x, fn)


@of("cudnn", covers=plain)
def cudnn(case, x):
    return attention(case, x, jax_nn(case, "cudnn"))


@of("xla", on_cpu=True, covers=lambda c: plain(c) and few_scores(c))
def xla(case, x):
    return attention(case, x, jax_nn(case, "xla"))


@of(
    "flash-attn3-jax", "flash_attn3_jax",
    covers=lambda c: c.head_dim == 128 and not (c.softcap or c.alibi or c.dropout),
)  # fmt: skip
def flash_attn3(case, x):
    import flash_attn3_jax

    options = {"is_causal": case.causal, "window_size": window(case)}
    if not case.ragged:
        return attention(case, x, functools.partial(flash_attn3_jax.flash_mha, **options))
    longest = int(case.rows.max())
    fn = functools.partial(
        flash_attn3_jax.flash_mha_varlen, max_seqlen_q=longest, max_seqlen_k=longest, **options
    )
    return packed(case, x, fn)


@of("tokamax", "tokamax", covers=lambda c: plain(c) and c.len_q >= 64)
def tokamax(case, x):
    if "tokamax" not in sys.modules and not importlib.util.find_spec("xprof"):
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):  # imported, not for attention
            sys.modules[name] = unittest.mock.MagicMock()
    import tokamax

    fn = functools.partial(
        tokamax.dot_product_attention, is_causal=case.causal, implementation="mosaic",
        local_window_size=None if case.window is None else (case.window, 0),
    )  # fmt: skip
    return attention(case, x, fn)


@of(
    "pallas",
    covers=lambda c: plain(c) and c.dtype == "float16" and not (c.window or c.backward)
    and c.len_q % 256 == 0,
)  # fmt: skip
def pallas(case, x):
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    block = 64 if case.head_dim > 128 else 128
    config = attention_mgpu.TuningConfig(
        block_q=block, block_kv=block, max_concurrent_steps=2, causal=case.causal
    )
    scaled = (x.q * case.head_dim**-0.5).astype(x.q.dtype)  # it has no scale of its own
    fn = functools.partial(attention_mgpu.attention, config=config)
    return Pending(fn, (scaled, x.k, x.v), reads(case, x))


def sdpa(case, x, backend):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch_view(a).transpose(1, 2) for a in (x.q, x.k, x.v))

    def forward(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=case.causal and case.len_q > 1,
                enable_gqa=case.heads_q != case.heads_kv,
            )  # fmt: skip

    if not case.backward:
        return torch_launch(lambda: forward(q, k, v).transpose(1, 2), **reads(case, x))
    dout = torch_view(x.dout).transpose(1, 2)

    def with_gradients():
        inputs = [a.detach().requires_grad_() for a in (q, k, v)]
        out = forward(*inputs)
        gradients = torch.autograd.grad(out, inputs, dout)
        return tuple(a.transpose(1, 2) for a in (out.detach(), *gradients))

    return torch_launch(with_gradients, **reads(case, x))


@of("torch-flash", "torch", covers=lambda c: plain(c) and not c.window)
def torch_flash(case, x):
    return sdpa(case, x, "FLASH_ATTENTION")


@of("torch-cudnn", "torch", covers=lambda c: plain(c) and not c.window)
def torch_cudnn(case, x):
    return sdpa(case, x, "CUDNN_ATTENTION")


@of(
    "fa3-fwd", "fa3_fwd_interface",
    covers=lambda c: c.dtype == "bfloat16" and not (c.alibi or c.dropout or c.backward),
)  # fmt: skip
def fa3_fwd(case, x):
    import fa3_fwd_interface

    options = {"causal": case.causal, "window_size": window(case), "softcap": case.softcap or 0.0}
    if not case.ragged:
        q, k, v = (torch_view(a) for a in (x.q, x.k, x.v))
        return torch_launch(
            lambda: first(fa3_fwd_interface.flash_attn_func(q, k, v, **options)), **reads(case, x)
        )
    q, k, v, cu = (torch_view(a) for a in packed(case, x, None).args)
    longest = int(case.rows.max())

    def run():
        return fa3_fwd_interface.flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, **options
        )

    return torch_launch(run, **reads(case, x))
