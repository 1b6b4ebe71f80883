"""Flash attention for JAX on NVIDIA GPUs: prefill, decoding and quantized caches."""

from . import _export as _export
from ._attention import flash_attention as flash_attention
from ._attention import flash_attention_kvpacked as flash_attention_kvpacked
from ._attention import flash_attention_qkvpacked as flash_attention_qkvpacked
from ._attention import flash_attention_varlen as flash_attention_varlen
from ._cache import KVCache as KVCache
from ._cache import PagedKVCache as PagedKVCache
from ._decode import decode_attention as decode_attention
from ._decode import hybrid_attention as hybrid_attention
from ._decode import merge_attention as merge_attention
from ._drop_in import dot_product_attention as dot_product_attention
from ._explain import Call as Call
from ._explain import explain as explain
from ._primitives import DISABLED_EXPORT_CHECKS as DISABLED_EXPORT_CHECKS
from ._quantize import QuantizedArray as QuantizedArray
from ._quantize import quantize as quantize
from ._rotary import apply_rotary as apply_rotary

__version__ = "0.1.0"
