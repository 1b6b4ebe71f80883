"""Trains the demo's model with jax_fa's attention and with jax.nn's, side by side.

    python benchmarks/training.py [--quick] [--out benchmarks/results/h200]

writes `training.json`, and from it `training.md` and `training.svg`; `--render` does only the
latter. `--quick` is for a machine without a GPU: smaller and fewer.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import sys

import _machine
import jax
import matplotlib
import numpy as np
import sources

from jax_fa.demo import _training

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend

_SMOOTH = 20  # steps that a line of the chart averages
_LONG = 32768
_COLORS = {"jax_fa": "#d62728", "cudnn": "#1f77b4", "xla": "#7f7f7f"}


def cases(quick):
    """What to train, as arguments of `Training`."""
    short = dict(steps=12, length=64, batch=1) if quick else dict(steps=300, length=1024, batch=16)
    long = dict(steps=2, length=256, batch=1) if quick else dict(steps=20, length=_LONG, batch=1)
    middle = dict(long, length=long["length"] // 4)
    names = ("jax_fa", "xla") if quick else ("jax_fa", "cudnn", "xla")
    return [
        *(dict(attention=name, **short) for name in names),
        *(dict(attention=name, seed=1, **short) for name in ("jax_fa", "xla")),
        *(dict(attention=name, **middle) for name in names),
        *(dict(attention=name, **long) for name in names if name != "xla"),
        dict(attention="jax_fa", remat=True, **long),
        # Last, because choosing its kernels takes memory, and it may not fit at all.
        dict(attention="xla", **long),
    ]


def trained(quick):
    """Yields the `Run` of each case, those that need least memory first.

    So that each is seen to need more, as the peak of a device's memory never falls.
    """
    data = _training.text()
    *most, last = cases(quick)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        trainings = list(pool.map(lambda case: _training.Training(data=data, **case), most))
    trainings.sort(key=lambda training: training.plan.step_mib)
    for training in trainings:
        yield training()
    try:
        yield _training.Training(data=data, **last)()
    except jax.errors.JaxRuntimeError as error:
        failure = str(error).splitlines()[0]
        sizes = dict(seed=0, remat=False, step_mib=None, compile_seconds=None)
        yield _training.Run(**last, **sizes, failure=failure)


def difference(x, y):
    """Mean and largest |x - y| of two curves of losses."""
    gap = np.abs(np.subtract(x, y))
    return float(gap.mean()), float(gap.max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=sources.RESULTS / "h200")
    parser.add_argument("--quick", action="store_true", help="small sizes, no cuDNN")
    parser.add_argument("--render", action="store_true", help="only the table and the chart")
    args = parser.parse_args()
    path = args.out / "training.json"
    if not args.render:
        machine = _machine.describe() | {"sources": sources.digest()}
        result = {"machine": machine, "runs": []}
        args.out.mkdir(parents=True, exist_ok=True)
        for run in map(dataclasses.asdict, trained(args.quick)):
            print(_row(run), flush=True)
            result["runs"].append(run)
            path.write_text(json.dumps(result, indent=1))  # what a run with a limit leaves
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(_markdown(result))
    _chart(result, path.with_suffix(".svg"))
    return 0


def _curves(result):
    """Runs of the loss curves: the ones of most steps."""
    most = max(run["steps"] for run in result["runs"])
    return [run for run in result["runs"] if run["steps"] == most]


def _differences(result):
    """`(what, mean, largest)` of pairs of curves: other attention, and other seeds."""
    of = {(run["attention"], run["seed"]): run["losses"] for run in _curves(result)}
    pairs = [
        (("jax_fa", 0), ("xla", 0)),
        (("jax_fa", 0), ("cudnn", 0)),
        (("cudnn", 0), ("xla", 0)),
        (("jax_fa", 1), ("xla", 1)),
        (("xla", 0), ("xla", 1)),
        (("jax_fa", 0), ("jax_fa", 1)),
    ]
    return [
        (f"{a[0]}, seed {a[1]}", f"{b[0]}, seed {b[1]}", *difference(of[a], of[b]))
        for a, b in pairs
        if a in of and b in of
    ]


def _row(run):
    def number(key, digits):
        return "" if run[key] is None else f"{run[key]:.{digits}f}"

    loss = f"{np.mean(run['losses'][-_SMOOTH:]):.4f}" if run["losses"] else run["failure"]
    return (
        f"| {run['attention']}{', remat' * run['remat']} | {run['length']} | {run['batch']} "
        f"| {run['seed']} | {run['steps']} | {loss} | {number('step_ms', 2)} "
        f"| {number('step_mib', 0)} | {number('peak_mib', 0)} |"
    )


def _markdown(result):
    machine = result["machine"]
    config = _training.CONFIG
    lines = [
        f"# Training on {machine['gpu'] or 'a CPU'}",
        "",
        f"`python benchmarks/training.py`: {config.layers} layers, {config.features} features, "
        f"{config.heads} query and {config.kv_heads} key heads of {config.head_dim}, causal, "
        "computed in bfloat16 from float32 weights, on Python's documentation and library by "
        f"bytes. Driver {machine['driver']}, jax {machine['jax']}, {machine['date']}, "
        f"{machine['sources']}. A step is timed by the wall clock over all steps but the first "
        "ones; its memory is what the compiler says (state, temporaries), and the device's what "
        "its allocator held at most, where no run before held more.",
        "",
        "| attention | T | B | seed | steps | loss of the last 20 | ms a step | MiB in a step "
        "| MiB on the device |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(run) for run in sorted(result["runs"], key=lambda r: (r["length"], r["seed"]))),
        "",
        "How far apart the curves of losses are, step by step, in nats for each byte:",
        "",
        "| | | mean | largest |",
        "|---|---|---|---|",
        *(f"| {a} | {b} | {m:.4f} | {most:.4f} |" for a, b, m, most in _differences(result)),
        "",
        "![loss](training.svg)",
    ]
    return "\n".join(lines) + "\n"


def _chart(result, path):
    plt.rcParams |= {"svg.hashsalt": "jax_fa", "font.size": 9}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    curves = _curves(result)
    of = {(run["attention"], run["seed"]): np.asarray(run["losses"]) for run in curves}
    for (name, seed), losses in of.items():
        style = dict(color=_COLORS[name], linestyle="--" if seed else "-")
        left.plot(_smooth(losses), label=f"{name}, seed {seed}", **style)
    base = of["xla", 0]
    for (name, seed), losses in of.items():
        if (name, seed) != ("xla", 0):
            style = dict(color=_COLORS[name], linestyle="--" if seed else "-")
            right.plot(_smooth(np.abs(losses - base)), **style)
    left.set_ylabel(f"loss (nats a byte), mean of {_SMOOTH} steps")
    right.set_ylabel("|loss - loss of xla, seed 0|, likewise")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    run, machine = curves[0], result["machine"]
    title = f"training: T = {run['length']}, B = {run['batch']}, {machine['gpu'] or 'CPU'}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _smooth(x):
    width = min(_SMOOTH, len(x) // 2)
    return np.convolve(x, np.full(width, 1 / width), mode="valid")


if __name__ == "__main__":
    sys.exit(main())
