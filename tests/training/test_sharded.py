"""A mesh changes nothing but where things lie. Invariant 5."""

import pathlib
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import trainable
from jaxinterp.core.protocols import MethodState
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import Rows
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.preflight.program_text import arrays, exchanges, numbers_of, shape_of
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh, model_shardings, over_data, place_model, state_shardings
from jaxinterp.training.program import Program
from jaxinterp.training.state import TrainState, make_step, start_state
from tests.training import objective_in_one_file

SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 1}


def close(one, many):
    """Losses to 1e-5, weights to a hundredth of Adam's step: see tests/methods/laboratory.py."""
    for name, leaf in named_leaves(one.decomposition).items():
        np.testing.assert_allclose(
            np.asarray(named_leaves(many.decomposition)[name]), leaf, rtol=0, atol=3e-5, err_msg=name
        )
    for first, second in zip(one.history, many.history, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)


OWN = Transcoder(features=64, k=4, learning_rate=3e-3, objective=objective_in_one_file.objective)


@pytest.fixture(scope="module")
def alone(subject, text):
    """An objective of one file, trained on one device."""
    return fit(OWN, subject, text, **SIZES)


def test_a_new_objective_in_one_file_trains_on_eight_devices(subject, text, alone):
    """A file of fewer than 20 lines, passed by value, on (data, feature) = (2, 4): the same as on one device."""
    lines = pathlib.Path(objective_in_one_file.__file__).read_text().splitlines()
    assert len(lines) < 20
    many = fit(OWN, subject, text, **SIZES, mesh=make_mesh(2, 4))
    close(alone, many)
    assert alone.history[-1]["cosine"] > alone.history[3]["cosine"] + 0.04
    assert many.decomposition.encoder.sharding.spec == P("feature")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        SparseAutoencoder(features=64, k=4, learning_rate=3e-3),
        Transcoder(features=64, activation="relu", l1=0.01, learning_rate=3e-3),
    ],
)
def test_methods_are_the_same_on_a_mesh(subject, text, method):
    """Invariant 5."""
    close(fit(method, subject, text, **SIZES), fit(method, subject, text, **SIZES, mesh=make_mesh(4, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_the_demo_is_the_same_on_every_mesh(subject, text, shape):
    """The skip transcoder of the demo, with AuxK. With the model's weights cut, a product rounds otherwise."""
    method = SkipTranscoder(features=64, k=4, dead_after=500, learning_rate=3e-3)
    one, many = fit(method, subject, text, **SIZES), fit(method, subject, text, **SIZES, mesh=make_mesh(*shape))
    close(one, many)


def test_the_model_is_cut_as_its_layers_say(subject):
    """Outputs of a layer's first matrices, inputs of its last; a model of another make along its largest axis."""
    mesh = make_mesh(1, 1, 8)
    placed = place_model(subject.model, mesh)
    specs = {name: leaf.sharding.spec for name, leaf in named_leaves(placed).items()}
    assert specs["blocks/1/mlp/up_proj/weight"] == P(None, "model") and specs["blocks/1/mlp/up_proj/bias"] == P("model")
    assert specs["blocks/1/mlp/down_proj/weight"] == P("model", None) and specs["blocks/1/mlp/down_proj/bias"] == P()
    assert specs["blocks/1/attn/q_proj/weight"] == P(None, "model")
    assert specs["blocks/1/attn/o_proj/weight"] == P("model", None) and specs["blocks/1/mlp_norm/weight"] == P()
    assert specs["embedding/token"] == P(), "257 tokens do not divide"
    other = model_shardings(mesh).of({"first": np.zeros((24, 64)), "second": np.zeros((3, 9)), "bias": np.zeros(8)})
    assert {name: place.spec for name, place in other.items()} == {
        "first": P(None, "model"),
        "second": P(),
        "bias": P(),
    }
    again = place_model(placed, mesh)
    assert all(first is second for first, second in zip(jax.tree.leaves(placed), jax.tree.leaves(again), strict=True))


MAIN = {
    "reduce-scatter f32[96,64]": 2,  # the two matrices' gradients
    "all-gather f32[192,64]": 2,  # the two matrices
    "all-gather f32[128,16]": 1,  # candidates: values and indices
    "all-gather s32[128,16]": 1,
    "all-reduce f32[128,64]": 1,  # the sum of the decoded rows
}
AUXK = {
    "reduce-scatter f32[96,64]": 2,
    "all-gather f32[128,128]": 1,  # 32 candidates a shard
    "all-gather s32[128,128]": 1,
    "all-reduce f32[128,64]": 1,
    "all-reduce f32[128,32]": 1,  # the gradients of its codes
}
"""AuxK is a loss of its own, in a branch that runs while features are dead."""


@pytest.mark.parametrize(
    ("method", "shape", "expected"),
    [
        (Transcoder(features=768, k=4, auxk=0.0), (2, 4, 1), MAIN),
        (
            SkipTranscoder(features=768, k=4, dead_after=500),  # the demo's
            (2, 4, 1),
            Counter(MAIN) + Counter(AUXK) + Counter({"all-reduce f32[64,64]": 1}),  # the gradient of the skip matrix
        ),
        (
            Transcoder(features=768, k=4, auxk=0.0),
            (2, 2, 2),
            {
                "reduce-scatter f32[192,64]": 2,
                "all-gather f32[384,64]": 2,
                "all-gather f32[128,8]": 1,
                "all-gather s32[128,8]": 1,
                "all-reduce f32[128,64]": 1,
                "all-reduce f32[4,32,64]": 4,  # the sums of attention and MLP over `model`, of two blocks
            },
        ),
    ],
    ids=["transcoder", "demo", "with model"],
)
def test_collectives_of_the_whole_step(method, shape, expected):
    """Over `data`: weight gradients once, scattered, and the updated parameters; over `feature`: candidates and sums.

    d 64, 768 features, 256 tokens, k 4 on (data, feature) = (2, 4): a shard has 192 features and 128 tokens. That no
    program holds tokens x features at all is shown at larger sizes in tests/kernels/test_programs.py.
    """
    mesh = make_mesh(*shape)
    program = Program(method.recipe(20), method.needs("blocks/1/mlp"), mesh, 256, 32, 4, seed=0)
    model = model_shapes("tiny", dtype="float32", sharding=model_shardings(mesh))
    text = program.compile(model, "cpu").as_text()
    found = Counter(f"{kind} {shape}" for kind, shapes in exchanges(text) for shape in shapes)
    numbers = {name: numbers_of(name.partition(" ")[2]) for name in found}
    assert {name: found[name] for name in found if numbers[name] > 128 * 4} == dict(expected)
    whole = {256 * 768, 128 * 768}
    assert not whole & set(map(numbers_of, arrays(text))), "tokens x features"


def test_every_leaf_of_the_state_lies_where_it_should(subject, text):
    """The optimizer's moments lie over both axes."""
    result = fit(SkipTranscoder(features=64, k=4), subject, text, **SIZES | {"steps": 2}, mesh=make_mesh(2, 4))
    rows = ("encoder", "encoder_bias", "decoder", "tokens_since_fired")
    seen = set()
    for name, leaf in named_leaves(result.state).items():
        last = name.rpartition("/")[2]
        of_rows = P(("feature", "data")) if "/optimizer/" in name else P("feature")
        expected = P("data") if name.startswith("buffer/") else of_rows if last in rows else P()
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert leaf.sharding.spec == expected, name
            seen.add(expected)
    assert seen == {P("data"), P("feature"), P(("feature", "data")), P()}
    method, mesh = SkipTranscoder(features=64, k=4), make_mesh(2, 4)
    program = Program(method.recipe(2), method.needs("blocks/1/mlp"), mesh, 256, 32, 4, seed=0)
    described = named_leaves(program.abstract_state(subject.model))
    for name, leaf in named_leaves(result.state).items():
        assert described[name].sharding.spec == leaf.sharding.spec, f"{name} would be restored elsewhere"
    moments = [
        name for name in named_leaves(result.state) if name.endswith("mu/encoder") or name.endswith("nu/encoder")
    ]
    assert len(moments) == 2


def test_no_activation_row_crosses_the_data_axis(subject):
    """The buffer's lanes stay where they are: nothing with the batch's token axis is gathered or reduced."""
    mesh = make_mesh(8, 1)
    method = Transcoder(features=64, k=4)
    needed, recipe = method.needs("blocks/1/mlp"), method.recipe(20)
    arrays = {name: jnp.ones((8, 128, 64)) for name in needed.names()}
    with jax.set_mesh(mesh):
        place = lambda array: jax.device_put(array, over_data(mesh))
        buffer = jax.tree.map(place, Rows(arrays, jnp.ones((8, 128))))
        state = eqx.filter_jit(start_state)(recipe, needed, mesh, subject.model, buffer, 0)
        windows = {"tokens": place(jnp.zeros((8, 32), jnp.int32)), "weight": place(jnp.ones((8, 32)))}
        step = jax.jit(make_step(recipe, needed, mesh), donate_argnums=1)
        text = step.lower((subject.model, windows), state).compile().as_text()
    crossing = {shape_of(array) for _, results in exchanges(text) for array in results}
    assert crossing, "the gradients of a data-parallel step are reduced"
    assert not crossing & {(256, 64), (8, 32, 64), (8, 128, 64), (1024, 64)}, "rows of activations"


def test_moments_that_are_not_shaped_like_their_parameter_are_not_spread(subject):
    """Found by the decomposition's own tree within the optimizer's state, whatever wraps it."""
    mesh, batch = make_mesh(1, 8), make_batch({"x": jnp.ones((4, 64))}, jnp.ones(4), Sites("x", "x"))
    decomposition = SparseAutoencoder(features=256, k=4).recipe(1).init(jax.random.key(0), batch, None).decomposition
    trained = eqx.filter(decomposition, trainable(decomposition))
    factored = optax.masked(
        optax.adafactor(1e-3, min_dim_size_to_factor=32), lambda tree: jax.tree.map(eqx.is_array, tree)
    )
    whole = TrainState(MethodState(decomposition, factored.init(trained)), None, jax.random.key(0), jnp.zeros((), int))
    leaves, spread = named_leaves(whole), set()
    for name, sharding in named_leaves(state_shardings(whole, mesh)).items():
        if name.startswith("method/optimizer"):
            shape = {"encoder": (256, 64), "decoder": (256, 64), "encoder_bias": (256,)}.get(name.rpartition("/")[2])
            assert sharding.spec == (P(("feature", "data")) if leaves[name].shape == shape else P()), name
            spread |= {name} if sharding.spec != P() else set()
    assert len(spread) == 1, "of a factored optimizer, the bias has a whole second moment"


def test_a_dictionary_that_does_not_divide_is_refused(subject, text):
    with pytest.raises(UserError, match="features=66 cannot be spread evenly over the mesh axis feature=4"):
        fit(SkipTranscoder(features=66, k=4), subject, text, **SIZES, mesh=make_mesh(2, 4))
    with pytest.raises(UserError, match=r"batch_size=160 .* mesh axis data=2"):
        fit(SkipTranscoder(features=64, k=4), subject, text, **SIZES | {"batch_size": 160}, mesh=make_mesh(2, 4))
