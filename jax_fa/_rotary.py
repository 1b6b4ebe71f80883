"""Rotary position embedding (Su et al. 2021)."""

import jax.numpy as jnp

from . import _sharding


def at_least_float32(dtype):
    """What a float dtype is computed in: `jnp.promote_types` refuses under strict promotion."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def rotate(x, cos, sin, interleaved):
    """Rotates the first R dims of x `[..., H]` by cos and sin `[..., R / 2]`, in float32."""
    half = cos.shape[-1]
    dtype = at_least_float32(x.dtype)
    part, rest = x[..., : 2 * half].astype(dtype), x[..., 2 * half :]
    cos, sin = cos.astype(dtype), sin.astype(dtype)
    if interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part[..., :half], part[..., half:]
    rotated = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        part = jnp.stack(rotated, axis=-1).reshape(part.shape)
    else:
        part = jnp.concatenate(rotated, axis=-1)
    return jnp.concatenate([part.astype(x.dtype), rest], axis=-1)


def apply_rotary(x, cos, sin, positions, interleaved=False):
    """Rotary position embedding: rotates pairs of dims by the angle of the token's position.

    Args:
      x: Queries or keys, `[B, T, N, H]` or packed `[total, N, H]`, any float dtype.
      cos: `[max_position, R / 2]`, float; the first `R <= H` dims are rotated.
      sin: As `cos`.
      positions: int32 `[B, T]`, `[T]` or, packed, `[total]`; clamped to `max_position - 1`.
      interleaved: Whether a pair is dims `(2 i, 2 i + 1)` (GPT-J) or `(i, i + R / 2)` (GPT-NeoX).

    Returns:
      x rotated, computed in float32, with the shape and dtype of `x`.

    Raises:
      ValueError: for shapes or dtypes that do not fit.

    Source: Su et al., RoFormer, 2021.
    """
    x, cos, sin, positions = (jnp.asarray(a) for a in (x, cos, sin, positions))
    check_tables(cos, sin, x.shape[-1])
    if x.ndim not in (3, 4):
        raise ValueError(f"x must be [B, T, N, H] or [total, N, H], got {x.shape=}")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, got {positions.dtype}")
    tokens = x.shape[:-2]
    if positions.shape not in (tokens, tokens[-1:]):
        raise ValueError(f"positions must be {tokens} or {tokens[-1:]}, got {positions.shape}")

    def call(operands):
        x, cos, sin, positions = operands
        at = jnp.clip(positions, 0, cos.shape[0] - 1)
        cos, sin = (jnp.expand_dims(table[at], -2) for table in (cos, sin))
        if cos.ndim < x.ndim:
            cos, sin = cos[None], sin[None]
        return (rotate(x, cos, sin, interleaved),)

    axes = "BTNH"[-x.ndim :]
    (out,) = _sharding.run(call, (x, cos, sin, positions), x, axes, [axes])
    return out


def check_tables(cos, sin, head_dim):
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be [max_position, R / 2], got {cos.shape} and {sin.shape}"
        )
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos must rotate at most the {head_dim} dims of a head, got {2 * cos.shape[1]}"
        )
