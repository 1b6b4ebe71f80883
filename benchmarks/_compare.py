"""One case: every implementation built, checked, and then measured in turns."""

import dataclasses
import math
import traceback

import _machine
import jax
from _check import LIMITS, Expected, inputs
from _measure import Timing, burst_length, interleaved, preparation
from _peers import launches


@dataclasses.dataclass
class Outcome:
    """What came of one implementation.

    Attributes:
      failure: Why it has no time: what it raised, or that its result is wrong; else None.
      error: Of its result, as `_check.Expected` has it.
    """

    failure: str | None = None
    error: float = math.nan
    moved: float = 0.0
    timing: Timing | None = None


def compare(case, implementations, timer, rounds, cold):
    """`Outcome`s by name; `cold` as in `_measure.preparation`."""
    x = jax.block_until_ready(inputs(case))
    expected = Expected(case, x)
    prepare = preparation(cold)
    outcomes, bursts = {}, {}
    for name, launch in launches(case, x, implementations).items():
        outcomes[name] = outcome = Outcome()
        try:
            if isinstance(launch, Exception):
                raise launch
            outcome.moved = launch.moved
            outcome.error = _error(case, launch, expected)
            limit = LIMITS[case.dtype] if launch.limit is None else launch.limit
            if outcome.error > limit:
                outcome.failure = f"wrong result: error {outcome.error:.2e}, limit {limit:.0e}"
            else:
                bursts[name] = launch, burst_length(launch, timer, prepare)
        except Exception as error:
            # text: an exception would keep the arrays of its frames
            outcome.failure = "".join(traceback.format_exception(error))
    for name, timing in interleaved(bursts, timer, rounds, prepare).items():
        outcomes[name].timing = timing
    return outcomes


def _error(case, launch, expected):
    result = launch.wait(launch.run())
    if launch.check is not None:
        return launch.check(result)
    of = expected.error_of_gradients if case.backward else expected.error
    return of(launch.out(result), launch.keys, launch.values)


def figures(case, operation, name, outcome, outcomes, method, cold):
    """What a result says about one implementation of one case."""
    seconds = outcome.timing.median
    flops = 0 if operation == "append" else case.flops
    floor = _machine.roofline(flops, outcome.moved)
    peers = {
        other: each.timing.median
        for other, each in outcomes.items()
        if each.timing and other != name and not other.startswith("jax_fa")
    }
    best = min(peers, key=peers.get, default=None)
    own = outcomes.get("jax_fa")
    return {
        "operation": operation,
        "case": dataclasses.asdict(case),
        "implementation": name,
        "method": method,
        "l2": "cold" if cold else "warm",
        "error": outcome.error,
        "us": seconds * 1e6,
        "flops": flops,
        "bytes": outcome.moved,
        "tflops": flops / seconds * 1e-12,
        "gb_per_s": outcome.moved / seconds * 1e-9,
        "roofline_us": floor and floor * 1e6,
        "roofline_percent": floor and 100 * floor / seconds,
        "best_peer": best,
        "against_best_peer": best and peers[best] / seconds,
        "against_jax_fa": own.timing.median / seconds if own and own.timing else None,
        "sm_mhz": outcome.timing.clock,
    }
