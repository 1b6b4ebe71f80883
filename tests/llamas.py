"""A small Llama of random weights. Tests that import this skip without `jax_fa[demo]`."""

import dataclasses

import pytest

nnx = pytest.importorskip("flax.nnx", reason="needs jax_fa[demo]")
pytest.importorskip("gguf", reason="needs jax_fa[demo]")
pytest.importorskip("tokenizers", reason="needs jax_fa[demo]")

from jax_fa import demo  # noqa: E402

SMALL = demo.LlamaConfig(
    vocab_size=61,
    layers=3,
    features=24,
    hidden_features=40,
    heads=6,
    kv_heads=2,
    head_dim=8,
    max_length=160,
    rotary_base=1e4,
    norm_epsilon=1e-5,
)


def small_model(**changes):
    return demo.Llama(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
