"""Continuous batching in the demo: pages and rows on the host, and the step that they share."""

import dataclasses
import functools as ft
import json

import jax
import jax.numpy as jnp
import llamas
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_fa import cli, demo
from jax_fa.demo import _command

SMALL = dataclasses.replace(llamas.SMALL, max_length=64)
STOP = 0


# Pages.


@given(st.integers(0, 12), st.data())
def test_pages_have_one_owner_and_all_come_back(pages, data):
    allocator = demo.PageAllocator(pages)
    taken = []
    for _ in range(data.draw(st.integers(0, 20))):
        if taken and data.draw(st.booleans()):
            allocator.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            count = data.draw(st.integers(0, pages + 1))
            if count > allocator.free:
                with pytest.raises(ValueError, match=f"free pages, got {count}"):
                    allocator.take(count)
            else:
                taken.append(allocator.take(count))
        owned = sum(taken, [])
        assert len(set(owned)) == len(owned) == pages - allocator.free
        assert set(owned) <= set(range(pages))
    for some in taken:
        allocator.give_back(some)
    assert allocator.free == pages


def test_pages_that_are_not_taken_cannot_come_back():
    allocator = demo.PageAllocator(4)
    first, second = allocator.take(2)
    for wrong in ([first, first], [first, 3], [-1]):
        with pytest.raises(ValueError, match="pages must be taken, each once"):
            allocator.give_back(wrong)
    allocator.give_back([second, first])
    assert allocator.free == 4


# The scheduler, with a model of a few lines: it writes tokens into pages and reads them back.


def after(text):
    """The token that follows a text."""
    return sum(i * token for i, token in enumerate(text, 3)) % 11


def answer(request):
    text, tokens = list(request.prompt), []
    while len(tokens) < request.max_tokens and (token := after(text)) != STOP:
        text.append(token)
        tokens.append(token)
    return tokens


def play(scheduler, seen=lambda step: None, ahead=False):
    """Runs a scheduler; the answers in the order in which they were complete.

    `ahead`: each step is planned before the tokens of the last one are known.
    """
    sizes, done = scheduler.sizes, []
    pool = np.full((sizes.pages, sizes.page_size), -99)
    following = None  # tokens of a step that was not committed
    while True:
        if following is not None and not ahead:
            done += scheduler.commit(following)
        step, previous = scheduler.plan(), following
        if step is None and not scheduler.awaits:
            return done
        if following is not None and ahead:
            done += scheduler.commit(following)
        if step is None:
            following = None
            continue
        seen(step)
        assert [x.shape for x in step] == [
            (sizes.rows + sizes.chunk,),
            (sizes.rows + 1,),
            (sizes.rows,),
            (sizes.rows, sizes.max_pages),
            (sizes.rows,),
        ]
        assert all(x.dtype == np.int32 for x in step)
        pages = step.page_table[step.page_table >= 0]
        assert len(set(pages)) == len(pages)
        starts, ends = step.cu_seqlens[:-1], step.cu_seqlens[1:]
        assert step.cu_seqlens[0] == 0 and ends[-1] > 0
        following = np.full(sizes.rows, -7)
        for row in np.flatnonzero(ends > starts):
            end = step.lengths[row] + ends[row] - starts[row]
            at = np.arange(end)
            where = step.page_table[row, at // sizes.page_size], at % sizes.page_size
            assert where[0].min() >= 0
            new = slice(step.lengths[row], end)
            tokens = step.tokens[starts[row] : ends[row]]
            if tokens[0] < 0:
                assert ahead and tokens.tolist() == [-1 - row]
                tokens = previous[row]
                assert tokens >= 0
            pool[where[0][new], where[1][new]] = tokens
            following[row] = after(pool[where].tolist())


requests_of = st.builds(
    demo.Request, st.lists(st.integers(1, 9), min_size=1, max_size=23), st.integers(0, 9)
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests_of, max_size=12),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 12),
    st.booleans(),
)
def test_every_request_is_answered_once_as_if_alone(requests, rows, chunk, page_size, more, ahead):
    requests = [dataclasses.replace(x, seed=i) for i, x in enumerate(requests)]
    most = max((x.pages(page_size) for x in requests), default=0)
    sizes = demo.Sizes.fit(requests, rows, chunk, page_size, most + more)
    cuts, admitted, steps = {}, set(), []

    def note(cuts, step):
        for row in np.flatnonzero(np.diff(step.cu_seqlens)):
            piece = step.lengths[row], step.cu_seqlens[row + 1] - step.cu_seqlens[row]
            cuts.setdefault(step.seeds[row], []).append(piece)

    def note_in_order(step):
        note(cuts, step)
        steps.append(step)
        admitted.update(cuts, scheduler.running)
        assert admitted == set(range(len(admitted)))

    scheduler = demo.Scheduler(requests, sizes, STOP)
    done = play(scheduler, note_in_order, ahead)
    assert len(done) == len(requests) == scheduler.answered == scheduler.total
    assert dict(done) == {i: answer(x) for i, x in enumerate(requests)}
    assert scheduler.allocator.free == sizes.pages and scheduler.running == []
    assert ahead or scheduler.steps == len(steps)
    assert scheduler.read == sum(len(x.prompt) for x in requests)
    assert scheduler.written == sum(len(tokens) for _, tokens in done)
    for i, request in enumerate(requests):
        alone = {}
        play(demo.Scheduler([request], sizes, STOP), ft.partial(note, alone), ahead)
        assert alone[i] == cuts[i]


