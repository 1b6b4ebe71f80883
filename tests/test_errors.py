"""Bad input raises ValueError that says what is expected and what is there, before any kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa
from jax_fa import _primitives


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    def bind(name, *_, **__):
        raise AssertionError(f"{name} was bound")

    monkeypatch.setattr(_primitives, "bind", bind)


def f(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def i(*values):
    return jnp.array(values, jnp.int32)


Q, K = f(2, 5, 4, 8), f(2, 7, 2, 8)
QUANTIZED = jax_fa.QuantizedArray(f(2, 7, 2, 8, dtype=jnp.int8), f(2, 2, 7, 1))


def quantized(**change):
    return dataclasses.replace(QUANTIZED, **change)


def flash(q=Q, k=K, v=K, **options):
    return lambda: jax_fa.flash_attention(q, k, v, **options)


DENSE = {
    "rank of q": (flash(q=f(5, 4, 8)), r"q must be \[B, T, N, H\], got \(5, 4, 8\)"),
    "rank of k": (flash(k=f(7, 2, 8)), r"k must be \[2, S, K, 8\], got \(7, 2, 8\)"),
    "batch of k": (flash(k=f(3, 7, 2, 8)), r"k must be \[2, S, K, 8\], got \(3, 7, 2, 8\)"),
    "head dim of k": (flash(k=f(2, 7, 2, 16)), r"k must be \[2, S, K, 8\], got \(2, 7, 2, 16\)"),
    "length of v": (flash(v=f(2, 6, 2, 8)), r"v must be \[2, 7, K, Hv\], got \(2, 6, 2, 8\)"),
    "heads of v": (flash(v=f(2, 7, 4, 8)), "k and v must have the same heads, got 2 and 4"),
    "N not divisible by K": (
        flash(k=f(2, 7, 3, 8), v=f(2, 7, 3, 8)),
        "heads of k must divide the 4 query heads, got 3",
    ),
    "no heads": (flash(k=f(2, 7, 0, 8), v=f(2, 7, 0, 8)), "divide the 4 query heads, got 0"),
    "dtype of k": (
        flash(k=K.astype(jnp.bfloat16)),
        "k must have the dtype of q, float32, got bfloat16",
    ),
    "dtype of v": (
        flash(v=K.astype(jnp.float16)),
        "v must have the dtype of q, float32, got float16",
    ),
    "dtype of q": (
        flash(q=f(2, 5, 4, 8, dtype=jnp.int32)),
        "q must be one of float16, .*got int32",
    ),
    "negative window": (flash(window=-1), r"window must be of integers >= 0 or None, got -1"),
    "window of a pair": (flash(window=(3, -2)), r"window must be .* >= 0 or None, got \(3, -2\)"),
    "window of three": (
        flash(window=(1, 2, 3)),
        r"window must be None, an int or \(left, right\), got",
    ),
    "window of floats": (flash(window=(1.5, None)), r"window must be of integers"),
    "window of text": (flash(window="ab"), r"window must be"),
    "softcap 0": (flash(softcap=0.0), "softcap must be positive and finite, or None, got 0.0"),
    "softcap negative": (
        flash(softcap=-3.0),
        "softcap must be positive and finite, or None, got -3.0",
    ),
    "softcap infinite": (flash(softcap=float("inf")), "softcap must be positive and finite"),
    "scale": (flash(scale=float("nan")), "scale must be finite, got nan"),
    "implementation": (
        flash(implementation="triton"),
        r"implementation must be one of \(None, 'cuda', 'reference'\), got 'triton'",
    ),
    "lengths of the wrong dtype": (
        flash(kv_lengths=jnp.ones((2,))),
        "kv_lengths must be int32, got float32",
    ),
    "lengths of int8": (
        flash(q_lengths=jnp.ones((2,), jnp.int8)),
        "q_lengths must be int32, got int8",
    ),
    "lengths of another batch": (
        flash(q_lengths=i(1, 2, 3)),
        r"q_lengths must be \[2\], got \(3,\)",
    ),
    "slopes": (flash(alibi_slopes=f(3)), r"alibi_slopes must be \[4\] or \[2, 4\], got \(3,\)"),
    "sinks": (flash(sinks=f(4, 2)), r"sinks must be \[4\] or \[2, 4\], got \(4, 2\)"),
    "sinks of ints": (flash(sinks=i(1, 2, 3, 4)), "sinks must be floating, got int32"),
    "bias": (flash(bias=f(2, 4, 5, 6)), r"bias must be \[2, 4, 5, 7\] .* got \(2, 4, 5, 6\)"),
    "rank of bias": (flash(bias=f(5, 7)), r"bias must be \[2, 4, 5, 7\] .* got \(5, 7\)"),
    "bool bias": (flash(bias=f(2, 4, 5, 7, dtype=bool)), "bias must be one of .* got bool"),
    "dropout rate": (flash(dropout_rate=1.0), r"dropout_rate must be in \[0, 1\), got 1.0"),
    "dropout rate below 0": (
        flash(dropout_rate=-0.1),
        r"dropout_rate must be in \[0, 1\), got -0.1",
    ),
    "dropout without a key": (
        flash(dropout_rate=0.5),
        "dropout_rng must be a key for dropout_rate=0.5",
    ),
    "qkv": (
        lambda: jax_fa.flash_attention_qkvpacked(f(2, 5, 2, 4, 8)),
        r"qkv must be \[B, T, 3, N, H\], got",
    ),
    "kv": (
        lambda: jax_fa.flash_attention_kvpacked(Q, f(2, 7, 3, 2, 8)),
        r"kv must be \[B, S, 2, K, H\], got",
    ),
    "kv of another batch": (
        lambda: jax_fa.flash_attention_kvpacked(Q, f(3, 7, 2, 2, 8)),
        r"k must be \[2, S, K, 8\], got",
    ),
    "scale's shape": (
        flash(k=quantized(scale=f(2, 7, 2, 1))),
        r"k.scale must be \[2, 2, 7, 'G'\] .* got \(2, 7, 2, 1\)",
    ),
    "scale's rank": (flash(k=quantized(scale=f(2, 2, 7))), r"k.scale must be .* got \(2, 2, 7\)"),
    "scale's groups": (flash(k=quantized(scale=f(2, 2, 7, 3))), "G dividing 8, got"),
    "scale's dtype": (
        flash(k=quantized(scale=f(2, 2, 7, 1, dtype=jnp.float16))),
        "k.scale must be float32, got float16",
    ),
    "int8 without scale": (
        flash(v=quantized(scale=None)),
        "v.scale must be an array for int8 values",
    ),
    "values' dtype": (
        flash(k=quantized(values=K)),
        "k.values must be int8, float8_e4m3fn or float8_e5m2, got float32",
    ),
}


def varlen(q=f(9, 4, 8), k=f(9, 2, 8), cu_q=(0, 4, 9), cu_k=(0, 4, 9), **options):
    cu_q, cu_k = (x if isinstance(x, jax.Array) else i(*x) for x in (cu_q, cu_k))
    options = {"max_seqlen_q": 5, "max_seqlen_k": 5} | options
    return lambda: jax_fa.flash_attention_varlen(q, k, k, cu_q, cu_k, **options)


VARLEN = {
    "rank of q": (varlen(q=Q), r"q must be \[total_q, N, H\], got \(2, 5, 4, 8\)"),
    "rank of k": (varlen(k=K), r"k must be \[total_k, K, 8\], got \(2, 7, 2, 8\)"),
    "cu_seqlens_k of the wrong length": (
        varlen(cu_k=(0, 4, 7, 9)),
        r"cu_seqlens_k must be \[3\], got \(4,\)",
    ),
    "empty cu_seqlens": (
        varlen(cu_q=jnp.zeros((0,), jnp.int32)),
        r"cu_seqlens_q must be \[B \+ 1\], got \(0,\)",
    ),
    "rank of cu_seqlens": (
        varlen(cu_q=jnp.zeros((3, 1), jnp.int32)),
        r"cu_seqlens_q must be \[B \+ 1\]",
    ),
    "dtype of cu_seqlens": (
        varlen(cu_q=jnp.zeros((3,))),
        "cu_seqlens_q must be int32, got float32",
    ),
    "max_seqlen_q": (varlen(max_seqlen_q=-1), "max_seqlen_q must be an int >= 0, got -1"),
    "max_seqlen_k": (varlen(max_seqlen_k=2.5), "max_seqlen_k must be an int >= 0, got 2.5"),
    "window": (varlen(window=-2), "window must be"),
}

CACHE = f(3, 9, 2, 8)
TABLE = jnp.zeros((3, 4), jnp.int32)


def decode(q=f(3, 4, 8), k=CACHE, v=None, lengths=i(1, 2, 3), **options):
    return lambda: jax_fa.decode_attention(q, k, k if v is None else v, lengths, **options)


def hybrid(q=f(5, 4, 8), k=CACHE, cu=i(0, 2, 3, 5), lengths=i(2, 2, 3), **options):
    return lambda: jax_fa.hybrid_attention(q, k, k, cu, lengths, **options)


STACKED = jax_fa.QuantizedArray(f(2, 3, 9, 2, 8, dtype=jnp.int8), f(2, 3, 9, 2, 1))
DECODE = {
    "rank of q": (decode(q=f(3, 8)), r"q must be \[B, N, H\] or \[B, T, N, H\], got \(3, 8\)"),
    "rank of k": (decode(k=f(9, 2, 8)), r"k must be \[X, S, K, 8\] .* got \(9, 2, 8\)"),
    "rank of a stacked k": (decode(layer=0), r"k must be \[L, X, S, K, 8\] .* got \(3, 9, 2, 8\)"),
    "layers without layer": (
        decode(k=f(2, 3, 9, 2, 8)),
        r"k must be \[X, S, K, 8\] .* got \(2, 3, 9, 2, 8\)",
    ),
    "v of other rows": (
        decode(v=f(2, 9, 2, 8)),
        r"v must be \[X, S, K, Hv\] as k, got \(2, 9, 2, 8\)",
    ),
    "dtype of k": (
        decode(k=CACHE.astype(jnp.bfloat16)),
        "k must have the dtype of q, float32, got bfloat16",
    ),
    "lengths missing a row": (decode(lengths=i(1, 2)), r"kv_lengths must be \[3\], got \(2,\)"),
    "lengths of floats": (decode(lengths=f(3)), "kv_lengths must be int32, got float32"),
    "a page table of floats": (decode(page_table=f(3, 4)), "page_table must be int32, got float32"),
    "rank of the page table": (
        decode(page_table=i(1, 2, 3)),
        r"page_table must be \[3, max_pages\], got \(3,\)",
    ),
    "rows of the page table": (
        decode(page_table=TABLE[:2]),
        r"page_table must be \[3, max_pages\], got \(2, 4\)",
    ),
    "page table and batch index": (
        decode(page_table=TABLE, batch_index=i(0, 1, 2)),
        "batch_index must be None with a page_table",
    ),
    "batch_index of floats": (decode(batch_index=f(3)), "batch_index must be int32, got float32"),
    "length of batch_index": (
        decode(batch_index=i(0, 1)),
        r"batch_index must be \[3\], got \(2,\)",
    ),
    "rows without a map": (
        decode(q=f(4, 4, 8), lengths=i(1, 2, 3, 4)),
        "batch must be a multiple of the cache's 3 rows .* got 4",
    ),
    "layer of floats": (
        decode(k=f(2, 3, 9, 2, 8), layer=jnp.float32(0)),
        "layer must be an integer scalar",
    ),
    "rank of layer": (
        decode(k=f(2, 3, 9, 2, 8), layer=i(0)),
        r"layer must be an integer scalar, got int32\(1,\)",
    ),
    "scale of a stacked cache": (
        decode(k=STACKED, layer=0),
        r"k.scale must be \[2, 3, 2, 9, 'G'\] .* got \(2, 3, 9, 2, 1\)",
    ),
    "hybrid rank of q": (hybrid(q=f(2, 5, 4, 8)), r"q must be \[total_q, N, H\], got"),
    "hybrid lengths": (hybrid(lengths=i(2, 2)), r"kv_lengths must be \[3\], got \(2,\)"),
    "hybrid cu_seqlens": (hybrid(cu=f(4)), "cu_seqlens_q must be int32, got float32"),
    "split_size": (hybrid(split_size=0), "split_size must be a positive int or None, got 0"),
    "merge ranks": (
        lambda: jax_fa.merge_attention(f(2, 3), f(2)),
        r"outs must be \[parts, .., N, H\], got",
    ),
    "merge shapes": (
        lambda: jax_fa.merge_attention(f(2, 3, 5, 4, 8), f(2, 3, 5, 4)),
        r"lses must fit outs .* got \(2, 3, 5, 4\)",
    ),
}

PLAIN = jax_fa.KVCache.create(3, 9, 2, 8, dtype=jnp.float32)
LAYERS = jax_fa.KVCache.create(3, 9, 2, 8, layers=2, dtype=jnp.float32)
NEW = f(3, 2, 2, 8)


def append(k=NEW, v=None, cache=PLAIN, **options):
    return lambda: cache.append(k, k if v is None else v, **options)


def create(*sizes, kind=jax_fa.KVCache, dtype="float32", **options):
    return lambda: kind.create(*(sizes or (3, 9, 2, 8)), dtype=dtype, **options)


CACHES = {
    "more heads than the cache has": (
        append(f(3, 2, 4, 8)),
        r"k must be \[B, T, 2, 8\], got \(3, 2, 4, 8\)",
    ),
    "head dim": (append(f(3, 2, 2, 16)), r"k must be \[B, T, 2, 8\], got \(3, 2, 2, 16\)"),
    "rank": (append(f(2, 2, 8)), r"k must be \[B, T, 2, 8\], got \(2, 2, 8\)"),
    "v": (append(v=f(3, 1, 2, 8)), r"v must be \[3, 2, 2, 8\] as k, got \(3, 1, 2, 8\)"),
    "dtype": (append(f(3, 2, 2, 8, dtype=jnp.int8)), "k must be one of float16, .* got int8"),
    "dtype of v": (
        append(v=NEW.astype(jnp.bfloat16)),
        "v must have the dtype of k, float32, got bfloat16",
    ),
    "rows": (
        append(f(2, 2, 2, 8)),
        "k must have the 3 rows of the cache without batch_index, got 2",
    ),
    "counts": (append(counts=i(1, 2)), r"counts must be \[3\], got \(2,\)"),
    "counts of floats": (append(counts=f(3)), "counts must be int32, got float32"),
    "counts past T": (append(counts=i(1, 3, 2)), r"counts must be in \[0, 2\], got \[1 3 2\]"),
    "counts and cu_seqlens": (
        append(f(6, 2, 8), cu_seqlens=i(0, 2, 4, 6), counts=i(2, 2, 2)),
        "counts must be None with cu_seqlens",
    ),
    "packed rows": (
        append(f(6, 2, 8), cu_seqlens=i(0, 3, 6)),
        "k must have the 3 rows of the cache",
    ),
    "cu_seqlens past the tokens": (
        append(f(6, 2, 8), cu_seqlens=i(0, 3, 5, 7)),
        r"cu_seqlens must never decrease and stay in \[0, 6\], got \[0 3 5 7\]",
    ),
    "cu_seqlens that decrease": (
        append(f(6, 2, 8), cu_seqlens=i(0, 3, 1, 6)),
        "cu_seqlens must never decrease",
    ),
    "scales of keys alone that tokens share": (
        append(
            cache=jax_fa.KVCache(
                jax_fa.quantize(f(3, 9, 2, 8), "int8", "tensor"),
                jax_fa.quantize(f(3, 9, 2, 8), "int8"),
                i(0, 0, 0),
            )
        ),
        "scales of k and v must both be shared by tokens, or neither",
    ),
    "layer missing": (append(cache=LAYERS), "layer must be given for a cache with layers only"),
    "layer too many": (append(layer=0), "layer must be given for a cache with layers only"),
    "layer past the last": (append(cache=LAYERS, layer=2), r"layer must be in \[0, 2\), got 2"),
    "array of a layer past the last": (
        append(cache=LAYERS, layer=jnp.int32(-1)),
        r"layer must be in \[0, 2\), got -1",
    ),
    "batch_index": (append(batch_index=f(3)), "batch_index must be int32, got float32"),
    "full": (append(f(3, 10, 2, 8)), "rows must not grow past capacity 9, got 10"),
    "rotary": (
        append(rotary=(f(9, 5), f(9, 5))),
        "cos must rotate at most the 8 dims of a head, got 10",
    ),
    "rotary shapes": (
        append(rotary=(f(9, 4), f(9, 3))),
        r"cos and sin must be .* got \(9, 4\) and \(9, 3\)",
    ),
    "implementation": (append(implementation="x"), "implementation must be one of"),
    "sizes": (create(0, 9, 2, 8), "rows or pages of a cache must be a positive int, got 0"),
    "dtype of a cache": (
        create(dtype="int4"),
        "dtype must be one of .*int8, float8_e4m3fn, float8_e5m2, got int4",
    ),
    "granularity": (
        create(dtype="int8", granularity="row"),
        "granularity must be one of .* got 'row'",
    ),
    "int8 without granularity": (create(dtype="int8", granularity=None), "int8 must have scales"),
    "group size": (
        create(dtype="int8", granularity="group", group_size=3),
        "group_size must divide the head dim 8, got 3",
    ),
    "no group size": (
        create(dtype="int8", granularity="group"),
        "group_size must divide .* got None",
    ),
    "tensor without scale": (
        create(dtype="int8", granularity="tensor"),
        "k_scale must be given for granularity='tensor'",
    ),
    "scale without tensor": (
        create(dtype="int8", k_scale=2.0),
        "k_scale must be None for granularity='head', got 2.0",
    ),
    "quantize dtype": (
        lambda: jax_fa.quantize(NEW, "int4"),
        "dtype must be one of int8, .* got int4",
    ),
    "quantize rank": (lambda: jax_fa.quantize(f(2, 8), "int8"), r"x must be \[..., S, K, H\], got"),
    "quantize group": (
        lambda: jax_fa.quantize(NEW, "int8", "group", 5),
        "group_size must divide the head dim 8, got 5",
    ),
    "rotary positions": (
        lambda: jax_fa.apply_rotary(NEW, f(9, 4), f(9, 4), jnp.zeros((3, 3), jnp.int32)),
        "positions must be",
    ),
    "rotary positions of floats": (
        lambda: jax_fa.apply_rotary(NEW, f(9, 4), f(9, 4), f(2)),
        "positions must be integers, got float32",
    ),
}

ALL = {
    f"{group}: {name}": case
    for group, table in (
        ("dense", DENSE),
        ("varlen", VARLEN),
        ("decode", DECODE),
        ("cache", CACHES),
    )
    for name, case in table.items()
}


@pytest.mark.parametrize("name", ALL)
def test_bad_input_is_a_value_error(name):
    call, message = ALL[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_good_calls_reach_the_primitive():
    """So that the checks above are what raises."""
    for call in (
        flash(),
        flash(k=QUANTIZED),
        varlen(),
        decode(),
        decode(page_table=TABLE),
        hybrid(),
        append(),
    ):
        with pytest.raises(AssertionError, match="was bound"):
            call()


def test_checks_also_run_under_transforms():
    with pytest.raises(ValueError, match="softcap must be positive"):
        jax.jit(lambda q: jax_fa.flash_attention(q, K, K, softcap=-1.0))(Q)
    with pytest.raises(ValueError, match=r"k must be \[2, S, K, 8\]"):
        jax.vmap(lambda q: jax_fa.flash_attention(q, K[:1], K, causal=True))(
            np.ones((3, *Q.shape), np.float32)
        )
