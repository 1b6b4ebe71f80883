"""Turns a result into charts and a table, beside it.

    python -m benchmarks.report benchmarks/results/h200/benchmarks.json [MORE.json ...]

writes one `<sweep>.svg` for each sweep (throughput, and share of the roofline, of each
implementation) and `<name of the first result>.md` with geometric means and every measurement.
More results are taken for parts of one: they must be of the same sources and the same machine.
"""

import argparse
import collections
import json
import math
import pathlib
import statistics

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend

# implementations keep their colour from chart to chart; ours are the warm ones, drawn thicker
_OURS = ("#d62728", "#ff7f0e", "#e377c2", "#8c1c13", "#bcbd22", "#f4a259", "#ffbb78")
_PEERS = {
    "cudnn": "#1f77b4", "xla": "#7f7f7f", "flash-attn3-jax": "#2ca02c", "fa3-fwd": "#006d2c",
    "tokamax": "#9467bd", "pallas": "#17becf", "torch-flash": "#6baed6", "torch-cudnn": "#08306b",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("result", type=pathlib.Path, nargs="+", help="what --benchmark-json wrote")
    paths = parser.parse_args().result
    results = [json.loads(path.read_text()) for path in paths]
    path, machine = paths[0], results[0]["machine_info"]
    for key in ("sources", "gpu", "driver", "jax", "arch"):
        found = {result["machine_info"].get(key) for result in results}
        if len(found) > 1:
            parser.error(f"results must agree in {key}, got {found}")
    rows = [entry["extra_info"] for result in results for entry in result["benchmarks"]]
    plt.rcParams |= {"svg.hashsalt": "jax_fa", "font.size": 9}
    charts = []
    for sweep, group in _by_sweep(rows).items():
        charts.append(path.with_name(f"{sweep}.svg"))
        _chart(sweep, group, machine, charts[-1])
    table = path.with_suffix(".md")
    table.write_text(_markdown(rows, machine, charts))
    print(*charts, table, sep="\n")


def _by_sweep(rows):
    """Rows by sweep, in the order of the result; gradients apart."""
    groups = collections.defaultdict(list)
    for row in rows:
        case = row["case"]
        groups[case["sweep"] + "_backward" * case["backward"]].append(row)
    return groups


def _by_implementation(rows):
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["implementation"]].append(row)
    return groups


def _memory_bound(rows):
    return rows[0]["operation"] in ("decode", "quantized", "append")


def _chart(sweep, rows, machine, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    places = list(dict.fromkeys(row["case"]["x"] for row in rows))
    key, unit = ("gb_per_s", "GB/s") if _memory_bound(rows) else ("tflops", "TFLOP/s")
    ours = iter(_OURS)
    for name, group in _by_implementation(rows).items():
        mine = name.startswith("jax_fa")
        style = {
            "label": name,
            "color": next(ours, None) if mine else _PEERS.get(name),
            "linewidth": 2.2 if mine else 1.2,
            "marker": "o",
            "markersize": 5 if mine else 3,
            "zorder": 3 if mine else 2,
            "linestyle": "-" if rows[0]["case"]["axis"] else "none",
        }
        at = [places.index(row["case"]["x"]) for row in group]
        left.plot(at, [row[key] for row in group], **style)
        right.plot(at, [row["roofline_percent"] or math.nan for row in group], **style)
    left.set_ylabel(unit)
    right.set_ylabel("% of the roofline")
    for axes in (left, right):
        axes.set_xlabel(rows[0]["case"]["axis"])
        labels = [str(x) for x in places]
        axes.set_xticks(range(len(places)), labels, rotation=60 if len(places) > 6 else 20)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    case = rows[0]["case"]
    heads = f"{case['heads_q']}/{case['heads_kv']} heads of " if case["axis"] else "heads of "
    figure.suptitle(
        f"{sweep}: {case['dtype']}, {heads}{case['head_dim']}, {machine['gpu'] or 'CPU'}, "
        f"{rows[0]['method']}, {rows[0]['l2']} L2",
        fontsize=10,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _markdown(rows, machine, charts):
    method = ", ".join(sorted({row["method"] for row in rows}))
    arch = machine.get("arch")
    lines = [
        f"# Benchmarks on {machine['gpu'] or 'a CPU'}",
        "",
        f"{method}. Driver {machine['driver']}, jax {machine['jax']}, {machine['date']}, "
        f"{machine['sources']}{f', JAX_FA_ARCH={arch}' if arch else ''}. Peers: "
        + (", ".join(f"{name} {version}" for name, version in machine["peers"].items()) or "none")
        + ".",
        "",
    ]
    if machine["peak_tflops"]:
        lines += [
            f"Roofline: the larger of FLOPs / {machine['peak_tflops']} TFLOP/s and "
            f"bytes / {machine['peak_gb_per_s']} GB/s.",
            "",
        ]
    lines += _summary(rows)
    lines += [f"![{chart.stem}]({chart.name})" for chart in charts]
    for sweep, group in _by_sweep(rows).items():
        lines += ["", f"## {sweep}", *_table(group)]
    return "\n".join(lines) + "\n"


def _summary(rows):
    """How many times faster ours are, as geometric means over each sweep."""
    lines = [
        "| sweep | implementation | x best peer | worst | points | x jax_fa |",
        "|---|---|---|---|---|---|",
    ]
    for sweep, group in _by_sweep(rows).items():
        for name, each in _by_implementation(group).items():
            if not name.startswith("jax_fa"):
                continue
            peer = [row for row in each if row["against_best_peer"]]
            worst = min(peer, key=lambda row: row["against_best_peer"], default=None)
            at = worst and f"{worst['against_best_peer']:.3f} at {worst['case']['x']}"
            lines.append(
                f"| {sweep} | {name} | {_mean(peer, 'against_best_peer')} | {at or ''} "
                f"| {len(each)} | {'' if name == 'jax_fa' else _mean(each, 'against_jax_fa')} |"
            )
    return [*lines, ""]


def _mean(rows, key):
    ratios = [row[key] for row in rows if row[key]]
    return f"{statistics.geometric_mean(ratios):.3f}" if ratios else ""


def _table(rows):
    lines = [
        "| shape | implementation | us | TFLOP/s | GB/s | % of roofline | x best peer | x jax_fa "
        "| error | SM MHz |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row["case"]
        peer = row["best_peer"]
        ratio = f"{row['against_best_peer']:.3f} ({peer})" if peer else ""
        lines.append(
            f"| {case['axis']} {case['x']} | {row['implementation']} | {row['us']:.1f} "
            f"| {row['tflops']:.1f} | {row['gb_per_s']:.0f} | {_number(row['roofline_percent'])} "
            f"| {ratio} | {_number(row['against_jax_fa'], 3)} | {row['error']:.1e} "
            f"| {_number(row['sm_mhz'])} |"
        )
    return lines


def _number(x, digits=0):
    return "" if x is None else f"{x:.{digits}f}"


if __name__ == "__main__":
    main()