def test_a_pool_that_fits_is_never_waited_for():
    requests = [demo.Request([1] * n, 4) for n in (30, 2, 9, 17, 5)]
    sizes = demo.Sizes.fit(requests, 3, 64, 4)
    assert (sizes.max_pages, sizes.pages) == (9, 9 + 5 + 3)
    scheduler = demo.Scheduler(requests, sizes)
    scheduler.plan()
    assert scheduler.running == [0, 1, 2]


def test_rows_decode_while_a_prompt_is_read():
    requests = [demo.Request([1, 2], 9), demo.Request([3] * 20, 9)]
    scheduler = demo.Scheduler(requests, demo.Sizes.fit(requests, 2, 8, 4))
    counts = []
    play(scheduler, lambda step: counts.append(np.diff(step.cu_seqlens).tolist()))
    assert counts[:5] == [[2, 0], [1, 8], [1, 8], [1, 4], [1, 1]]


@pytest.mark.parametrize("ahead", [False, True])
def test_cancelled_rows_give_their_pages_back(ahead):
    requests = [demo.Request([1] * 9, 4)] * 5
    scheduler = demo.Scheduler(requests, demo.Sizes.fit(requests, 2, 4, 4))
    for _ in range(3):
        scheduler.plan()
        scheduler.commit([5, 5])
    if ahead:
        scheduler.plan()
    assert scheduler.allocator.free == 0
    scheduler.cancel()
    assert scheduler.allocator.free == scheduler.sizes.pages and scheduler.running == []
    assert not scheduler.awaits
    with pytest.raises(ValueError, match="must be planned before"):
        scheduler.commit([5, 5])


def test_a_row_that_ends_leaves_when_its_last_token_is_planned():
    requests = [demo.Request([1], 1), demo.Request([2], 1)]
    scheduler = demo.Scheduler(requests, demo.Sizes.fit(requests, 1, 1, 1))
    assert [scheduler.plan().tokens[0] for _ in range(2)] == [1, 2]
    assert scheduler.plan() is None and scheduler.awaits
    assert [scheduler.commit([7]), scheduler.commit([8])] == [[(0, [7])], [(1, [8])]]
    assert not scheduler.awaits


def test_a_row_that_stops_leaves_its_place_while_a_step_of_it_runs():
    requests = [demo.Request([1], 3), demo.Request([2], 1)]
    scheduler = demo.Scheduler(requests, demo.Sizes.fit(requests, 1, 1, 4), STOP)
    assert [scheduler.plan().tokens[0] for _ in range(2)] == [1, -1]
    assert scheduler.commit([STOP]) == [(0, [])]
    assert scheduler.plan().tokens[0] == 2
    assert [scheduler.commit([5]), scheduler.commit([6])] == [[], [(1, [6])]]
    assert scheduler.written == 1


