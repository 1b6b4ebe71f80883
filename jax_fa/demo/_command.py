"""`jax-fa generate`: SmolLM2-135M-Instruct answers a prompt, or those of a file."""

import contextlib
import json
import pathlib
import sys
import time

import jax

from ._gguf import Gguf, find_smollm2
from ._sampling import Generation, Sampling
from ._scheduler import Scheduler, Sizes
from ._serving import PAGE_SIZE, Serving, create_requests
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
    file, tokenizer = _read(args, progress)
    prompt = _encode(args, tokenizer, args.prompt)
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


def _read(args, progress):
    path = args.gguf or find_smollm2()
    progress(f"reading {path}")
    file = Gguf(path)
    return file, Tokenizer(file)


def _encode(args, tokenizer, prompt):
    if args.raw:
        return tokenizer.encode(prompt, special=True)
    return tokenizer.encode_chat(prompt, args.system)


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


def prepare_many(args, progress):
    """Reads the model and the file of prompts.

    Args:
      args: The options of `jax-fa generate`, `prompts` among them.
      progress: A `Progress`.

    Returns:
      A `Tokenizer`, a `Serving`, the prompts, their `Request`s, and how many to compare.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: as `prepare`, for any of the prompts; also
        for a file of another format, and for a prompt that needs more than all pages.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    prompts = read_prompts(args.prompts)
    file, tokenizer = _read(args, progress)
    ids = [_encode(args, tokenizer, prompt) for prompt in prompts]
    requests = create_requests(file.config(args.dtype), ids, args.max_tokens, args.seed)
    sizes = Sizes.fit(requests, args.batch, args.chunk, PAGE_SIZE, args.pages)
    progress(f"loading {file.name}")
    serving = Serving(
        file.load(args.dtype), sizes, stop=tokenizer.eos, sampling=sampling, kv_dtype=args.kv_dtype
    )
    return tokenizer, serving, prompts, requests, args.compare


def read_prompts(path):
    """The prompts of a file: its lines that are not blank, or those of a .jsonl as objects.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it holds none, and for a line of a .jsonl without a string "prompt".
    """
    path = pathlib.Path(path)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
            except (ValueError, TypeError, KeyError):
                line = None
            if not isinstance(line, str):
                raise ValueError(
                    f'line {number} of {path} must be an object with a string "prompt"'
                )
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} must hold prompts, got none")
    return prompts


def answer_many(tokenizer, serving, prompts, requests, compared, progress):
    """Prints the answers in the order of the prompts, then how fast that was, on stderr.

    When it is interrupted it prints what is complete.

    Returns:
      Whether the first `compared` answers have the same tokens when they are alone in the batch.
    """
    progress(f"compiling for {jax.devices()[0].device_kind}")
    serving.compile()
    progress.clear()
    scheduler = Scheduler(requests, serving.sizes, serving.stop)
    answers, printed = {}, 0

    def show(index):
        progress.clear()
        title, *more = prompts[index].splitlines() or [""]
        print(f"[{index + 1}] {title}{' ...' if more else ''}")
        print(f"{tokenizer.decode(answers[index])}\n", flush=True)

    start = time.perf_counter()
    try:
        with contextlib.closing(serving.run(scheduler)) as run:
            for done in run:
                answers.update(done)
                while printed in answers:
                    show(printed)
                    printed += 1
                progress.status(_state(scheduler, time.perf_counter() - start))
    finally:
        seconds = time.perf_counter() - start
        for index in sorted(answers):
            if index >= printed:
                show(index)
        progress.clear()
        print(_summary(scheduler, seconds), file=sys.stderr)
    return not compared or _compare(serving, requests[:compared], answers, progress)


def _state(scheduler, seconds):
    return (
        f"{scheduler.answered} of {scheduler.total} answered, {len(scheduler.running)} running; "
        f"{scheduler.written} tokens, {scheduler.written / seconds:.1f} tokens/s"
    )


def _summary(scheduler, seconds):
    allocator = scheduler.allocator
    return (
        f"{scheduler.answered} of {scheduler.total} answered: {scheduler.read} tokens read and "
        f"{scheduler.written} written in {seconds:.2f} s and {scheduler.steps} steps, "
        f"{scheduler.written / seconds:.1f} tokens/s; "
        f"{allocator.free} of {allocator.pages} pages free"
    )


def _compare(serving, requests, answers, progress):
    """Answers `requests` one at a time and prints whether the tokens are those of `answers`.

    Returns:
      Whether they are in the step of the batch. Steps of other shapes may round otherwise.
    """

    def in_the_same_step(request):
        run = serving.run(Scheduler([request], serving.sizes, serving.stop))
        return (token for done in run for _, answer in done for token in answer)

    def without_a_batch(request):
        generation = serving.generation(request)
        next(iter(generation), None)  # compiles
        return generation

    def same_tokens(answer, name):
        same, written, seconds = 0, 0, 0.0
        for index, request in enumerate(requests):
            progress.status(f"one at a time, {name}: {index + 1} of {len(requests)}")
            tokens = answer(request)
            start = time.perf_counter()
            tokens = list(tokens)
            seconds += time.perf_counter() - start
            written += len(tokens)
            same += tokens == answers[index]
        progress.clear()
        print(
            f"one at a time, {name}: {same} of {len(requests)} answers have the same tokens, "
            f"{written / seconds:.1f} tokens/s",
            file=sys.stderr,
        )
        return same == len(requests)

    same_tokens(without_a_batch, "without a batch")
    return same_tokens(in_the_same_step, "in the same step")


class Progress:
    """What is being done, on stderr: one line that changes on a terminal, else a line each."""

    def __init__(self):
        self._start = time.perf_counter()
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def status(self, text):
        """As a call, for what changes all the time: on a terminal only, ten times a second."""
        now = time.perf_counter()
        if self._terminal and now - self._shown > 0.1:
            self._shown = now
            self(text)

    def __call__(self, text):
        self.clear()
        end = "" if self._terminal else "\n"
        seconds = time.perf_counter() - self._start
        print(f"[{seconds:4.1f} s] {text} ...", end=end, file=sys.stderr, flush=True)

    def clear(self):
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
