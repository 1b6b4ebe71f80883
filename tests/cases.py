"""Shapes and features that tests on every device share."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Shape(NamedTuple):
    """Of a dense call; len_v None: head_dim."""

    batch: int
    len_q: int
    len_kv: int
    heads: int
    heads_kv: int
    head_dim: int
    dim_v: int | None = None

    def __str__(self):
        return "-".join(str(x) for x in self if x is not None)


# irregular first: T < S, T > S, T = 1, S = 1, G in 1 2 3 8, head dims that are no tiles, Hv != H
SHAPES = [
    Shape(2, 37, 53, 6, 2, 40),
    Shape(3, 53, 37, 3, 1, 72),
    Shape(1, 63, 65, 8, 1, 96),
    Shape(2, 1, 113, 4, 2, 64),
    Shape(2, 31, 1, 2, 2, 8),
    Shape(1, 1, 1, 1, 1, 1),
    Shape(2, 17, 33, 4, 4, 24, 40),
    Shape(1, 16, 32, 5, 5, 64, 16),
]


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def qkv(rng, shape, dtype=jnp.float32):
    b, t, s, n, k, h, hv = shape
    return (
        normal(rng, b, t, n, h, dtype=dtype),
        normal(rng, b, s, k, h, dtype=dtype),
        normal(rng, b, s, k, hv or h, dtype=dtype),
    )


def _lengths(rng, batch, length):
    """One row of no token, one that is full, the rest between."""
    lengths = rng.integers(1, max(2, length), batch).astype(np.int32)
    lengths[-1] = length
    if batch > 1:
        lengths[0] = 0 if batch > 2 else length // 2
    return jnp.asarray(lengths)


def _slopes(rng, s):
    return jnp.asarray(2.0 ** -rng.uniform(1, 8, (s.batch, s.heads)), jnp.float32)


# feature -> options of flash_attention, from a generator and a shape
FEATURES = {
    "scale": lambda rng, s: {"scale": 0.37},
    "causal": lambda rng, s: {"causal": True},
    "window": lambda rng, s: {"window": (7, 4)},
    "softcap": lambda rng, s: {"softcap": 1.5},
    "alibi": lambda rng, s: {"alibi_slopes": _slopes(rng, s)},
    "sinks": lambda rng, s: {"sinks": normal(rng, s.heads)},
    "bias": lambda rng, s: {"bias": normal(rng, s.batch, 1, s.len_q, s.len_kv)},
    "q_lengths": lambda rng, s: {"q_lengths": _lengths(rng, s.batch, s.len_q)},
    "kv_lengths": lambda rng, s: {"kv_lengths": _lengths(rng, s.batch, s.len_kv)},
    "dropout": lambda rng, s: {"dropout_rate": 0.3, "dropout_rng": jax.random.key(5)},
}
PAIRS = [*((name,) for name in FEATURES), *itertools.combinations(FEATURES, 2)]
VARLEN_FEATURES = [f for f in FEATURES if f not in ("bias", "q_lengths", "kv_lengths")]
DECODE_FEATURES = ["scale", "window", "softcap", "alibi", "sinks"]


def options_of(names, rng, shape):
    options = {}
    for name in names:
        options |= FEATURES[name](rng, shape)
    return options


def oracle_options(options, batch):
    """The same options for tests/reference.py, which takes seeds instead of a key."""
    options = dict(options)
    rng = options.pop("dropout_rng", None)
    if rng is not None:
        rows = 1 if options.get("broadcast_dropout") else batch
        seeds = jax.random.bits(rng, (rows, 2), jnp.uint32)
        options["seeds"] = np.broadcast_to(np.asarray(seeds), (batch, 2))
    return options


def split_options(options):
    """Arrays, which are arguments of a jitted function, and the rest, which it closes over."""
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    return arrays, {name: x for name, x in options.items() if name not in arrays}


def cu_seqlens(lengths):
    return jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


VMAP_AXES = [(0, 0, 0), (0, None, None), (None, 0, 0), (0, 0, None)]


def mapped(rng, shape, dtype, in_axes):
    """q, k, v with three different lanes where `in_axes` has 0, one of them where it has None."""
    lanes = jnp.arange(1, 4, dtype=dtype).reshape(3, 1, 1, 1, 1) / 2
    full = [jnp.stack([x] * 3) * lanes for x in qkv(rng, shape, dtype)]
    return [x if axis == 0 else x[0] for x, axis in zip(full, in_axes)]


def lane(args, in_axes, i):
    """What lane i of `mapped` arguments is called with."""
    return [x[i] if axis == 0 else x for x, axis in zip(args, in_axes)]
