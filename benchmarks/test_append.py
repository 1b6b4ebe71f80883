"""Appending: new tokens written into a donated cache, quantized where it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from _check import relative
from _peers import Pending, implementation, pages

import jax_fa

OPERATION = "append"
of = functools.partial(implementation, OPERATION)


def test_append(record):
    record(cold=True)


def append(case, x, dtype=None, paged=False):
    """Always at the same place, behind half of the capacity."""
    new = tuple(a[:, : case.len_q] for a in (x.k, x.v))
    start = case.len_kv // 2
    cache = (empty_pages if paged else empty)(case, dtype or case.dtype)
    cache = dataclasses.replace(cache, lengths=jnp.full((case.batch,), start, jnp.int32))

    def fn(cache, k, v):
        return dataclasses.replace(cache.append(k, v), lengths=cache.lengths)

    def check(cache):
        written = slice(start, start + case.len_q)
        pairs = zip((cache.k, cache.v), new, strict=True)
        got = [(contiguous(a, cache, case)[:, written], right) for a, right in pairs]
        return max(relative(a.reshape(1, -1), right.reshape(1, -1)) for a, right in got)

    quantized = isinstance(cache.k, jax_fa.QuantizedArray)
    moved = case.bytes_appended(cache.k.dtype.itemsize, int(quantized))
    # int8 rounds by 0.6 %, e4m3 by 3 %; else nothing changes
    rest = {"check": check, "limit": 4e-2 if quantized else 0.0}
    return Pending(
        fn, (cache, *new), {"keys": None, "values": None, "moved": moved, **rest}, carried=True
    )


def empty(case, dtype):
    return jax_fa.KVCache.create(case.batch, case.len_kv, case.heads_kv, case.head_dim, dtype=dtype)


def empty_pages(case, dtype):
    count = case.batch * pages(case)
    cache = jax_fa.PagedKVCache.create(
        count, case.page_size, case.batch, pages(case), case.heads_kv, case.head_dim, dtype=dtype
    )
    table = np.random.default_rng(2).permutation(count).reshape(case.batch, -1)
    return dataclasses.replace(cache, page_table=jnp.asarray(table, jnp.int32))


def contiguous(x, cache, case):
    """[B, S, K, H] of a cache's array."""
    if isinstance(x, jax_fa.QuantizedArray):
        return x.dequantize(case.dtype)
    if isinstance(cache, jax_fa.PagedKVCache):
        return x[cache.page_table].reshape(case.batch, -1, *x.shape[-2:])
    return x


@of("jax_fa", on_cpu=True)
def jax_fa_append(case, x):
    return append(case, x)


@of("jax_fa paged", on_cpu=True, covers=pages)
def jax_fa_paged(case, x):
    return append(case, x, paged=True)


@of("jax_fa int8", on_cpu=True)
def jax_fa_int8(case, x):
    return append(case, x, "int8")


@of("jax_fa e4m3", on_cpu=True)
def jax_fa_e4m3(case, x):
    return append(case, x, "float8_e4m3fn")


@of("xla", on_cpu=True)
def xla(case, x):
    """A slice of each row updated, under vmap."""
    update = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at, 0, 0)))

    def fn(cache, k, v):
        k, v = (update(old, new, cache.lengths) for old, new in ((cache.k, k), (cache.v, v)))
        return dataclasses.replace(cache, k=k, v=v)

    return dataclasses.replace(append(case, x), fn=fn)
