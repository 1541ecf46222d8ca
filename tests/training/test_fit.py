"""The training loop: one program, resume, refusals. Invariants 8, 9 and 10."""

import re
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import Rows, harvest, shuffle_in
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder, gradient_method
from jaxinterp.models.edits import Add
from jaxinterp.models.load import Subject
from jaxinterp.models.run import run
from jaxinterp.objectives import Ratio, l1, reconstruction, scale, total
from jaxinterp.training.fit import check_word, fit
from jaxinterp.training.mesh import make_mesh, parse_mesh
from jaxinterp.training.state import make_step, start_state
from tests.training.small import METHOD, SIZES, same

TRAFFIC = re.compile(r"\b(infeed|outfeed|send|recv|custom-call[^\n]*callback)\b")


def spoiled(decomposition, batch, key, *, model=None):
    """An objective whose gradient is not a number from step 12 on; the loss shows it a step later."""
    loss, metrics = total(reconstruction())(decomposition, batch, key)
    poison = jnp.where(batch.step >= 12, jnp.nan, 0.0) * jnp.sum(decomposition.decoder)
    return loss + poison - jax.lax.stop_gradient(poison), metrics | {"loss": Ratio(loss, jnp.ones(()))}


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
    buffer = Rows({name: jnp.ones((8, 128, 64)) for name in sites.names()}, jnp.ones((8, 128)))
    with jax.set_mesh(mesh):
        state = eqx.filter_jit(start_state)(recipe, sites, mesh, subject.model, buffer, 0)
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


def test_the_buffer_gives_every_row_once_and_lanes_never_mix():
    """Invariant 18."""

    def rows(start, count):
        """Two lanes: numbers from `start`, and the same plus 1000."""
        numbers = jnp.arange(start, start + count, dtype=jnp.float32) + jnp.array([[0.0], [1000.0]])
        return Rows({"x": numbers[..., None]}, numbers)

    buffer, out = rows(0, 32), []
    for step in range(20):
        buffer, drawn = shuffle_in(buffer, rows(32 + 8 * step, 8), jax.random.key(step))
        np.testing.assert_array_equal(drawn.arrays["x"][..., 0], drawn.weight)
        out.append(np.asarray(drawn.weight))
    lanes = np.concatenate([*out, np.asarray(buffer.weight)], axis=1)
    for lane, shift in zip(lanes, (0, 1000), strict=True):
        assert sorted(lane - shift) == list(range(32 + 8 * 20))
        assert list(lane) != sorted(lane)
    assert list(lanes[0]) != list(lanes[1] - 1000), "every lane has its own order"


@pytest.fixture(scope="module")
def whole(subject, text, tmp_path_factory):
    """The run that nothing interrupts."""
    return fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path_factory.mktemp("whole"), save_every=5)


@pytest.mark.parametrize("stop", [5, 15])
def test_a_resumed_run_is_the_uninterrupted_run(subject, text, whole, tmp_path, stop):
    """Invariant 9, to the last bit: state, buffer, data position, metrics."""
    first = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "parts", save_every=5, stop_after=stop)
    assert int(first.state.step) == stop
    second = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "parts", save_every=5, resume=True)
    same(whole.state, second.state)
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows] for rows in
                (whole.history, second.history, first.history)]  # fmt: skip
    assert timeless[0] == timeless[1] and timeless[0][: len(timeless[2])] == timeless[2]
    again = fit(METHOD, subject, text, **SIZES, checkpoint=tmp_path / "parts", resume=True)
    assert len(again.history) == len(whole.history) and int(again.state.step) == 20


def test_another_seed_is_another_run(subject, text):
    one, two = (fit(METHOD, subject, text, **SIZES | {"steps": 5, "seed": seed}) for seed in (0, 1))
    assert one.history[-1]["loss"] != two.history[-1]["loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": SkipTranscoder(features=64, k=8, learning_rate=3e-3)}, "made with method.k=4, not 8"),
        (
            {"method": SkipTranscoder(features=64, k=4, learning_rate=3e-3, objective=spoiled)},
            "made with method.objective=",
        ),
        ({"schedules": {"k": lambda step: 1}}, "made with schedules="),
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
        ({"site": "blocks/1/mlp/in"}, "is an array, and this method reads and writes a leaf"),
        ({"site": "blocks/1/mlp/up_proj"}, "is a linear map: name its leaf 'blocks/1/mlp', or an array"),
        ({"batch_size": 100}, "batch_size=100 must be a multiple of the windows' length 32"),
        ({"steps": 0}, "steps=0"),
        ({"buffer_batches": 0}, "buffer_batches=0"),
        ({"save_every": 7}, "save_every=7 must be a multiple of log_every=5"),
        ({"stop_after": 7}, "stop_after=7 must be a multiple of log_every=5"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(subject, text, change, words):
    with pytest.raises(UserError, match=words):
        fit(METHOD, subject, text, **SIZES | change)


def test_nan_activations_are_named(subject, text):
    broken = eqx.tree_at(lambda m: m.blocks[0].mlp.down_proj.bias, subject.model, jnp.full(64, jnp.nan))
    with pytest.raises(UserError, match="activations at 'blocks/1/mlp/in' are NaN or infinite"):
        fit(METHOD, Subject(broken, None, "broken"), text, **SIZES)


def test_a_run_that_breaks_stops_and_keeps_its_last_good_checkpoint(subject, text, tmp_path):
    method = SkipTranscoder(features=64, k=4, objective=spoiled)
    sizes = SIZES | {"checkpoint": tmp_path / "run", "save_every": 5}
    with pytest.raises(UserError, match=r"loss=nan at step 14 is not finite: .*; the checkpoint of step 10 is kept"):
        fit(method, subject, text, **sizes)
    refused = np.load(next(tmp_path.glob("refused_batch_step14*.npz")))
    steps = len(refused["steps"])
    assert steps > 4 and refused["tokens"].shape == (steps, 8, 32) and np.isnan(refused["loss"])
    np.testing.assert_array_equal(refused["steps"], range(15 - steps, 15))
    assert len(np.unique(refused["tokens"].reshape(-1, 32), axis=0)) == steps * 8, "of every step its own text"
    resumed = fit(method, subject, text, **sizes, resume=True, stop_after=10)
    assert int(resumed.state.step) == 10
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(resumed.decomposition))


