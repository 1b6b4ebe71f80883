"""How q, k and v lie in memory: apart, or packed in one buffer that is never sliced into copies."""

import jax.numpy as jnp

SEPARATE, KV_PACKED, QKV_PACKED = "separate", "kvpacked", "qkvpacked"
BUFFERS = {SEPARATE: 3, KV_PACKED: 2, QKV_PACKED: 1}


def split(layout, q, k, v):
    """The views `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]` of a primitive's operands.

    kvpacked: k and v are one buffer `[B, S, 2, K, H]`. qkvpacked: all three are `[B, T, 3, N, H]`.
    """
    if layout == KV_PACKED:
        return q, k[:, :, 0], v[:, :, 1]
    if layout == QKV_PACKED:
        return q[:, :, 0], k[:, :, 1], v[:, :, 2]
    return q, k, v


def join(layout, dq, dk, dv):
    """The gradients in the layout's buffers: one, two or three of them."""
    if layout == KV_PACKED:
        return dq, jnp.stack([dk, dv], axis=2)
    if layout == QKV_PACKED:
        return (jnp.stack([dq, dk, dv], axis=2),)
    return dq, dk, dv


def shapes(layout, q, k, v):
    """Shapes of the views, from the shapes of the operands."""
    if layout == KV_PACKED:
        b, s, _, heads, dim = k
        return q, (b, s, heads, dim), (b, s, heads, dim)
    if layout == QKV_PACKED:
        b, t, _, heads, dim = q
        return ((b, t, heads, dim),) * 3
    return q, k, v
