"""The training loop: one program, resume, refusals. Invariants 8, 9 and 10."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.errors import UserError
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.models.load import Subject
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh, parse_mesh
from jaxinterp.training.state import make_step, start_state
from jaxinterp.trees import named_leaves

METHOD = SkipTranscoder(features=64, k=4, learning_rate=3e-3)
SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 5}
TRAFFIC = re.compile(r"\b(infeed|outfeed|send|recv|custom-call[^\n]*callback)\b")


def same(first, second):
    """Every leaf equal to the last bit."""
    one, two = named_leaves(first), named_leaves(second)
    assert one.keys() == two.keys()
    for name in one:
        leaves = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (one[name], two[name])
        )
        np.testing.assert_array_equal(*(np.asarray(leaf) for leaf in leaves), err_msg=name)


@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        Transcoder(features=64, k=4, learning_rate=1e-2),
        SparseAutoencoder(features=64, k=4, array="hidden", learning_rate=1e-2),
    ],
)
def test_training_explains_more_than_it_did(subject, text, method):
    result = fit(method, subject, text, **SIZES | {"steps": 60})
    assert result.history[-1]["fvu"] < 0.9 * result.history[0]["fvu"]
    assert [row["step"] for row in result.history] == list(range(5, 61, 5))
    row = result.history[-1]
    assert row["tokens"] == 60 * 256 and row["l0"] <= 4 and 0 <= row["dead_fraction"] < 1
    assert all(isinstance(value, int | float) for value in row.values())
    assert result.decomposition.sites == method.needs("blocks/1/mlp")


def compiled_step(subject, spy=None):
    """The compiled training program and the shapes of what it returns."""
    mesh, sites = make_mesh(), METHOD.needs("blocks/1/mlp")
    recipe = METHOD.recipe(20)
    step = make_step(recipe, sites, mesh)
    if spy is not None:
        inner = step

        def step(frozen, state):
            state, metrics = inner(frozen, state)
            spy(metrics["loss"].total)
            return state, metrics

    windows = {"tokens": jnp.zeros((8, 32), jnp.int32), "weight": jnp.ones((8, 32))}
    rows = {name: jnp.ones((1024, 64)) for name in sites.names()}
    from jaxinterp.data.activations import Rows

    with jax.set_mesh(mesh):
        state = eqx.filter_jit(start_state)(recipe, sites, Rows(rows, jnp.ones(1024)), 0)
        lowered = jax.jit(step, donate_argnums=1).lower((subject.model, windows), state)
    return lowered.compile().as_text(), lowered.out_info


def test_harvest_and_step_are_one_program_without_a_way_out(subject):
    """Invariant 8: no infeed, outfeed, send, recv or callback; no output but the state and metrics."""
    text, (state, metrics) = compiled_step(subject)
    assert not TRAFFIC.search(text)
    spied, _ = compiled_step(subject, spy=lambda loss: jax.debug.print("{}", loss))
    assert TRAFFIC.search(spied), "the search would not have found a callback"
    tokens = {256, 8 * 32}
    assert not any(tokens & set(metric.shape) for metric in jax.tree.leaves(metrics))
    assert {type(state).__name__} == {"TrainState"}
    outside_buffer = {name: leaf for name, leaf in named_leaves(state).items() if not name.startswith("buffer/")}
    assert not any(tokens & set(leaf.shape) for leaf in outside_buffer.values())


def test_the_buffer_gives_every_row_once():
    from jaxinterp.data.activations import Rows, shuffle_in

    def rows(start, count):
        numbers = jnp.arange(start, start + count, dtype=jnp.float32)
        return Rows({"x": numbers[:, None]}, numbers)

    buffer, out = rows(0, 32), []
    for step in range(20):
        buffer, drawn = shuffle_in(buffer, rows(32 + 8 * step, 8), jax.random.key(step))
        np.testing.assert_array_equal(drawn.arrays["x"][:, 0], drawn.weight)
        out += drawn.weight.tolist()
    assert sorted(out + buffer.weight.tolist()) == list(range(32 + 8 * 20))
    assert out != sorted(out)


@pytest.mark.parametrize("stop", [5, 15])
def test_a_resumed_run_is_the_uninterrupted_run(subject, text, tmp_path, stop):
    """Invariant 9, to the last bit: state, buffer, data position, metrics."""
    whole = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "whole", save_every=5)
    first = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "parts", save_every=5, stop_after=stop)
    assert int(first.state.step) == stop
    second = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "parts", save_every=5, resume=True)
    same(whole.state, second.state)
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows] for rows in
                (whole.history, first.history + second.history)]  # fmt: skip
    assert timeless[0] == timeless[1]
    again = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "parts", resume=True)
    assert again.history == [] and int(again.state.step) == 20


def test_another_seed_is_another_run(subject, text):
    one, two = (fit(METHOD, subject, text, **SIZES | {"steps": 5, "seed": seed}) for seed in (0, 1))
    assert one.history[-1]["loss"] != two.history[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": SkipTranscoder(features=64, k=8, learning_rate=3e-3)}, "made with k=4, not 8"),
        ({"site": "blocks/2/mlp"}, "made with site='blocks/1/mlp', not 'blocks/2/mlp'"),
        ({"resume": False}, "already holds step 5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(subject, text, tmp_path, change, words):
    """Invariant 10."""
    fit(METHOD, subject, text, **SIZES | {"steps": 5}, checkpoint=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    asked = {"method": METHOD, **SIZES, "steps": 5, "resume": True} | change
    with pytest.raises(UserError, match=words):
        fit(asked.pop("method"), subject, text, checkpoint=tmp_path / "run", **asked)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"site": "blocks/1/mlpp"}, "Did you mean 'blocks/1/mlp'"),
        ({"batch_size": 100}, "batch_size=100 must be a multiple of the windows' length 32"),
        ({"steps": 0}, "steps=0"),
        ({"buffer_batches": 0}, "buffer_batches=0"),
        ({"save_every": 7}, "save_every=7 must be a multiple of log_every=5"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(subject, text, change, words):
    with pytest.raises(UserError, match=words):
        fit(METHOD, subject, text, **SIZES | change)


def test_nan_activations_are_named(subject, text):
    broken = eqx.tree_at(lambda m: m.blocks[0].mlp.down.bias, subject.model, jnp.full(64, jnp.nan))
    with pytest.raises(UserError, match="activations at 'blocks/1/mlp/in' are NaN or infinite"):
        fit(METHOD, Subject(broken, None, "broken"), text, **SIZES)


def test_a_diverging_run_stops_and_keeps_its_checkpoint(subject, text, tmp_path):
    wild = SkipTranscoder(features=64, k=4, learning_rate=1e30)
    with pytest.raises(UserError, match="lower the learning rate"):
        fit(wild, subject, text, **SIZES, checkpoint=tmp_path / "run", save_every=5)


def test_k_of_a_schedule_is_not_recompiled(subject, text):
    scheduled = fit(METHOD, subject, text, **SIZES, k=lambda step: jnp.where(step < 10, 4, 1))
    assert scheduled.history[0]["l0"] > 3 and scheduled.history[-1]["l0"] <= 1


@pytest.mark.parametrize("words", ["data=2,rows=4", "data", "data=x"])
def test_a_mesh_that_cannot_be_read(words):
    with pytest.raises(UserError, match="write it as data=2,feature=4"):
        parse_mesh(words)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(UserError, match="needs 64 devices, but there are 8"):
        parse_mesh("data=16,feature=4")
