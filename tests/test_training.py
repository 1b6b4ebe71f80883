"""`jax-fa train`: the same curve of losses as on `jax.nn`'s attention, and the command."""

import dataclasses
import functools as ft
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa import cli

pytest.importorskip("flax.nnx", reason="needs jax_fa[demo]")
pytest.importorskip("gguf", reason="needs jax_fa[demo]")
pytest.importorskip("tokenizers", reason="needs jax_fa[demo]")

from jax_fa.demo import _llama, _training  # noqa: E402

SMALL = dataclasses.replace(
    _training.CONFIG, layers=2, features=32, hidden_features=48, heads=4, kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Optax counts on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def text():
    """A text of this test, so that what is learnt does not change with Python."""
    return np.frombuffer(inspect.getsource(_training).encode(), np.uint8)


@pytest.fixture(scope="module")
def runs(text):
    def run(attention, seed=0, remat=False):
        options = dict(steps=8, length=40, batch=2, config=SMALL, data=text)
        return _training.Training(attention, seed=seed, remat=remat, **options)()

    return {
        "ours": run("jax_fa"),
        "remat": run("jax_fa", remat=True),
        "peer": run("xla"),
        "other seed": run("xla", seed=1),
    }


def create():
    return _training.create(SMALL, "jax_fa", _training.create_optimizer(1), 0)


def test_the_peer_is_not_ours():
    def attends(attention):
        state = _training.create(SMALL, attention, _training.create_optimizer(1), 0)
        tokens = jnp.zeros((1, 9), jnp.int32)
        jaxpr = jax.make_jaxpr(lambda model: _training.loss_of(model, tokens))(state.model)
        return "jax_fa_" in str(jaxpr)

    assert attends("jax_fa") and not attends("xla")


def gap(x, y):
    return np.abs(np.subtract(x.losses, y.losses)).max()


def test_losses_are_those_of_the_peer(runs):
    ours, peer = runs["ours"], runs["peer"]
    assert len(ours.losses) == 8 and ours.losses[-1] < ours.losses[0]
    assert gap(ours, peer) < 5e-3
    assert gap(peer, runs["other seed"]) > 10 * gap(ours, peer)


def test_remat_computes_the_same(runs):
    assert gap(runs["ours"], runs["remat"]) < 5e-3


def test_runs_say_what_a_step_costs(runs):
    run = runs["ours"]
    assert run.step_ms > 0 and run.compile_seconds > 0 and run.failure is None
    weights = sum(x.size for x in jax.tree.leaves(create().model))
    # float32 weights and both moments at least
    assert run.step_mib > 12 * weights / 2**20


def test_remat_keeps_what_attention_made(text):
    """Of a layer, the backward pass reads its input and attention's results."""
    tokens = jax.numpy.zeros((2, 41), jax.numpy.int32)
    model = create().model

    def count(remat):
        grad = jax.grad(_training.loss_of)
        jaxpr = jax.make_jaxpr(lambda model: grad(model, tokens, remat))(model)
        return str(jaxpr).count("= jax_fa_fwd["), str(jaxpr).count("= jax_fa_fwd_bwd[")

    assert count(None) == count(_training.REMAT) == (1, 1)
    assert count(jax.checkpoint) == (2, 1)


def test_weights_are_float32_and_computed_in_bfloat16():
    state = create()
    assert {x.dtype.name for x in jax.tree.leaves(state.model)} == {"float32"}
    tokens = jax.numpy.zeros((1, 41), jax.numpy.int32)
    jaxpr = str(jax.make_jaxpr(_training.loss_of)(state.model, tokens))
    line = next(line for line in jaxpr.splitlines() if "= jax_fa_fwd[" in line)
    assert "bf16[1,40,4,8]" in line and "f32[1,40,4,8]" not in line


def test_no_gradient_is_scattered_to_few_rows():
    """Only those of the loss: to one of the logits of each token."""
    tokens = jax.numpy.zeros((2, 41), jax.numpy.int32)
    jaxpr = str(jax.make_jaxpr(jax.grad(_training.loss_of))(create().model, tokens))
    scattered = [line for line in jaxpr.splitlines() if "scatter-add" in line]
    assert scattered and all(":f32[2,40," in line for line in scattered)


def test_gradient_of_the_embedding():
    tokens = jax.numpy.array([[3, 1, 3, 3]])
    gradient = jax.numpy.arange(8.0).reshape(1, 4, 2)
    table = jax.numpy.ones((5, 2))
    look_up = ft.partial(_llama._look_up, jax.numpy.dtype("float32"))
    _, vjp = jax.vjp(lambda table: look_up(table, tokens), table)
    want = np.zeros((5, 2))
    np.add.at(want, np.asarray(tokens[0]), np.asarray(gradient[0]))
    np.testing.assert_array_equal(vjp(gradient)[0], want)


def test_batches_are_pieces_of_the_text(text):
    whole = text.tobytes()
    rows = [next(_training.batches(text, 3, 20, seed)) for seed in (0, 0, 1)]
    for row in rows:
        assert row.shape == (3, 21) and row.dtype == np.int32
        assert all(bytes(x.tolist()) in whole for x in row)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).any()


def test_text_is_that_of_python():
    data = _training.text()
    assert data.dtype == np.uint8 and len(data) > 1_000_000
    assert b"def dataclass(" in data.tobytes()


def test_train_says_what_it_did(monkeypatch, capsys):
    monkeypatch.setattr(_training, "CONFIG", SMALL)
    assert cli.main(["train", "--steps=2", "--length=24", "--batch=1", "--attention=all"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == ["jax_fa"] * 3 + ["xla"] * 3
    assert "step 1, loss" in out[1] and "ms a step" in out[2] and "MiB in a step" in out[2]


@pytest.mark.parametrize(
    "options, error",
    [
        (["--attention=cudnn"], "cudnn must have an NVIDIA GPU, got a cpu"),
        (["--length=1000000000"], "length must be below the"),
    ],
)
def test_what_cannot_be_trained(options, error, capsys):
    assert cli.main(["train", *options]) == 1
    assert capsys.readouterr().err.startswith(f"jax-fa: error: {error}")
