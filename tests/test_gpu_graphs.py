"""A jitted step of jax_fa is one CUDA graph, whatever its lengths (`pytest -m gpu`)."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# In a process of its own, because XLA reads its flags once.
STEP = """
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa

paged, dtype = {paged}, "{dtype}"
if paged:
    cache = jax_fa.PagedKVCache.create(32, 16, 2, 16, 2, 64, dtype=dtype)
else:
    cache = jax_fa.KVCache.create(2, 256, 2, 64, dtype=dtype)
angles = jnp.ones((256, 32), jnp.float32)


@jax.jit(donate_argnums=0)
def step(cache, q, k):
    cache = cache.append(k, k, rotary=(angles, angles))
    tables = dict(page_table=cache.page_table) if paged else dict()
    out = jax_fa.decode_attention(q, cache.k, cache.v, cache.lengths, **tables)
    starts = jnp.arange(3, dtype=jnp.int32)
    mixed = jax_fa.hybrid_attention(q[:, 0], cache.k, cache.v, starts, cache.lengths, **tables)
    return cache, out[:, 0] + mixed


if paged:
    table = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    cache = dataclasses.replace(cache, page_table=table)
q, k = jnp.zeros((2, 1, 8, 64), jnp.bfloat16), jnp.ones((2, 1, 2, 64), jnp.bfloat16)
step = step.lower(cache, q, k).compile()
for length in range(1, 5):  # the first runs capture and update, the others replay
    cache, out = step(cache, q, length * k)
    np.testing.assert_array_equal(cache.lengths, length)
    # of both calls the mean of 1 to length
    np.testing.assert_allclose(out.astype(jnp.float32), length + 1, rtol=0.02)
"""


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_decoding_step_is_one_graph(dtype, paged, tmp_path):
    flags = (
        f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_step "
        "--xla_gpu_graph_min_graph_size=1"
    )
    env = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    script = STEP.format(paged=paged, dtype=dtype)
    subprocess.run([sys.executable, "-P", "-c", script], env=env, check=True)
    (path,) = tmp_path.glob("*jit_step.thunk_sequence_after_thunk_passes.txt")
    # XLA's own report: the thunks of a graph are indented below it
    lines = path.read_text().splitlines()
    outside = [line for line in lines if re.match(r"\d+: ", line)]
    calls = [line for line in lines if "kCustomCall" in line]
    assert len(outside) == 1 and "kCommandBuffer" in outside[0], path.read_text()
    assert len(calls) >= 3, path.read_text()
