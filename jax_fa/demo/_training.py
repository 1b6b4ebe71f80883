"""`jax-fa train`: a small Llama learns Python's documentation and library, byte by byte.

`train_step` is the part to copy: one jitted step over a donated state, computed in bfloat16 from
float32 weights. The same model trains with `jax.nn`'s attention, to be compared with.
"""

import dataclasses
import functools as ft
import pathlib
import sys
import sysconfig
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_fa.flax import CachedAttention, apply_rotary

from ._llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=256,
    layers=4,
    features=512,
    hidden_features=1408,
    heads=8,
    kv_heads=2,
    head_dim=64,
    max_length=1024,
    rotary_base=1e4,
    norm_epsilon=1e-5,
    dtype="bfloat16",
    param_dtype="float32",
)
_LEARNING_RATE, _WARMUP = 1e-3, 30
_UNTIMED = 10  # steps until the clocks are up

# What a layer's backward pass finds instead of computing it again: its input, and what attention
# made of it, which costs the most to compute and little to keep.
REMAT = ft.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("jax_fa_out", "jax_fa_lse"),
)


class _PeerAttention(CachedAttention):
    """The same layer on `jax.nn.dot_product_attention`; only for training."""

    def __init__(self, *args, implementation, **options):
        super().__init__(*args, **options)
        self.implementation = implementation

    def _attend_new(self, q, k, v, rotary, *_):
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)
        q, k = (apply_rotary(x, *rotary, positions) for x in (q, k))
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.implementation
        )


ATTENTION = {
    "jax_fa": CachedAttention,
    "cudnn": ft.partial(_PeerAttention, implementation="cudnn"),
    "xla": ft.partial(_PeerAttention, implementation="xla"),
}


class State(NamedTuple):
    """What a step changes; every leaf of the model is a float32 weight."""

    model: Llama
    moments: optax.OptState


def loss_of(model, tokens, remat=None):
    """Mean of -log p(byte | those before it), in nats, over int32 tokens `[B, T + 1]`."""
    logits = model(tokens[:, :-1], remat=remat)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@ft.partial(jax.jit, static_argnames=("optimizer", "remat"), donate_argnames="state")
def train_step(state, tokens, *, optimizer, remat=None):
    """One step of the optimizer: `(state, loss)`."""
    loss, grads = jax.value_and_grad(loss_of)(state.model, tokens, remat)
    updates, moments = optimizer.update(grads, state.moments, state.model)
    return State(optax.apply_updates(state.model, updates), moments), loss


def create_optimizer(steps):
    """AdamW with warmup, cosine decay and clipped gradients."""
    warmup = min(_WARMUP, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, _LEARNING_RATE, warmup, max(steps, 1))
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


def create(config, attention, optimizer, seed):
    """The `State` before the first step, with the attention of that name."""
    model = Llama(config, ATTENTION[attention], rngs=nnx.Rngs(seed))
    return State(model, optimizer.init(model))


def text():
    """uint8 `[bytes]`: the topics of Python's own help, and the modules of its library."""
    from pydoc_data.topics import topics

    modules = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [topics[name].encode() for name in sorted(topics)]
    parts += [path.read_bytes() for path in modules]
    return np.frombuffer(b"\n".join(parts), np.uint8)


def batches(data, batch, length, seed):
    """Yields int32 `[batch, length + 1]`, pieces of `data` from random places, without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(data) - length, batch)
        yield data[starts[:, None] + np.arange(length + 1)].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a training.

    Attributes:
      step_mib: Memory that the compiled step needs, its state included.
      losses: Of each step, in nats for each byte; empty if its memory was not to be had.
      step_ms: Mean time of a step after the first ones.
      peak_mib: The most that the device's allocator held; None where it does not say, or held as
        much before.
      failure: Why there are no losses; else None.
    """

    attention: str
    steps: int
    length: int
    batch: int
    seed: int
    remat: bool
    step_mib: float
    compile_seconds: float
    losses: list[float] = dataclasses.field(default_factory=list)
    step_ms: float | None = None
    peak_mib: float | None = None
    failure: str | None = None


