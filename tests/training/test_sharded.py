"""A mesh changes nothing but where things lie. Invariant 5."""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp.data.activations import Rows
from jaxinterp.errors import UserError
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.methods.base import MethodState
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh, over_data, state_shardings
from jaxinterp.training.state import TrainState, make_step, start_state
from jaxinterp.trees import named_leaves
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


def test_a_new_objective_in_one_file_trains_on_eight_devices(subject, text):
    """A file of fewer than 20 lines, passed by value, on (data, feature) = (2, 4): the same as on one device."""
    lines = pathlib.Path(objective_in_one_file.__file__).read_text().splitlines()
    assert len(lines) < 20
    method = Transcoder(features=64, k=4, learning_rate=3e-3, objective=objective_in_one_file.objective)
    one = fit(method, subject, text, **SIZES)
    many = fit(method, subject, text, **SIZES, mesh=make_mesh(2, 4))
    close(one, many)
    assert one.history[-1]["cosine"] > one.history[3]["cosine"] + 0.04
    assert many.decomposition.encoder.sharding.spec == P("feature")


@pytest.mark.parametrize(
    "method",
    [
        SkipTranscoder(features=64, k=4, dead_after=500, learning_rate=3e-3),
        SparseAutoencoder(features=64, k=4, learning_rate=3e-3),
        SparseAutoencoder(features=64, k=4, activation="batch_topk", learning_rate=3e-3),
        Transcoder(features=64, activation="relu", l1=0.01, learning_rate=3e-3),
    ],
)
def test_methods_are_the_same_on_a_mesh(subject, text, method):
    """Invariant 5."""
    close(fit(method, subject, text, **SIZES), fit(method, subject, text, **SIZES, mesh=make_mesh(4, 2)))


def test_every_leaf_of_the_state_lies_where_it_should(subject, text):
    result = fit(SkipTranscoder(features=64, k=4), subject, text, **SIZES | {"steps": 2}, mesh=make_mesh(2, 4))
    rows = ("encoder", "encoder_bias", "decoder", "tokens_since_fired")
    seen = set()
    for name, leaf in named_leaves(result.state).items():
        last = name.rpartition("/")[2]
        expected = P("data") if name.startswith("buffer/") else P("feature") if last in rows else P()
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert leaf.sharding.spec == expected, name
            seen.add(expected)
    assert seen == {P("data"), P("feature"), P()}
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
    crossing = [
        line for line in text.splitlines() if re.search(r"= .*(all-gather|all-reduce|all-to-all|permute)\(", line)
    ]
    assert crossing, "the gradients of a data-parallel step are reduced"
    rows_of_activations = [line for line in crossing if re.search(r"\[(256|8,32|8,128|1024),64\]", line.split("(")[0])]
    assert not rows_of_activations


def test_moments_that_are_not_shaped_like_their_parameter_are_not_spread(subject, text):
    method = Transcoder(features=256, k=4)
    state = optax.adafactor(1e-3, min_dim_size_to_factor=32).init(
        {"encoder": jnp.zeros((256, 64)), "encoder_bias": jnp.zeros(256)}
    )
    mesh = make_mesh(1, 8)
    decomposition = fit(method, subject, text, **SIZES | {"steps": 1}).decomposition
    whole = TrainState(MethodState(decomposition, state), Rows({}, jnp.ones(8)), jax.random.key(0), jnp.zeros((), int))
    for name, sharding in named_leaves(state_shardings(whole, mesh)).items():
        leaf = named_leaves(whole)[name]
        if name.startswith("method/optimizer"):
            shape = {"encoder": (256, 64), "encoder_bias": (256,)}.get(name.rpartition("/")[2])
            assert sharding.spec == (P("feature") if leaf.shape == shape else P()), name


def test_a_dictionary_that_does_not_divide_is_refused(subject, text):
    with pytest.raises(UserError, match="features=66 cannot be spread evenly over the mesh axis feature=4"):
        fit(SkipTranscoder(features=66, k=4), subject, text, **SIZES, mesh=make_mesh(2, 4))
    with pytest.raises(UserError, match=r"batch_size=160 .* mesh axis data=2"):
        fit(SkipTranscoder(features=64, k=4), subject, text, **SIZES | {"batch_size": 160}, mesh=make_mesh(2, 4))
