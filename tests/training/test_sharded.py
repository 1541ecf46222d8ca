"""A mesh changes nothing but where things lie. Invariant 5."""

import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp.errors import UserError
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.trees import named_leaves
from tests.training import objective_in_one_file

SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 1}


def close(one, many):
    for name, leaf in named_leaves(one.decomposition).items():
        np.testing.assert_allclose(
            np.asarray(named_leaves(many.decomposition)[name]), leaf, rtol=0, atol=1e-5, err_msg=name
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


def test_a_dictionary_that_does_not_divide_is_refused(subject, text):
    with pytest.raises(UserError, match="features=66 cannot be spread evenly over the mesh axis feature=4"):
        fit(SkipTranscoder(features=66, k=4), subject, text, **SIZES, mesh=make_mesh(2, 4))
    with pytest.raises(UserError, match=r"batch_size=160 .* mesh axis data=2"):
        fit(SkipTranscoder(features=64, k=4), subject, text, **SIZES | {"batch_size": 160}, mesh=make_mesh(2, 4))
