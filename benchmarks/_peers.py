"""How an implementation is told apart, found, compiled and launched.

The test modules say which implementations there are of each operation: functions of a case and its
inputs. Peers get what is best for them: no lengths where rows are full, layouts as they like them
prepared before the clock runs.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable

import _machine
import jax
import jax.numpy as jnp
import numpy as np
from _measure import Launch


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
      name: In tables and charts; those that begin with "jax_fa" are ours, all others are peers.
      operation: As in `_cases.cases`.
      package: What must be importable.
      on_cpu: Whether it runs without a GPU.
      covers: Whether it is for a case.
      build: Of a case and its `Inputs`: a `Launch`, or a `Pending` one.
    """

    name: str
    operation: str
    package: str
    on_cpu: bool
    covers: Callable
    build: Callable

    @property
    def ours(self):
        return self.name.startswith("jax_fa")


@dataclasses.dataclass
class Pending:
    """A JAX function that is still to be compiled, its arguments, and the rest of the `Launch`.

    Attributes:
      carried: Whether the first argument is donated and the result takes its place.
    """

    fn: Callable
    args: tuple
    rest: dict
    carried: bool = False

    def compiler(self):
        """Traces now; compiles when the returned function is called, in any thread."""
        donated = (0,) if self.carried else ()
        lowered = jax.jit(self.fn, donate_argnums=donated).lower(*self.args)
        return lambda: Launch(self._runner(lowered.compile()), jax.block_until_ready, **self.rest)

    def _runner(self, compiled):
        args = list(self.args)
        if not self.carried:
            return lambda: compiled(*args)

        def run():
            args[0] = compiled(*args)
            return args[0]

        return run


_ALL = []


def implementation(operation, name, package="jax", on_cpu=False, covers=lambda case: True):
    """Registers a builder: see `Implementation`."""

    def register(build):
        _ALL.append(Implementation(name, operation, package, on_cpu, covers, build))
        return build

    return register


def covering(operation, case):
    """The implementations that can be tried for a case here."""
    return [
        one
        for one in _ALL
        if one.operation == operation
        and (one.on_cpu or _machine.gpu())
        and importlib.util.find_spec(one.package)
        and one.covers(case)
    ]


def launches(case, x, implementations):
    """`Launch`es by name, or the exceptions that building them raised; compiled side by side."""
    built = {}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for one in implementations:
            try:
                launch = one.build(case, x)
                if isinstance(launch, Pending):
                    launch = pool.submit(launch.compiler())
                built[one.name] = launch
            except Exception as error:
                built[one.name] = error
    for name, launch in built.items():
        if isinstance(launch, concurrent.futures.Future):
            built[name] = launch.exception() or launch.result()
    return built


# What several operations share


def reads(case, x):
    """The part of a `Launch` that says what it reads, where that is the inputs as they are."""
    return {"keys": x.k, "values": x.v, "moved": case.bytes()}


def attention(case, x, fn, *more):
    """Of `fn(q, k, v, *more)`, with gradients where the case wants them."""
    if not case.backward:
        return Pending(fn, (x.q, x.k, x.v, *more), reads(case, x))

    def with_gradients(q, k, v, dout):
        out, pull = jax.vjp(fn, q, k, v)
        return out, *pull(dout)

    return Pending(with_gradients, (x.q, x.k, x.v, x.dout), reads(case, x))


def jax_nn(case, implementation):
    """JAX's own attention. Its mask is aligned top-left: only for len_q of 1 or len_kv."""
    return functools.partial(
        jax.nn.dot_product_attention,
        is_causal=case.causal and case.len_q > 1,
        local_window_size=None if case.window is None else (case.window, 0),
        implementation=implementation,
    )


def plain(case):
    """Whether a case is without what few libraries have."""
    return not (case.softcap or case.alibi or case.dropout or case.ragged)


def few_scores(case):
    """Whether all scores fit into memory several times, for what keeps them."""
    return case.batch * case.heads_q * case.len_q * case.len_kv <= 1 << 29


def window(case):
    """As FlashAttention has it."""
    return (-1, -1) if case.window is None else (case.window, 0)


def pages(case):
    """Pages of a row, 0 where keys do not fill them."""
    longest = int(case.rows[:, 1].max())
    return 0 if longest % case.page_size else longest // case.page_size


def pool(case, x):
    """Keys and values in pages of shuffled order, and the table."""
    count = case.batch * pages(case)
    order = np.random.default_rng(2).permutation(count)
    shape = (count, case.page_size, case.heads_kv, case.head_dim)
    k, v = (jnp.take(a.reshape(shape), jnp.asarray(order), axis=0) for a in (x.k, x.v))
    table = np.argsort(order).reshape(case.batch, -1)
    return k, v, jnp.asarray(table, jnp.int32)


def torch_view(x):
    """A PyTorch tensor on the memory of a JAX array."""
    import torch

    return torch.from_dlpack(jax.block_until_ready(x))


def torch_launch(run, **rest):
    """Of a function that returns a tensor, a tuple that begins with one, or with gradients four."""
    import torch

    def wait(result):
        torch.cuda.synchronize()
        return result

    def out(result):
        one = jax.tree.map(lambda t: jnp.from_dlpack(t.contiguous()), result)
        return one if isinstance(one, tuple) and len(one) == 4 else first(one)

    return Launch(run, wait, out=out, **rest)


def first(result):
    """Out, where a library may return more beside it."""
    return result[0] if isinstance(result, tuple) else result
