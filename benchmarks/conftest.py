"""Options, and the fixture that measures: see `README.md` beside this."""

import time
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import _cases
    import _compare
    import _machine
    import _measure
    import _peers
    import sources


def pytest_addoption(parser):
    group = parser.getgroup("jax_fa benchmarks")
    group.addoption(
        "--grid", default=None,
        help="Comma-separated: seeds, design, features, quick, or all (seeds, design, features). "
        "Default: seeds,design on a GPU, quick elsewhere.",
    )  # fmt: skip
    group.addoption("--backward", action="store_true", help="Forward and backward of prefill too.")
    group.addoption("--clock", default="auto", choices=("auto", "device", "wall"))
    group.addoption("--rounds", type=int, default=5, help="Bursts of each implementation.")
    group.addoption(
        "--seconds", type=float, default=float("inf"),
        help="Skip the cases that have not begun by then, so that a run ends with its results.",
    )  # fmt: skip


def pytest_configure(config):
    warnings.simplefilter("ignore")  # outside tests, where the ini file makes them errors
    config.option.benchmark_quiet = True  # its table knows no FLOPs, ours does
    config.stash[_STARTED] = time.monotonic()
    config.stash[_LINES] = []
    _grids(config)  # a wrong name is an error of usage


_STARTED = pytest.StashKey[float]()
_LINES = pytest.StashKey[list]()
_TIMER = pytest.StashKey[object]()


def _grids(config):
    chosen = config.getoption("grid") or ("quick" if _machine.gpu() is None else "seeds,design")
    grids = "seeds,design,features" if chosen == "all" else chosen
    grids = grids.split(",")
    if unknown := set(grids) - set(_cases.GRIDS):
        raise pytest.UsageError(
            f"--grid must name {', '.join(_cases.GRIDS)} or all, got {', '.join(sorted(unknown))}"
        )
    return grids


def pytest_generate_tests(metafunc):
    if "record" not in metafunc.fixturenames:
        return
    config, operation = metafunc.config, metafunc.module.OPERATION
    cases = _cases.cases(
        operation, _grids(config), _machine.gpu() is not None, config.getoption("backward")
    )
    pairs = [_parameters(case, one) for case in cases for one in _peers.covering(operation, case)]
    metafunc.parametrize(("case", "implementation"), pairs)


def _parameters(case, implementation):
    name = f"{case.id}-{implementation.name}".replace(" ", "_")
    marks = [
        pytest.mark.benchmark(group=case.id, timer=REPLAY.now),
        pytest.mark.filterwarnings("ignore"),  # those of other libraries are not ours to mend
    ]
    return pytest.param(case, implementation, id=name, marks=marks)


class Replay:
    """Feeds times that were measured already to pytest-benchmark, as a clock that they move."""

    def __init__(self):
        self._time = 0.0

    def now(self):
        return self._time

    def into(self, benchmark, seconds):
        """Makes each of `seconds` a round of the benchmark."""
        rest = iter(seconds)
        benchmark.pedantic(self._advance, args=(rest,), rounds=len(seconds))

    def _advance(self, rest):
        self._time += next(rest)


REPLAY = Replay()


@pytest.fixture(scope="session")
def measured():
    """The outcomes of the last case."""
    return {}


@pytest.fixture
def record(request, benchmark, case, implementation, measured):
    """Measures the case, with all implementations that are selected, and records this one."""
    config = request.config

    def run(cold):
        if case.id not in measured:
            measured.clear()
            if time.monotonic() - config.stash[_STARTED] > config.getoption("seconds"):
                _skip(benchmark, "out of time")
            if _TIMER not in config.stash:
                config.stash[_TIMER] = _measure.clock(config.getoption("clock"))
            timer = config.stash[_TIMER]
            selected = [
                item.callspec.params["implementation"]
                for item in request.session.items
                if getattr(item, "callspec", None) and item.callspec.params.get("case") is case
            ]
            rounds = config.getoption("rounds")
            measured[case.id] = _compare.compare(case, selected, timer, rounds, cold)
        outcomes = measured[case.id]
        outcome = outcomes[implementation.name]
        if outcome.failure and implementation.ours:
            pytest.fail(outcome.failure, pytrace=False)
        if outcome.failure:
            _skip(benchmark, outcome.failure.strip().splitlines()[-1])
        figures = _compare.figures(
            case, implementation.operation, implementation.name, outcome, outcomes,
            config.stash[_TIMER].method, cold,
        )  # fmt: skip
        benchmark.params = None  # objects; extra_info has what they say
        benchmark.extra_info.update(figures)
        REPLAY.into(benchmark, outcome.timing.seconds)
        config.stash[_LINES].append((case.id, figures))

    return run


def _skip(benchmark, reason):
    benchmark.skipped = True  # else pytest-benchmark warns that it was not used
    pytest.skip(reason)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= _machine.describe() | {"sources": sources.digest()}


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash[_LINES]
    if not lines:
        return
    where = _machine.gpu() or "CPU: says nothing about speed on a GPU"
    terminalreporter.section(f"{lines[0][1]['method']}, {where}, {sources.digest()}")
    columns = ("case", "implementation", "us", "TFLOP/s", "GB/s", "%", "of best", "error", "MHz")
    terminalreporter.write_line(
        "{:40} {:26} {:>9} {:>8} {:>7} {:>6} {:>8} {:>8} {:>5}".format(*columns)
    )
    previous = None
    for name, row in lines:
        percent = row["roofline_percent"]
        ratio = row["against_best_peer"]
        terminalreporter.write_line(
            f"{name if name != previous else '':40} {row['implementation']:26} {row['us']:9.1f} "
            f"{row['tflops']:8.2f} {row['gb_per_s']:7.1f} {_or_dash(percent, '6.1f')} "
            f"{_or_dash(ratio, '8.3f')} {row['error']:8.1e} {_or_dash(row['sm_mhz'], '5.0f')}"
        )
        previous = name


def _or_dash(value, form):
    return f"{'-':>{form.split('.')[0]}}" if value is None else f"{value:{form}}"
