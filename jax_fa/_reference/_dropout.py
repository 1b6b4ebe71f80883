"""Dropout masks: Philox4x32-10 (Salmon et al. 2011) from positions.

In 16-bit limbs, so that it needs no 64-bit integers.
"""

import jax.numpy as jnp


def _mul_hi_lo(a, b):
    """High and low word of a * b: a is a constant, b uint32."""
    mask = jnp.uint32(0xFFFF)
    a_lo, a_hi = jnp.uint32(a & 0xFFFF), jnp.uint32(a >> 16)
    b_lo, b_hi = b & mask, b >> 16
    low = a_lo * b_lo
    mid = a_hi * b_lo + (low >> 16)
    mid2 = a_lo * b_hi + (mid & mask)
    return a_hi * b_hi + (mid >> 16) + (mid2 >> 16), jnp.uint32(a) * b


def philox(counter, key):
    """Four uint32 words from a 4-word counter and a 2-word key; words broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + jnp.uint32(0x9E3779B9), k1 + jnp.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def dropout_keep(seeds, head, query, key, rate):
    """Which probabilities survive: 16-bit lane `key % 8` of Philox at `(key // 8, query, head, 0)`.

    All operands broadcast: seeds is a pair of uint32, head, query and key are int32.
    """
    words = philox(
        ((key // 8).astype(jnp.uint32), query.astype(jnp.uint32), head.astype(jnp.uint32), 0),
        seeds,
    )
    words = jnp.broadcast_arrays(*words)
    lane = key % 8
    word = jnp.select([lane // 2 == i for i in range(3)], words[:3], words[3])
    half = jnp.where(lane % 2 == 0, word & jnp.uint32(0xFFFF), word >> 16)
    return half < jnp.uint32(round((1 - rate) * 65536))