class Training:
    """A `Llama` that learns a text from scratch; compiled when it is made, it trains when called.

    Args:
      attention: A name in `ATTENTION`.
      steps: Of the optimizer, at least 1.
      length: T: bytes of a row.
      batch: B: rows of a step.
      seed: Of the first weights and of the places that rows begin at.
      remat: Whether layers are computed again in the backward pass, all but attention.
      config: A `LlamaConfig`, whose `max_length` becomes `length`. Default: `CONFIG`.
      data: uint8 `[bytes]`. Default: `text()`.

    Raises:
      ValueError: as `check`.
    """

    def __init__(
        self,
        attention="jax_fa",
        *,
        steps=300,
        length=1024,
        batch=16,
        seed=0,
        remat=False,
        config=None,
        data=None,
    ):
        data = text() if data is None else data
        check(attention, length, seed, data)
        config = dataclasses.replace(config or CONFIG, max_length=length)
        optimizer = create_optimizer(steps)
        first = jax.jit(lambda: create(config, attention, optimizer, seed))
        tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
        options = dict(optimizer=optimizer, remat=REMAT if remat else None)
        self._create_rows = ft.partial(batches, data, batch, length, seed)
        start = time.perf_counter()
        self._create = first.lower().compile()
        self._step = train_step.lower(jax.eval_shape(first), tokens, **options).compile()
        seconds = time.perf_counter() - start
        memory = _memory(self._step)
        self.plan = Run(attention, steps, length, batch, seed, remat, memory, seconds)

    def __call__(self, report=lambda step, loss: None):
        """Trains, calling `report` with the number of a step and its loss now and then.

        Returns:
          A `Run`, without losses where a step does not fit into the device's memory.
        """
        steps, losses, peak_before, rows = self.plan.steps, [], _peak(), self._create_rows()
        untimed = min(_UNTIMED, steps - 1)
        try:
            state = self._create()
            for index in range(steps):
                if index == untimed:
                    jax.block_until_ready(state)
                    start = time.perf_counter()
                state, loss = self._step(state, next(rows))
                losses.append(loss)
                if index % max(1, steps // 10) == 0 or index == steps - 1:
                    report(index, loss)
            jax.block_until_ready(state)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dataclasses.replace(self.plan, failure=str(error).splitlines()[0])
        seconds, peak = time.perf_counter() - start, _peak()
        return dataclasses.replace(
            self.plan,
            losses=np.asarray(jnp.stack(losses)).tolist(),
            step_ms=1e3 * seconds / (steps - untimed),
            peak_mib=peak / 2**20 if peak > peak_before else None,
        )


def check(attention, length, seed, data):
    """Raises a ValueError for rows longer than the data, a seed below 0, "cudnn" without a GPU."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if length >= len(data):
        raise ValueError(f"length must be below the {len(data)} bytes of the text, got {length}")
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(f"cudnn must have an NVIDIA GPU, got a {jax.default_backend()}")


def _memory(step):
    """MiB of a compiled function: arguments, results that are not among them, and temporaries."""
    of = step.memory_analysis()
    new = of.output_size_in_bytes - of.alias_size_in_bytes
    return (of.argument_size_in_bytes + new + of.temp_size_in_bytes) / 2**20


def _peak():
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def prepare(args):
    """What `jax-fa train` trains with, names in `ATTENTION`, and on, its text.

    Raises:
      ValueError: as `check`.
    """
    names = [name for name in ATTENTION if args.attention in (name, "all")]
    if args.attention == "all" and jax.default_backend() != "gpu":
        names.remove("cudnn")
    data = text()
    for name in names:
        check(name, args.length, args.seed, data)
    return names, data


def command(args, names, data):
    """`jax-fa train`: trains, says how the loss falls, and then what a step costs."""
    failures = []
    for name in names:

        def report(step, loss, name=name):
            print(f"{name}: step {step}, loss {loss:.4f}", flush=True)

        options = {key: getattr(args, key) for key in ("steps", "length", "batch", "seed", "remat")}
        run = Training(name, data=data, **options)(report)
        if run.failure:
            failures.append(f"{name}: {run.step_mib:.0f} MiB in a step: {run.failure}")
            continue
        peak = f", {run.peak_mib:.0f} MiB at most on the device" if run.peak_mib else ""
        print(
            f"{name}: loss {np.mean(run.losses[-20:]):.4f} at the end, {run.step_ms:.2f} ms a step "
            f"({1e3 * run.length * run.batch / run.step_ms:,.0f} bytes/s), "
            f"{run.step_mib:.0f} MiB in a step{peak}"
        )
    print(*failures, sep="\n", end="\n" * bool(failures), file=sys.stderr)
    return int(bool(failures))