def test_schedules_change_k_and_coefficients_within_one_program(subject, text):
    traces = []

    def objective(decomposition, batch, key, *, model=None):
        traces.append(1)
        return total(reconstruction(), scale(l1(), "sparsity"))(decomposition, batch, key)

    method = SkipTranscoder(features=64, k=4, learning_rate=3e-3, objective=objective)
    schedules = {"k": lambda step: jnp.where(step < 10, 4, 1), "sparsity": lambda step: 0.0 * step}
    result = fit(method, subject, text, **SIZES, schedules=schedules)
    assert result.history[0]["l0"] > 3 and result.history[-1]["l0"] <= 1
    assert len(traces) == 2, "once from shapes alone, to find mistakes, and once in the step"


def only_reconstruction(decomposition, batch, key, *, model=None):
    """An objective that reports nothing."""
    return total(reconstruction())(decomposition, batch, key)[0], {}


def test_an_objective_may_report_nothing(subject, text):
    method = SkipTranscoder(features=64, k=4, objective=only_reconstruction)
    row = fit(method, subject, text, **SIZES | {"steps": 5}).history[-1]
    assert row.keys() == {"step", "tokens", "loss", "tokens_per_second"}


def test_a_decomposition_without_parameters_is_refused():
    recipe = gradient_method(lambda key, sample, model: jnp.zeros(3), only_reconstruction, optax.adam(1e-3))
    batch = make_batch({"x": jnp.ones((4, 3))}, jnp.ones(4), Sites("x", "x"))
    with pytest.raises(UserError, match="has nothing to train"):
        recipe.init(jax.random.key(0), batch, None)


@dataclass(frozen=True)
class EveryMLP:
    """A method that reads and writes the MLPs of all layers at once."""

    def needs(self, site):
        return Sites(tuple(f"{name}/in" for name in site), tuple(f"{name}/out" for name in site))

    def recipe(self, steps):
        return gradient_method(
            lambda key, sample, model: tuple(jnp.zeros((64, 64)) for _ in sample.inputs),
            self.objective,
            optax.adam(1e-2),
            trained=lambda maps: jax.tree.map(lambda _: True, maps),
        )

    @staticmethod
    def objective(maps, batch, key, *, model=None):
        errors = [jnp.mean((x @ m - y) ** 2) for m, x, y in zip(maps, batch.inputs, batch.targets, strict=True)]
        return sum(errors), {}


def test_a_method_may_take_several_layers(subject, text):
    result = fit(EveryMLP(), subject, text, **SIZES | {"site": "blocks/*/mlp"})
    assert len(result.decomposition) == 4
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    with pytest.raises(UserError, match=r"no site of the model matches 'blocks/\*/mpl'"):
        fit(EveryMLP(), subject, text, **SIZES | {"site": "blocks/*/mpl"})


def test_gradients_are_harvested_beside_the_arrays(subject):
    """Against finite differences of the next-token loss, for a whole array and for attention's z."""
    windows = {"tokens": jnp.arange(24).reshape(2, 12), "weight": jnp.ones((2, 12)).at[:, 0].set(0)}
    name = "blocks/1/mlp/out"
    rows = harvest(subject.model, windows, (name, f"{name}/gradient", "blocks/1/attn/z"))
    assert rows.arrays["blocks/1/attn/z"].shape == (2, 12, 64)
    gradient = rows.arrays[f"{name}/gradient"]
    assert gradient.shape == (2, 12, 64)

    def loss(size):
        logits = run(subject.model, windows["tokens"], edits={name: Add(size * gradient)}).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), windows["tokens"][:, 1:, None], -1)[..., 0]
        return float(jnp.sum(nll * windows["weight"][:, :-1]))

    step = 1e-3 / float(jnp.abs(gradient).max())
    np.testing.assert_allclose((loss(step) - loss(-step)) / (2 * step), float(jnp.sum(gradient**2)), rtol=2e-2)


@pytest.mark.parametrize("words", ["data=2,rows=4", "data", "data=x"])
def test_a_mesh_that_cannot_be_read(words):
    with pytest.raises(UserError, match="write it as data=2,feature=4"):
        parse_mesh(words)


def test_a_mesh_larger_than_the_machine():
    with pytest.raises(UserError, match="needs 64 devices, but there are 8"):
        parse_mesh("data=16,feature=4")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spike": 0.0}, "spike=0.0 must be above 1"),
        ({"resume": True}, "resume=True needs the folder of the checkpoints"),
    ],
)
def test_options_that_cannot_be_are_refused(subject, text, options, words):
    with pytest.raises(UserError, match=words):
        fit(METHOD, subject, text, **SIZES | {"steps": 5}, **options)


def test_a_word_that_an_option_does_not_know_is_told_with_those_it_knows():
    with pytest.raises(UserError, match=r"on_failed_save='stopp' must be one of stop, continue. Did you mean 'stop'"):
        check_word("on_failed_save", "stopp", ("stop", "continue"))
