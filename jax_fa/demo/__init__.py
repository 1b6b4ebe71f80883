"""SmolLM2-135M-Instruct on jax_fa: a Flax NNX Llama, its weights from a GGUF file, and sampling.

Needs the extra `jax_fa[demo]`. `_llama` is the part to copy: a model whose attention goes through
`jax_fa.flax.CachedAttention`. `_scheduler` and `_serving` answer many prompts at once: continuous
batching over a paged cache.
"""

from ._gguf import Gguf as Gguf
from ._gguf import find_smollm2 as find_smollm2
from ._llama import Llama as Llama
from ._llama import LlamaConfig as LlamaConfig
from ._sampling import Generation as Generation
from ._sampling import Sampling as Sampling
from ._sampling import create_cache as create_cache
from ._sampling import decode_step as decode_step
from ._sampling import padded_length as padded_length
from ._sampling import prefill_step as prefill_step
from ._scheduler import PageAllocator as PageAllocator
from ._scheduler import Request as Request
from ._scheduler import Scheduler as Scheduler
from ._scheduler import Sizes as Sizes
from ._scheduler import Step as Step
from ._serving import Serving as Serving
from ._serving import create_requests as create_requests
from ._serving import serving_step as serving_step
from ._tokenizer import Tokenizer as Tokenizer
