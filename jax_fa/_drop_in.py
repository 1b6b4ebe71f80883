"""The drop-in for jax.nn.dot_product_attention."""

import jax.numpy as jnp
import numpy as np

from . import _layout
from ._attention import _dense


def dot_product_attention(
    query, key, value, bias=None, mask=None, *, scale=None, is_causal=False,
    query_seq_lengths=None, key_value_seq_lengths=None, local_window_size=None,
    implementation=None, return_residual=False, logits_soft_cap=None,
):  # fmt: skip
    """`jax.nn.dot_product_attention` on the kernels of this library.

    Causal masks and windows are aligned top-left, as there: query i sees keys `j <= i`. It differs
    in that a query that sees no key gives 0 (there: the mean of the values), and in
    `logits_soft_cap`.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`.
      key: `[B, S, K, H]` or `[S, K, H]`.
      value: `[B, S, K, H]` or `[S, K, H]`.
      bias: `[B, N, T, S]`, any axis may be 1 and leading ones missing, added to the scores.
      mask: bool, shaped as bias: True lets a query see a key.
      scale: Multiplies the scores; `H ** -0.5` if None.
      is_causal: Whether query i sees only keys `j <= i`.
      query_seq_lengths: int32 `[B]`.
      key_value_seq_lengths: int32 `[B]`.
      local_window_size: None, `w` or `(left, right)`: query i sees keys `i - left` to `i + right`.
      implementation: None, "cuda" or "reference", as for `flash_attention`.
      return_residual: Whether to return `(out, lse)`, lse `[B, T, N]` or `[T, N]`.
      logits_soft_cap: None, or what bounds the scores (as in tokamax).

    Returns:
      `[B, T, N, H]` or `[T, N, H]`, of query's dtype.

    Raises:
      ValueError, NotImplementedError: As for `flash_attention`.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    single = query.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    bias, mask = _four_axes("bias", bias), _four_axes("mask", mask)
    if mask is not None:
        if mask.dtype != np.bool_:
            raise ValueError(f"mask must be bool, got {mask.dtype.name}")
        hidden = jnp.array(-jnp.inf, query.dtype if bias is None else bias.dtype)
        bias = jnp.where(mask, jnp.zeros_like(hidden) if bias is None else bias, hidden)
    out, lse = _dense(
        _layout.SEPARATE, (query, key, value), scale=scale, causal=is_causal,
        window=local_window_size, softcap=logits_soft_cap, bias=bias,
        q_lengths=query_seq_lengths, kv_lengths=key_value_seq_lengths, return_lse=True,
        implementation=implementation, top_left=True,
    )  # fmt: skip
    lse = jnp.swapaxes(lse, 1, 2)
    if single:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def _four_axes(name, x):
    """bias or mask `[B, N, T, S]`, leading axes of size 1 added where they are missing."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim > 4:
        raise ValueError(f"{name} must be [B, N, T, S] with any axis 1, got {x.shape}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)
