"""A decoding step of the demo's model: jax_fa and its caches beside jax.nn's attention.

    python benchmarks/decode_step.py [--quick --out FOLDER]

writes `decode_step.json` and from it `decode_step.md`; `--render` does only the latter. `--quick`
is for a machine without a GPU. Weights and caches are random, the sizes those of SmolLM2-135M.
Layers follow one another in the compiled step; `scan` is the demo's own, a loop over them, for
which XLA copies the weights of each. jax_fa's caches are stacked, jax.nn's one for each layer,
because cuDNN reads no layer of a stacked one in place. All write the new token in place, into
donated caches.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time

import _machine
import jax
import jax.numpy as jnp
import numpy as np
import sources
from _measure import DeviceClock, Launch, busy
from flax import nnx

import jax_fa
from jax_fa import demo
from jax_fa.flax import CachedAttention, rotary_tables

_STEPS = 50  # of one measurement
# Relative error of logits by the dtype of caches: unrelated ones have 1.4.
_LIMITS = {"bfloat16": 0.1, "int8": 0.1, "float8_e4m3fn": 0.4}
_ATTENTION = ("jax_fa6decode", "cudnn", "fmha", "sdpa", "flash")  # in mangled names of kernels


@dataclasses.dataclass
class Step:
    """What came of one implementation.

    Attributes:
      cache_bytes: Of the keys and values of all layers.
      seconds: A step, by the wall clock over many.
      device_seconds, attention_seconds: Of its kernels, and of those that attend; None without a
        GPU or where kernels do more than one thing.
      error: Relative error of the first step's logits against those of jax_fa.
    """

    name: str
    cache_bytes: int
    seconds: float
    device_seconds: float | None
    attention_seconds: float | None
    error: float


class PeerAttention(CachedAttention):
    """On jax.nn: `cache` is `(k, v, lengths)` of one layer; one new token a row."""

    implementation = None

    def __call__(self, x, cache, *, rotary):
        k, v, lengths = cache
        q, *new = self.query(x), self.key(x), self.value(x)
        q, new[0] = (jax_fa.apply_rotary(a, *rotary, lengths[:, None]) for a in (q, new[0]))
        rows = jnp.arange(x.shape[0], dtype=jnp.int32)
        k, v = (a.at[rows, lengths].set(b[:, 0]) for a, b in zip((k, v), new, strict=True))
        o = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths + 1, implementation=self.implementation
        )
        return self.out(o), (k, v, lengths)


class CudnnAttention(PeerAttention):
    implementation = "cudnn"


class XlaAttention(PeerAttention):
    implementation = "xla"


def config(quick):
    sizes = dict(
        vocab_size=49152, layers=30, features=576, hidden_features=1536, heads=9, kv_heads=3
    )
    if quick:
        sizes |= dict(vocab_size=512, layers=2, hidden_features=64)
    return demo.LlamaConfig(
        **sizes,
        head_dim=64,
        max_length=8192,
        rotary_base=1e5,
        norm_epsilon=1e-5,
        dtype="bfloat16",
    )


def scanned_step(config, batch, capacity):
    """As `own_step`, of the demo as it is."""
    graph, weights = nnx.split(demo.Llama(config, rngs=nnx.Rngs(0)))

    def step(cache, weights, tokens):
        logits, cache = nnx.merge(graph, weights).extend(tokens, cache)
        return logits, cache

    state = own_cache(config, batch, capacity, config.dtype)
    return compiled(step, state, weights, jnp.zeros((batch, 1), jnp.int32))


def own_step(config, batch, capacity, dtype):
    """`(step, state)`: `step(state)` gives `(logits, state)` and is to be given each state once."""

    def attend(block, x, cache, layer, rotary):
        return block(x, cache, layer=jnp.int32(layer), rotary=rotary)

    def advance(cache):
        return cache.advance(jnp.ones((batch,), jnp.int32))

    state = own_cache(config, batch, capacity, dtype)
    return unrolled_step(config, CachedAttention, batch, state, attend, advance)


def peer_step(config, batch, capacity, attention):
    """As `own_step`."""

    def attend(block, x, state, layer, rotary):
        caches, lengths = state
        x, (k, v, _) = block(x, (*caches[layer], lengths), rotary=rotary)
        return x, ([*caches[:layer], (k, v), *caches[layer + 1 :]], lengths)

    def advance(state):
        caches, lengths = state
        return caches, lengths + 1

    k, v = keys_and_values(config, batch, capacity)
    caches = [(k[i], v[i]) for i in range(config.layers)]
    state = caches, first_lengths(batch, capacity)
    return unrolled_step(config, attention, batch, state, attend, advance)


def unrolled_step(config, attention, batch, state, attend, advance):
    """As `own_step`. `attend` runs one block, to `(x, state)`; `advance` counts the token."""
    model = demo.Llama(config, attention, rngs=nnx.Rngs(0))
    block, weights = nnx.split(model.blocks)
    blocks = [jax.tree.map(lambda x: x[i], weights) for i in range(config.layers)]  # noqa: B023
    norm, scale = nnx.split(model.norm)
    rotary = rotary_tables(config.max_length, config.head_dim, config.rotary_base)

    def step(state, blocks, scale, embedding, tokens):
        x = embedding[tokens]
        for layer, weights in enumerate(blocks):
            x, state = attend(nnx.merge(block, weights), x, state, layer, rotary)
        x = nnx.merge(norm, scale)(x)
        logits = jnp.einsum("...d,vd->...v", x, embedding, preferred_element_type=jnp.float32)
        return logits[:, 0], advance(state)

    tokens = jnp.zeros((batch, 1), jnp.int32)
    return compiled(step, state, blocks, scale, model.embed.embedding[...], tokens)


def compiled(step, state, *rest):
    run = jax.jit(step, donate_argnums=0).lower(state, *rest).compile()
    return lambda state: run(state, *rest), state


def own_cache(config, batch, capacity, dtype):
    k, v = keys_and_values(config, batch, capacity)
    if dtype != config.dtype:
        k, v = (jax_fa.quantize(x, dtype) for x in (k, v))
    empty = jax.eval_shape(lambda: demo.create_cache(config, batch, capacity, dtype=dtype))
    return dataclasses.replace(empty, k=k, v=v, lengths=first_lengths(batch, capacity))


def keys_and_values(config, batch, capacity):
    """`[L, B, S, K, H]` each."""
    shape = config.layers, batch, capacity, config.kv_heads, config.head_dim
    draw = jax.jit(lambda key: jax.random.normal(key, shape, config.dtype))
    return draw(jax.random.key(1)), draw(jax.random.key(2))


def first_lengths(batch, capacity):
    return jnp.full((batch,), capacity - 2 * _STEPS, jnp.int32)


def measure(name, step, state, expected, limit):
    """A `Step`, and the logits that the first step gave."""
    held = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim > 1)
    logits, state = step(state)
    logits = np.asarray(logits)
    error = 0.0
    if expected is not None:
        error = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
        if not error <= limit:
            raise ValueError(f"{name}: logits are off by {error:.3g}, limit {limit}")
    start = time.perf_counter()
    for _ in range(_STEPS):
        last, state = step(state)
    jax.block_until_ready(last)
    seconds = (time.perf_counter() - start) / _STEPS
    device = attention = None
    if _machine.gpu():
        device, attention = kernel_seconds(step, state)
    return Step(name, held, seconds, device, attention, error), logits


def kernel_seconds(step, state):
    """Of a step on the device: in all, and of what attends."""
    clock = NamedClock.get()
    clock.named.clear()
    held = [state]

    def run():
        logits, held[0] = step(held[0])
        return logits

    launch = Launch(run, jax.block_until_ready, None, None, 0.0)
    count = 10
    seconds, _ = clock.burst(launch, count, lambda: None)
    attention = clock.busy(lambda name: any(part in name for part in _ATTENTION))
    return float(np.mean(seconds)), attention / count or None


class NamedClock(DeviceClock):
    """Keeps the names of kernels too. CUPTI takes one set of callbacks: one clock for all."""

    _only = None

    @classmethod
    def get(cls):
        cls._only = cls._only or cls()
        return cls._only

    def __init__(self):
        self.named = []
        super().__init__()

    def _completed(self, activities):
        super()._completed(activities)
        for a in activities:
            self.named.append(((getattr(a, "name", None) or "").lower(), (a.start, a.end)))

    def busy(self, wanted):
        """Seconds with one of the kernels whose names are wanted; what overlaps counts once."""
        work = sorted(interval for name, interval in self.named if wanted(name))
        return busy(work, 0, math.inf) * 1e-9


def steps(quick):
    """Yields a `Step` for each implementation."""
    sizes = config(quick), 2 if quick else 64, 128 if quick else 4096
    wide = _LIMITS["bfloat16"]
    step, expected = measure("jax_fa", *own_step(*sizes, "bfloat16"), None, wide)
    yield step
    yield measure("jax_fa, scan", *scanned_step(*sizes), expected, wide)[0]
    for dtype in ("int8", "float8_e4m3fn"):
        yield measure(f"jax_fa {dtype}", *own_step(*sizes, dtype), expected, _LIMITS[dtype])[0]
    for attention in (XlaAttention,) if quick else (CudnnAttention, XlaAttention):
        name = f"jax.nn {attention.implementation}"
        yield measure(name, *peer_step(*sizes, attention), expected, wide)[0]


def markdown(result):
    machine, batch, first = result["machine"], result["batch"], result["steps"][0]
    lines = [
        f"# A decoding step on {machine['gpu'] or 'a CPU'}",
        "",
        f"`python benchmarks/decode_step.py`: a Llama of the sizes of SmolLM2-135M "
        f"({result['layers']} layers, 9 query and 3 key heads of 64), bfloat16, {batch} rows, a "
        f"context of {result['context']}, donated caches. A step is timed by the wall clock over "
        f"{_STEPS}; its kernels by CUPTI. Driver {machine['driver']}, jax {machine['jax']}, "
        f"{machine['date']}, {machine['sources']}.",
        "",
        "| | cache, GiB | ms a step | tokens/s | x jax_fa | ms of kernels | of them attention "
        "| share | error of logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for step in result["steps"]:
        device, attention = step["device_seconds"], step["attention_seconds"]
        kernels = "" if device is None else f"{device * 1e3:.2f}"
        part = "" if attention is None else f"{attention * 1e3:.2f}"
        share = "" if attention is None else f"{attention / device:.0%}"
        lines.append(
            f"| {step['name']} | {step['cache_bytes'] / 2**30:.2f} | {step['seconds'] * 1e3:.2f} "
            f"| {batch / step['seconds']:.0f} | {first['seconds'] / step['seconds']:.2f} "
            f"| {kernels} | {part} | {share} | {step['error']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, help="default: benchmarks/results/h200")
    parser.add_argument("--quick", action="store_true", help="small sizes, no cuDNN; needs --out")
    parser.add_argument("--render", action="store_true", help="only the table")
    args = parser.parse_args()
    if args.quick and args.out is None:
        parser.error("--quick needs --out: the committed results are those of a GPU")
    args.out = args.out or sources.RESULTS / "h200"
    path = args.out / "decode_step.json"
    if not args.render:
        sizes = dict(batch=2 if args.quick else 64, context=128 if args.quick else 4096)
        machine = _machine.describe() | {"sources": sources.digest()}
        result = {"machine": machine, **sizes, "layers": config(args.quick).layers, "steps": []}
        args.out.mkdir(parents=True, exist_ok=True)
        for step in steps(args.quick):
            print(step, flush=True)
            result["steps"].append(dataclasses.asdict(step))
            path.write_text(json.dumps(result, indent=1))  # what a run with a limit leaves
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