def test_requests_that_cannot_run_are_refused():
    with pytest.raises(ValueError, match="3 pages of 8 tokens that prompt 2 .17 tokens.*got 2"):
        demo.Sizes.fit([demo.Request([1] * 9, 4), demo.Request([1] * 17, 4)], 4, 8, 8, pages=2)
    with pytest.raises(ValueError, match="prompt 1 must have tokens, got none"):
        demo.Sizes.fit([demo.Request([], 4)], 4, 8, 8)
    sizes = demo.Sizes.fit([demo.Request([1], 4)], 4, 8, 8)
    with pytest.raises(ValueError, match="each request must fit Sizes"):
        demo.Scheduler([demo.Request([1] * 9, 4)], sizes)
    for length in (0, 64, 99):
        with pytest.raises(
            ValueError, match=f"prompt 2 must have 1 to 63 tokens.*64, got {length}"
        ):
            demo.create_requests(SMALL, [[1], [1] * length], 4)


# The step: a small model of random weights.


small_model = ft.cache(ft.partial(llamas.small_model, max_length=SMALL.max_length))


def small_requests(max_tokens=10, seed=3):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 61, n).tolist() for n in (9, 1, 30, 4, 60, 17, 2)]
    return demo.create_requests(SMALL, prompts, max_tokens, seed)


def serve(serving, requests):
    scheduler = demo.Scheduler(requests, serving.sizes, serving.stop)
    done = [pair for pairs in serving.run(scheduler) for pair in pairs]
    assert len(done) == len(requests) == scheduler.answered
    assert scheduler.allocator.free == serving.sizes.pages
    return [tokens for _, tokens in sorted(done)]


def serve_alone(serving, requests):
    return [serve(serving, [request])[0] for request in requests]


@pytest.mark.parametrize(
    "rows, chunk, page_size, pages, kv_dtype",
    [
        (3, 16, 8, None, None),
        (7, 5, 4, 20, None),
        (1, 64, 64, 1, "bfloat16"),
        (4, 7, 16, 9, "int8"),
        (5, 32, 3, 40, "float8_e4m3fn"),
    ],
)
def test_tokens_are_those_of_each_alone(rows, chunk, page_size, pages, kv_dtype):
    requests = small_requests()
    sizes = demo.Sizes.fit(requests, rows, chunk, page_size, pages)
    serving = demo.Serving(small_model(), sizes, stop=7, kv_dtype=kv_dtype)
    serving.compile()
    together = serve(serving, requests)
    lengths = [len(tokens) for tokens in together]
    assert lengths[:4] == [10] * 4 and lengths[4] == 0
    assert together == serve_alone(serving, requests)


def test_logits_have_the_bits_of_a_row_alone():
    model, sizes = small_model(), demo.Sizes(4, 24, 20, 8, 6)
    requests = [demo.Request(list(range(1, n)), 9) for n in (12, 3, 40, 20)]
    step = jax.jit(lambda tokens, cu, cache: model.extend_packed(tokens, cu, cache, split_size=64))

    def logits(requests):
        """`{(request, tokens in its cache): logits}`."""
        scheduler, out = demo.Scheduler(requests, sizes), {}
        cache = demo.Serving(model, sizes)._create_cache()
        while (plan := scheduler.plan()) is not None:
            cache = dataclasses.replace(cache, page_table=plan.page_table, lengths=plan.lengths)
            new, cache = step(plan.tokens, plan.cu_seqlens, cache)
            for row in np.flatnonzero(np.diff(plan.cu_seqlens)):
                out[plan.seeds[row], cache.lengths[row].item()] = np.asarray(new[row])
            scheduler.commit(new.argmax(-1))
        return out

    requests = [dataclasses.replace(x, seed=i) for i, x in enumerate(requests)]
    together = logits(requests)
    assert step._cache_size() == 1
    alone = {}
    for request in requests:
        alone |= logits([request])
    assert together.keys() == alone.keys()
    for at, row in together.items():
        np.testing.assert_array_equal(row, alone[at])
    # and they are those of the model without a cache
    text = jnp.array([requests[2].prompt], jnp.int32)
    np.testing.assert_allclose(together[2, 39], model(text)[0, -1], atol=3e-6)


