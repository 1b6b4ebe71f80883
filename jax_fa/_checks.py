"""Checks of arguments, once, before anything is bound: ValueError = wrong for any attention."""

import jax
import jax.numpy as jnp
import numpy as np

from ._limits import FLOATS
from ._quantize import QuantizedArray, is_quantized_dtype

IMPLEMENTATIONS = (None, "cuda", "reference")


def as_array(x):
    return x if isinstance(x, QuantizedArray) else jnp.asarray(x)


def implementation(value):
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {value!r}")
    return value


def shape(name, x, *allowed, form):
    """x must have one of the allowed shapes; None stands for any size."""
    for want in allowed:
        if x.ndim == len(want) and all(b is None or a == b for a, b in zip(x.shape, want)):
            return x
    raise ValueError(f"{name} must be {form}, got {tuple(x.shape)}")


def queries(name, x, rank, form):
    shape(name, x, (None,) * rank, form=form)
    if x.dtype.name not in FLOATS:
        raise ValueError(f"{name} must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    return x


def keys(name, x, q, lead, heads_q, head_dim, form):
    """Keys or values `[*lead, K, H]`, plain or quantized; returns K and H.

    lead: sizes, None for any. head_dim: None for any.
    """
    shape(name, x, (*lead, None, head_dim), form=form)
    heads = x.shape[-2]
    if heads == 0 or heads_q % heads:
        raise ValueError(f"the heads of {name} must divide the {heads_q} query heads, got {heads}")
    if isinstance(x, QuantizedArray):
        scale(name, x)
    elif x.dtype != q.dtype:
        raise ValueError(f"{name} must have the dtype of q, {q.dtype.name}, got {x.dtype.name}")
    return heads, x.shape[-1]


def scale(name, x):
    if not is_quantized_dtype(x.values.dtype):
        raise ValueError(
            f"{name}.values must be int8, float8_e4m3fn or float8_e5m2, got {x.values.dtype.name}"
        )
    if x.scale is None:
        if x.values.dtype == jnp.int8:
            raise ValueError(f"{name}.scale must be an array for int8 values, got None")
        return
    *lead, tokens, heads, dim = x.values.shape
    sizes = (*lead, heads, tokens)
    have = x.scale.shape
    fits = len(have) == len(sizes) + 1 and all(a in (1, b) for a, b in zip(have, sizes))
    if not fits or have[-1] == 0 or dim % have[-1]:
        raise ValueError(
            f"{name}.scale must be {[*sizes, 'G']} with any axis but the last 1 and G dividing "
            f"{dim}, got {tuple(have)}"
        )
    if x.scale.dtype != np.float32:
        raise ValueError(f"{name}.scale must be float32, got {x.scale.dtype.name}")


def same_heads(k_heads, v_heads):
    if k_heads != v_heads:
        raise ValueError(f"k and v must have the same heads, got {k_heads} and {v_heads}")


def int32(name, x, *allowed, form):
    """An int32 array of one of the shapes."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.dtype != np.int32:
        raise ValueError(f"{name} must be int32, got {x.dtype.name}")
    return shape(name, x, *allowed, form=form)


def layer(x, layers):
    """The layer of a stacked cache as an int32 scalar, in range where it is known."""
    number = known(x)
    x = jnp.asarray(x)
    if x.ndim or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"layer must be an integer scalar, got {x.dtype}{x.shape}")
    if number is not None and not 0 <= number < layers:
        raise ValueError(f"layer must be in [0, {layers}), got {number}")
    return x.astype(jnp.int32)


def known(x):
    """An array's numbers in numpy, or None where they are traced or of other processes.

    In numpy, because under jit an operation on known arrays is traced as any other.
    """
    if x is None or isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def counts(x, most):
    """Where counts are known, none is negative or more than the tokens that there are."""
    x = known(x)
    if x is not None and ((x < 0) | (x > most)).any():
        raise ValueError(f"counts must be in [0, {most}], got {x}")


def starts(name, x, total):
    """Where starts of packed rows are known, none is outside the tokens or below the one before."""
    x = known(x)
    if x is not None and ((x < 0) | (x > total) | (np.diff(x, prepend=0) < 0)).any():
        raise ValueError(f"{name} must never decrease and stay in [0, {total}], got {x}")


def bound(name, value):
    if not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value}")
    return int(value)


def per_head(name, x, batch, heads):
    """slopes or sinks `[N]` or `[B, N]` as float32 `[B, N]`."""
    if x is None:
        return None
    x = jnp.asarray(x)
    shape(name, x, (heads,), (batch, heads), form=f"[{heads}] or [{batch}, {heads}]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got {x.dtype.name}")
    x = x.astype(jnp.float32)
    return jnp.broadcast_to(x if x.ndim == 2 else x[None], (batch, heads))


def positive(name, value):
    """An optional positive number, 0.0 if None."""
    if value is None:
        return 0.0
    if not value > 0 or not np.isfinite(value):
        raise ValueError(f"{name} must be positive and finite, or None, got {value}")
    return float(value)


def scale_factor(value, head_dim):
    if value is None:
        return float(max(1, head_dim)) ** -0.5
    if not np.isfinite(value):
        raise ValueError(f"scale must be finite, got {value}")
    return float(value)


def window(value, causal):
    """(left, right) with -1 for unbounded."""
    if value is None:
        left = right = None
    elif isinstance(value, (int, np.integer)):
        left = right = int(value)
    else:
        try:
            left, right = value
        except (TypeError, ValueError):
            raise ValueError(
                f"window must be None, an int or (left, right), got {value!r}"
            ) from None
    for side in (left, right):
        if side is not None and (not isinstance(side, (int, np.integer)) or side < 0):
            raise ValueError(f"window must be of integers >= 0 or None, got {value!r}")
    if causal:
        right = 0
    return -1 if left is None else int(left), -1 if right is None else int(right)


def exact(q):
    """Whether products of float32 may not be rounded to TF32: what JAX's matmuls do now."""
    precise = ("highest", "float32", "F32_F32_F32")
    return q.dtype == np.float32 and jax.config.jax_default_matmul_precision in precise


def dropout(rate, rng):
    rate = float(rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")
    if rate and rng is None:
        raise ValueError(f"dropout_rng must be a key for dropout_rate={rate}, got None")
    return rate


def bias(x, batch, heads, len_q, len_kv):
    if x is None:
        return None
    x = jnp.asarray(x)
    sizes = (batch, heads, len_q, len_kv)
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, sizes)):
        raise ValueError(f"bias must be {list(sizes)} with any axis 1, got {tuple(x.shape)}")
    if x.dtype.name not in FLOATS:
        raise ValueError(f"bias must be one of {', '.join(FLOATS)}, got {x.dtype.name}")
    return x


def cu_seqlens(name, x, batch=None):
    size = None if batch is None else batch + 1
    form = "[B + 1]" if size is None else f"[{size}]"
    x = int32(name, x, (size,), form=form)
    if x.shape[0] < 1:
        raise ValueError(f"{name} must be {form}, got {tuple(x.shape)}")
    return x
