"""Arrays of 8-bit values with scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

GRANULARITIES = ("tensor", "token", "head", "group", None)
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array `values * scale`: keys or values of a cache, or of any attention call.

    Attributes:
      values: int8, float8_e4m3fn or float8_e5m2, `[..., S, K, H]`.
      scale: float32 `[..., K, S, G]`: `G` scales along `H` for each head of each token. Any axis
        but the last may be 1. None: the values stand for themselves (fp8 only).
    """

    values: jax.Array
    scale: jax.Array | None

    @property
    def shape(self):
        return self.values.shape

    @property
    def ndim(self):
        return self.values.ndim

    @property
    def dtype(self):
        return self.values.dtype

    def dequantize(self, dtype=jnp.float32):
        """`values * scale` as an array of `dtype`, shaped as the values."""
        if self.scale is None:
            return self.values.astype(dtype)
        *shape, dim = self.values.shape
        groups = self.scale.shape[-1]
        scale = jnp.swapaxes(self.scale, -2, -3)[..., None]
        x = self.values.astype(jnp.float32).reshape(*shape, groups, dim // groups)
        return (x * scale).reshape(self.values.shape).astype(dtype)


def quantize(x, dtype, granularity="head", group_size=None):
    """Symmetric 8-bit quantization: `scale = max|x| / largest`, `values = round(x / scale)`.

    A row whose scale would be below float32's smallest normal number counts as zero (scale 1,
    values 0). Values saturate, also where `granularity` is None. NaN makes its row's scale NaN.

    Args:
      x: `[..., S, K, H]`, any float dtype.
      dtype: int8, float8_e4m3fn or float8_e5m2.
      granularity: What shares a scale: "tensor" (everything), "token" (the heads of a token),
        "head" (one head of one token), "group" (`group_size` elements of one head of one token), or
        None for fp8 values without scales.
      group_size: Elements in a group; divides `H`.

    Returns:
      A `QuantizedArray` with values shaped as `x` and scale `[..., K, S, G]`, size 1 along the axes
      that share a scale.

    Raises:
      ValueError: for an unknown dtype or granularity, or a group size that does not divide `H`.
    """
    dtype = check_dtype(dtype)
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"x must be [..., S, K, H], got {x.shape=}")
    groups = groups_of(dtype, granularity, group_size, x.shape[-1])
    x = x.astype(jnp.float32)
    if groups == 0:
        return QuantizedArray(cast(x, dtype), None)
    if granularity == "tensor":
        axes = tuple(range(x.ndim))
    elif granularity == "token":
        axes = (x.ndim - 2, x.ndim - 1)
    else:
        axes = ()
    amax = group_amax(x, groups)
    if axes:
        amax = jnp.max(amax, axis=axes, keepdims=True)
    scale = scale_of(amax, dtype)
    return QuantizedArray(apply_scale(x, scale, dtype), jnp.swapaxes(scale, -2, -3))


def check_dtype(dtype):
    dtype = jnp.dtype(dtype)
    if dtype.name not in _LARGEST:
        raise ValueError(f"dtype must be one of {', '.join(_LARGEST)}, got {dtype.name}")
    return dtype


def is_quantized_dtype(dtype):
    return jnp.dtype(dtype).name in _LARGEST


def groups_of(dtype, granularity, group_size, dim):
    """Scales along a head of `dim` elements; 0: none."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, got {granularity!r}")
    if granularity is None:
        if jnp.dtype(dtype) == jnp.int8:
            raise ValueError("int8 must have scales, got granularity=None")
        return 0
    if granularity != "group":
        if group_size is not None:
            raise ValueError(f"group_size must be None for {granularity=}, got {group_size}")
        return 1
    if not isinstance(group_size, int) or group_size < 1 or dim % group_size:
        raise ValueError(f"group_size must divide the head dim {dim}, got {group_size}")
    return dim // group_size


def cast(x, dtype):
    """float32 to 8 bits, saturating; NaN stays NaN in fp8 and becomes 0 in int8."""
    largest = _LARGEST[dtype.name]
    if dtype == jnp.int8:
        x = jnp.where(jnp.isnan(x), 0, jnp.round(x))
    return jnp.clip(x, -largest, largest).astype(dtype)


def group_amax(x, groups):
    """max|x| `[..., S, K, G]` of the groups along the last axis of float32 x."""
    return jnp.abs(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)).max(-1)


def scale_of(amax, dtype):
    """The scale of numbers up to amax; 1 for those too small to have one: they round to 0."""
    scale = amax * (1 / _LARGEST[dtype.name])  # XLA turns a division by a constant into this
    return jnp.where(scale < _SMALLEST_NORMAL, 1.0, scale)


def apply_scale(x, scale, dtype):
    """round(x / scale) of float32 x `[..., S, K, H]` with scale `[..., S, K, G]`."""
    groups = scale.shape[-1]
    split = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return cast((split / scale[..., None]).reshape(x.shape), dtype)