def test_random_tokens_depend_on_the_seed_alone():
    requests = small_requests(seed=2**31 - 1)
    sampling = demo.Sampling(temperature=1.0, top_k=40, top_p=0.9)
    serving = demo.Serving(small_model(), demo.Sizes.fit(requests, 3, 16, 8), sampling=sampling)
    together = serve(serving, requests)
    assert together == serve_alone(serving, requests)
    for i in (0, 3):
        assert together[i] == list(serving.generation(requests[i]))
    twice = serve(serving, [requests[3], dataclasses.replace(requests[3], seed=99)])
    assert twice[0] == together[3] != twice[1]


def test_answers_of_few_tokens():
    requests = small_requests(9)[:3]
    serving = demo.Serving(small_model(), demo.Sizes.fit(requests, 2, 16, 8))
    whole = serve(serving, requests)
    for few in (0, 1, 2):
        some = [dataclasses.replace(request, max_tokens=few) for request in requests]
        assert serve(serving, some) == [tokens[:few] for tokens in whole]
    stop = serving.stop = whole[0][0]
    cut = [tokens[: (tokens + [stop]).index(stop)] for tokens in whole]
    assert cut[0] == [] and serve(serving, requests) == cut


def test_the_next_step_is_planned_before_the_tokens_of_one_are_known(monkeypatch):
    events = []
    for name in ("plan", "commit"):

        def noted(self, *args, name=name, call=getattr(demo.Scheduler, name)):
            events.append(name)
            return call(self, *args)

        monkeypatch.setattr(demo.Scheduler, name, noted)
    requests = small_requests(4)[:1]
    serve(demo.Serving(small_model(), demo.Sizes.fit(requests, 1, 16, 8)), requests)
    assert events == ["plan"] + ["plan", "commit"] * 4 + ["plan"]


def test_the_step_writes_the_cache_in_place():
    model, sizes = small_model(), demo.Sizes(4, 16, 4096, 16, 5)
    serving = demo.Serving(model, sizes)
    serving.compile()
    memory = serving._step.memory_analysis()
    cache = 2 * SMALL.layers * 4096 * 16 * SMALL.kv_heads * SMALL.head_dim * 4
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


def test_interrupted_steps_give_all_pages_back():
    requests = small_requests()
    serving = demo.Serving(small_model(), demo.Sizes.fit(requests, 3, 16, 8))
    scheduler = demo.Scheduler(requests, serving.sizes)
    run = serving.run(scheduler)
    next(run)
    assert scheduler.allocator.free < serving.sizes.pages
    with pytest.raises(KeyboardInterrupt):
        run.throw(KeyboardInterrupt)
    assert scheduler.allocator.free == serving.sizes.pages


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, kv_dtype", [("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", None)]
)
def test_tokens_are_those_of_each_alone_on_the_gpu(dtype, kv_dtype):
    """Tokens drawn at random show other bits more often than the likeliest ones."""
    model = small_model(head_dim=64, dtype=dtype)
    requests = small_requests(max_tokens=30)
    sampling = demo.Sampling(temperature=1.0)
    sizes = demo.Sizes.fit(requests, 5, 32, 16)
    serving = demo.Serving(model, sizes, sampling=sampling, kv_dtype=kv_dtype)
    serving.compile()
    assert serve(serving, requests) == serve_alone(serving, requests)


# Files of prompts.


def test_lines_are_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Hi there\n\n  \nWhy?\r\nnaïve\x85\n")
    assert _command.read_prompts(file) == ["Hi there", "Why?", "naïve"]
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match="must hold prompts, got none"):
        _command.read_prompts(file)


