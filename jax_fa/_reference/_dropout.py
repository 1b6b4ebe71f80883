"""Dropout masks: Philox4x32-7 (Salmon et al. 2011) from positions.

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
    for _ in range(7):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = k0 + jnp.uint32(0x9E3779B9), k1 + jnp.uint32(0xBB67AE85)
    return c0, c1, c2, c3


def dropout_keep(seeds, head, query, key, rate):
    """Which probabilities survive.

    A call of Philox draws for 32 pairs of 16 queries and 64 keys, those that a lane of the CUDA
    kernels holds (cuda/dropout.cuh): four words for each 16 keys, the first four as they are drawn,
    the others sums modulo 2 of three of these, so that any three of all halves are independent. A
    pair survives unless the low 15 bits of its half are below `rate * 2**15`, rounded.

    All operands broadcast: seeds is a pair of uint32, head, query and key are int32.
    """
    counter = key // 64 * 4 + key % 8 // 2, query // 16 * 8 + query % 8, head
    words = jnp.broadcast_arrays(*philox((*(x.astype(jnp.uint32) for x in counter), 0), seeds))
    block, at = key // 16 % 4, key % 16 // 8 * 2 + query % 16 // 8

    def word(shift, swap):
        of = (at + shift) % 4
        x = jnp.select([of == i for i in range(3)], words[:3], words[3])
        return jnp.where(swap, x << 16 | x >> 16, x)

    others = word(1, block == 3) ^ word(2, block == 2)
    drawn = word(0, False) ^ jnp.where(block == 0, jnp.uint32(0), others)
    half = jnp.where(key % 2 == 0, drawn, drawn >> 16) & jnp.uint32(0x7FFF)
    return half >= jnp.uint32(round(rate * 32768))
