"""Names under which `jax.export` serializes functions of caches and quantized arrays."""

import json

import jax.export

from ._cache import KVCache, PagedKVCache
from ._quantize import QuantizedArray

for _node in (KVCache, PagedKVCache, QuantizedArray):
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jax_fa.{_node.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda text: tuple(json.loads(text)),
    )
