"""Times of launches: on a GPU what CUPTI saw the device do, elsewhere wall time.

A GPU that works without pause slows down by a fifth within milliseconds, at its power limit. So
implementations take turns, each with an idle gap and then a short burst, and what is reported is
the median over turns, beside the clock that the multiprocessors had.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import _machine
import jax
import jax.numpy as jnp

IDLE = 0.05  # seconds before a burst
BURST = 10  # launches in a burst, fewer where they take long
BURST_SECONDS = 0.03
EVICT_BYTES = 256 << 20  # read between launches: four times an H200's L2


@dataclasses.dataclass
class Launch:
    """An implementation, ready to run on the inputs of one case.

    Attributes:
      run: Enqueues one call and returns its result.
      wait: Returns once a result is there.
      keys, values: What it reads, as `[B, S, K, H]`: arrays or `QuantizedArray`s.
      moved: Bytes that it must read and write.
      out: The arrays of a result, as the case's queries; with gradients `(out, dq, dk, dv)`.
      check: The error of a result, where it is not that of attention.
      limit: What that error may be, where it is not `_check.LIMITS`.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    keys: Any
    values: Any
    moved: float
    out: Callable[[Any], Any] = lambda result: result
    check: Callable[[Any], float] | None = None
    limit: float | None = None


@dataclasses.dataclass
class Timing:
    """Seconds of a launch: the median of each burst; and MHz during its last one, where known."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    clocks: list[int] = dataclasses.field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.seconds)

    @property
    def clock(self):
        return statistics.median(self.clocks) if self.clocks else None


class WallClock:
    """From before a launch to its result."""

    method = "wall time"
    idle = 0.0

    def burst(self, launch, count, prepare):
        """Seconds of each of `count` launches, with `prepare` called before each; and MHz."""
        seconds = []
        for _ in range(count):
            prepare()
            start = time.perf_counter()
            launch.wait(launch.run())
            seconds.append(time.perf_counter() - start)
        return seconds, _machine.sm_clock()


class DeviceClock:
    """How long the device was busy with kernels, copies and fills of a launch, by CUPTI.

    Work that overlaps counts once, gaps between kernels do not count. CUPTI sees all of the
    process, so that JAX and PyTorch are measured alike.
    """

    method = "device time (CUPTI)"
    idle = IDLE

    def __init__(self):
        from cupti import cupti

        self._cupti = cupti
        self._work = []  # (start, end) in ns, of everything since the last burst
        kinds = cupti.ActivityKind
        self._kinds = (kinds.CONCURRENT_KERNEL, kinds.MEMCPY, kinds.MEMSET)
        cupti.activity_register_callbacks(self._buffer, self._completed)

    @staticmethod
    def _buffer():
        return 8 << 20, 0  # bytes, and as many records as fit

    def _completed(self, activities):
        self._work += [(a.start, a.end) for a in activities if a.kind in self._kinds]

    def burst(self, launch, count, prepare):
        cupti = self._cupti
        for kind in self._kinds:
            cupti.activity_enable(kind)
        try:
            windows = []
            for i in range(count):
                prepare()
                start = cupti.get_timestamp()
                result = launch.run()
                mhz = _machine.sm_clock() if i == count - 1 else None  # while it runs
                launch.wait(result)
                windows.append((start, cupti.get_timestamp()))
        finally:
            cupti.activity_flush_all(1)
            for kind in self._kinds:
                cupti.activity_disable(kind)
        work, self._work = sorted(self._work), []
        seconds = [busy(work, *window) * 1e-9 for window in windows]
        if not all(seconds):
            raise RuntimeError(f"CUPTI saw no work of a launch, only {len(work)} records in all")
        return seconds, mhz


def busy(work, start, end):
    """Nanoseconds of the union of sorted intervals that begin within [start, end)."""
    total, reached = 0, start
    for a, b in work:
        if start <= a < end:
            total += max(0, b - max(a, reached))
            reached = max(reached, b)
    return total


def clock(name):
    """The clock of `--clock`: "device", "wall", or "auto"."""
    if name == "wall" or (name == "auto" and _machine.gpu() is None):
        return WallClock()
    try:
        return DeviceClock()
    except ImportError as error:
        raise ImportError(
            "timing a GPU needs the package cupti-python (pip install cupti-python), "
            f"or --clock=wall for wall time: {error}"
        ) from error


def preparation(cold):
    """What is called before each launch: evicts the L2 cache if `cold`, on a GPU.

    Cold is how a cache of keys is found that was last read a step ago.
    """
    return _evict() if cold and _machine.gpu() else lambda: None


def burst_length(launch, timer, prepare):
    """Launches in a burst of its own length: a first one warms up, a second is timed."""
    (_, seconds), _ = timer.burst(launch, 2, prepare)
    return max(2, min(BURST, int(BURST_SECONDS / seconds)))


def interleaved(bursts, timer, rounds, prepare):
    """Timings by name, of launches that take turns.

    Args:
      bursts: By name, pairs of a `Launch` that has run and the length of its bursts.
      timer: A clock from `clock`.
      rounds: Turns of each.
      prepare: Called before each launch.
    """
    timings = {name: Timing() for name in bursts}
    for turn in range(rounds):
        order = list(bursts)
        for name in order if turn % 2 == 0 else reversed(order):
            time.sleep(timer.idle)
            seconds, mhz = timer.burst(*bursts[name], prepare)
            timings[name].seconds.append(statistics.median(seconds))
            if mhz is not None:
                timings[name].clocks.append(mhz)
    return timings


@functools.cache
def _evict():
    """Reads more than the L2 cache holds: reading leaves nothing to be written back."""
    buffer = jnp.ones(EVICT_BYTES // 4, jnp.float32)
    total = jax.jit(jnp.sum).lower(buffer).compile()
    return lambda: total(buffer).block_until_ready()
