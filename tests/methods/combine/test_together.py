"""Several methods in one run: each learns what it would have learned alone, on one device and on a mesh."""

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.methods import (
    CrossLayerTranscoder,
    GatedSparseAutoencoder,
    PerLayerTranscoders,
    SparseAutoencoder,
    Transcoder,
)
from jaxinterp.methods.combine.together import Together
from jaxinterp.training.mesh import make_mesh
from tests.methods.laboratory import SITE, fitted

METHODS = {
    "transcoder": Transcoder(features=32, k=4),
    "topk": SparseAutoencoder(features=64, k=4),
    "gated": GatedSparseAutoencoder(features=32),
}


def same(one, other, tolerance):
    leaves = named_leaves(other)
    for name, leaf in named_leaves(one).items():
        np.testing.assert_allclose(np.asarray(leaves[name]), leaf, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_each_learns_what_it_learns_alone_and_on_a_mesh():
    together = fitted(Together(METHODS))
    spread = fitted(Together(METHODS), make_mesh(2, 4))
    for name, method in METHODS.items():
        alone = fitted(method)
        same(alone.decomposition, together.decomposition[name], 1e-6)
        same(together.decomposition[name], spread.decomposition[name], 1e-5)
        assert together.history[-1][f"{name}/fvu"] == pytest.approx(alone.history[-1]["fvu"], abs=1e-5)
    assert together.history[-1]["loss"] == pytest.approx(
        sum(together.history[-1][f"{name}/loss"] for name in METHODS), abs=1e-5
    )


@pytest.mark.slow
def test_methods_of_several_layers_learn_what_they_learn_alone():
    methods = {
        "each": PerLayerTranscoders(Transcoder(features=32, k=4)),
        "across": CrossLayerTranscoder(features=32, activation="topk", k=4, sparsity=0.0, learning_rate=1e-3),
    }
    together = fitted(Together(methods), site="blocks/*/mlp")
    for name, method in methods.items():
        alone = fitted(method, site="blocks/*/mlp").decomposition
        assert alone.sites == together.decomposition[name].sites and len(alone.sites.reads) == 4
        same(alone, together.decomposition[name], 1e-6)


def test_a_method_of_one_leaf_is_not_trained_on_the_first_of_several():
    with pytest.raises(UserError, match=r"is not a single leaf.*PerLayerTranscoders"):
        Together(METHODS).needs(("blocks/0/mlp", "blocks/1/mlp"))


def test_the_forward_pass_is_paid_once():
    """What is harvested are the arrays of all methods, each once."""
    assert Together(METHODS).needs(SITE).names() == (f"{SITE}/in", f"{SITE}/out")


def test_names_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="name at least one"):
        Together({})
    with pytest.raises(UserError, match="invalid name 'a/b'"):
        Together({"a/b": Transcoder()})
