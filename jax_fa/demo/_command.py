"""`jax-fa generate`: SmolLM2-135M-Instruct answers a prompt."""

import sys
import time

import jax

from ._gguf import Gguf, find_smollm2
from ._sampling import Generation, Sampling
from ._tokenizer import Tokenizer


def prepare(args, progress):
    """Reads the model and the prompt.

    Args:
      args: The options of `jax-fa generate`.
      progress: A `Progress`.

    Returns:
      A `Tokenizer`, a `Generation`, and the number of tokens in the prompt.

    Raises:
      FileNotFoundError, ModuleNotFoundError: without the file, or the package that holds it.
      ValueError: for a prompt longer than the context, and for options out of range.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    path = args.gguf or find_smollm2()
    progress(f"reading {path}")
    file = Gguf(path)
    tokenizer = Tokenizer(file)
    if args.raw:
        prompt = tokenizer.encode(args.prompt, special=True)
    else:
        prompt = tokenizer.encode_chat(args.prompt, args.system)
    progress(f"loading {file.name}")
    generation = Generation(
        file.load(args.dtype),
        prompt,
        args.max_tokens,
        stop=tokenizer.eos,
        sampling=sampling,
        seed=args.seed,
        cache=args.cache,
        kv_dtype=args.kv_dtype,
    )
    return tokenizer, generation, len(prompt)


def answer(tokenizer, generation, prompt_tokens, progress):
    """Prints the answer as it comes, then how fast that was, on stderr."""
    progress(f"compiling for {jax.devices()[0].device_kind}")
    generation.compile()
    progress.clear()
    for text in tokenizer.stream(generation):
        print(text, end="", flush=True)
    print()
    print(_speed(prompt_tokens, generation), file=sys.stderr)


def _speed(prompt_tokens, generation):
    def rate(tokens, seconds):
        per_second = f"{tokens / seconds:.1f} tokens/s" if seconds else "-"
        return f"{tokens} tokens in {seconds:.2f} s, {per_second}"

    prefill = rate(prompt_tokens, generation.prefill_seconds)
    return f"prefill: {prefill}; decode: {rate(generation.steps, generation.decode_seconds)}"


class Progress:
    """What is being done, on stderr: one line that changes on a terminal, else a line each."""

    def __init__(self):
        self._start = time.perf_counter()
        self._terminal = sys.stderr.isatty()

    def __call__(self, text):
        self.clear()
        end = "" if self._terminal else "\n"
        seconds = time.perf_counter() - self._start
        print(f"[{seconds:4.1f} s] {text} ...", end=end, file=sys.stderr, flush=True)

    def clear(self):
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