def test_json_lines_are_prompts_of_several_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a\nb"}, {"id": 3, "prompt": ""}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert _command.read_prompts(file) == ["a\nb", ""]
    for wrong in ("{", "[]", '{"text": "a"}', '{"prompt": 3}', "3"):
        file.write_text('{"prompt": "a"}\n' + wrong)
        with pytest.raises(ValueError, match='line 2 of .* an object with a string "prompt"'):
            _command.read_prompts(file)


# SmolLM2 itself, and the command.

PROMPTS = [
    "The capital of France is",
    "1 2 3 4 5",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "Hello",
]


@pytest.mark.real_blocks
def test_greedy_tokens_of_smollm2_are_those_of_each_prompt_alone(gguf_file, smollm2):
    tokenizer = demo.Tokenizer(gguf_file)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    requests = demo.create_requests(smollm2.config, prompts, 5)
    sizes = demo.Sizes.fit(requests, 3, 8, 8, pages=6)
    serving = demo.Serving(smollm2, sizes, stop=tokenizer.eos)
    together = serve(serving, requests)
    assert tokenizer.decode(together[0]).startswith(" Paris")
    assert together == [list(serving.generation(request)) for request in requests]


@pytest.fixture
def generate(gguf_file, smollm2, monkeypatch, tmp_path):
    """Runs the command on a file of prompts with the tests' copy of the model."""
    monkeypatch.setattr(_command, "Gguf", lambda path: gguf_file)
    monkeypatch.setattr(gguf_file, "load", lambda dtype: smollm2)
    file = tmp_path / "prompts.jsonl"

    def run(prompts, *options):
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        return cli.main(["generate", f"--prompts={file}", "--raw", *options])

    return run


SIZES = ["--batch=2", "--chunk=6", "--pages=2"]


def test_generate_answers_a_file(generate, capsys):
    prompts = [PROMPTS[0], "1 2 3\n4 5", PROMPTS[2]]
    assert generate(prompts, *SIZES, "--max-tokens=3", "--kv-dtype=float32", "--compare=1") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"[1] {PROMPTS[0]}\n Paris.")
    assert 0 < out.index("\n\n[2] 1 2 3 ...\n") < out.index("\n\n[3] def fibonacci(n):\n")
    assert "3 of 3 answered: " in err and "2 of 2 pages free" in err
    assert "without a batch: 1 of 1 answers have the same tokens" in err
    assert "in the same step: 1 of 1 answers have the same tokens" in err


def test_interrupt_prints_what_is_done(generate, monkeypatch, capsys):
    commit = demo.Scheduler.commit

    def interrupted(self, tokens):
        if self.answered:
            raise KeyboardInterrupt
        second_stops = np.array(tokens)
        second_stops[1] = self.stop
        return commit(self, second_stops)

    monkeypatch.setattr(demo.Scheduler, "commit", interrupted)
    assert generate(["a b c", "Hello", "Hi"], *SIZES, "--max-tokens=3") == 130
    out, err = capsys.readouterr()
    assert out.startswith("[2] Hello\n") and "[1]" not in out and "[3]" not in out
    assert "1 of 3 answered: " in err and "2 of 2 pages free" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (["a", "b " * 99], ["--pages=1"], "the pool must have the 2 pages of 64 tokens"),
        (["a", ""], [], "prompt 2 must have 1 to 8191 tokens"),
        ([], [], "must hold prompts, got none"),
        (["a"], ["--top-p=0"], "top_p must be in"),
    ],
)
def test_refused_before_anything_runs(generate, prompts, options, message, monkeypatch, capsys):
    monkeypatch.delattr(_command, "answer_many")
    assert generate(prompts, *options, "--max-tokens=3") == 1
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("jax-fa: error: ") and message in line and not out


def test_no_such_file(capsys):
    assert cli.main(["generate", "--prompts=/no/such/file"]) == 1
    assert "jax-fa: error: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["a", "--prompts=b"], [], ["--prompts=b", "--batch=0"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["generate", *arguments])
    assert status.value.code == 2
    assert "error" in capsys.readouterr().err
