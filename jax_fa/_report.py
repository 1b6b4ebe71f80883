"""What `jax-fa info` and `jax-fa explain` print."""

import jax
import jax.numpy as jnp

from . import __version__, _jax_fa
from ._attention import flash_attention
from ._cache import PagedKVCache
from ._decode import decode_attention
from ._explain import capability_of, explain
from ._quantize import is_quantized_dtype, quantize


def info():
    """Version, devices and compiled kernels, as text."""
    lines = [
        f"jax_fa {__version__}, jax {jax.__version__}",
        f"kernels: {', '.join(sorted(_jax_fa.handlers()))}",
        f"head dims: multiples of 8 up to {_jax_fa.max_head_dim(2, False)}, of gradients and "
        f"float32 up to {_jax_fa.max_head_dim(2, True)}, "
        f"on tiles of {', '.join(map(str, _jax_fa.head_dims))}",
    ]
    for device in jax.devices():
        lines.append(f"{device}: {device.device_kind}: {_tier(device)}")
    return "\n".join(lines)


def _tier(device):
    if device.platform != "gpu":
        return "the reference, through XLA"
    capability = capability_of(device)
    if capability < 80:
        return f"no kernels: compute capability {device.compute_capability}, they need 8.0"
    if _jax_fa.runs_hopper(capability):
        return "the Hopper kernels (sm90), the portable ones (sm80) for what those leave"
    return "the portable kernels (sm80)"


def shape_call(args):
    """The calls that attention of the given shape makes, as text."""
    q_dtype, kv_dtype = jnp.dtype(args.dtype), jnp.dtype(args.kv_dtype or args.dtype)
    kv_heads = args.kv_heads or args.heads
    len_kv = args.len_kv or args.len_q
    q = jax.ShapeDtypeStruct((args.batch, args.len_q, args.heads, args.head_dim), q_dtype)
    options = {"window": args.window, "softcap": args.softcap}
    if args.decode:
        page, pages = args.page_size or len_kv, -(-len_kv // (args.page_size or len_kv))
        cache = jax.eval_shape(
            lambda: PagedKVCache.create(
                args.batch * pages,
                page,
                args.batch,
                pages,
                kv_heads,
                args.head_dim,
                dtype=kv_dtype,
            )  # fmt: skip
        )

        def call(q, cache):
            table = cache.page_table if args.page_size else None
            return decode_attention(q, cache.k, cache.v, cache.lengths, page_table=table, **options)

        calls = explain(call, q, cache, device=args.device)
    else:
        quantized = is_quantized_dtype(kv_dtype)
        shape = (args.batch, len_kv, kv_heads, args.head_dim)
        k = jax.ShapeDtypeStruct(shape, q_dtype if quantized else kv_dtype)
        if quantized:
            k = jax.eval_shape(lambda x: quantize(x, kv_dtype), k)

        def call(q, k, v):
            return flash_attention(q, k, v, causal=args.causal, **options)

        calls = explain(call, q, k, k, device=args.device)
    return "\n".join(map(str, calls))
