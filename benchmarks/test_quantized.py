"""Caches of 8-bit values beside the same cache in 16 bits, and what JAX offers for them today."""

import functools

import jax
from _peers import Pending, attention, implementation, jax_nn

import jax_fa

OPERATION = "quantized"
of = functools.partial(implementation, OPERATION)


def test_quantized(record):
    record(cold=True)


def attend(case):
    """Attention of the last tokens over a cache: decoding, or a chunk of a prompt."""
    if case.len_q <= 16:
        return jax_fa.decode_attention
    return lambda q, k, v, lengths: jax_fa.flash_attention(q, k, v, causal=True)


def quantized(case, x, *how):
    """The part of a `Launch` that says what it reads; one copy serves all who read the same."""
    if how in x.derived:
        return x.derived[how]
    quantize = jax.jit(lambda x: jax_fa.quantize(x, *how))
    k, v = quantize(x.k), quantize(x.v)
    moved = case.bytes(k.dtype.itemsize, 0 if k.scale is None else k.scale.shape[-1])
    return x.derived.setdefault(how, {"keys": k, "values": v, "moved": moved})


@of("jax_fa", on_cpu=True)
def jax_fa_plain(case, x):
    return attention(case, x, attend(case), x.kv_lengths)


@of("cudnn", covers=lambda c: c.len_q == 1)
def cudnn(case, x):
    return attention(case, x, jax_nn(case, "cudnn"))


def jax_fa_quantized(case, x, how):
    rest = quantized(case, x, *how)
    return Pending(attend(case), (x.q, rest["keys"], rest["values"], x.kv_lengths), rest)


def dequantized(case, x, dtype, implementation):
    """The cache made an array of the queries' type within the same jit, then attention."""
    rest = quantized(case, x, dtype)

    def fn(q, k, v):
        return jax_nn(case, implementation)(q, k.dequantize(q.dtype), v.dequantize(q.dtype))

    return Pending(fn, (x.q, rest["keys"], rest["values"]), rest)


WAYS = {  # arguments of `jax_fa.quantize`
    "int8": ("int8",),
    "e4m3": ("float8_e4m3fn",),
    "e5m2": ("float8_e5m2",),
    "e4m3 without scales": ("float8_e4m3fn", None),
    "e5m2 without scales": ("float8_e5m2", None),
    "int8 group 32": ("int8", "group", 32),
}
for name, how in WAYS.items():
    of(f"jax_fa {name}", on_cpu=True)(functools.partial(jax_fa_quantized, how=how))
for short, dtype in {"int8": "int8", "e4m3": "float8_e4m3fn"}.items():
    for one in ("xla", "cudnn"):
        of(f"{one}, {short} dequantized", on_cpu=one == "xla", covers=lambda c: c.len_q == 1)(
            functools.partial(dequantized, dtype=dtype, implementation=one)
        )
