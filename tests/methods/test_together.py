"""Several methods in one run: each learns what it would have learned alone, on one device and on a mesh."""

import numpy as np
import pytest

from jaxinterp.errors import UserError
from jaxinterp.methods import GatedSparseAutoencoder, SparseAutoencoder, Transcoder
from jaxinterp.methods.together import Together
from jaxinterp.training.mesh import make_mesh
from jaxinterp.trees import named_leaves
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


def test_the_forward_pass_is_paid_once():
    """What is harvested are the arrays of all methods, each once."""
    assert Together(METHODS).needs(SITE).names() == (f"{SITE}/in", f"{SITE}/out")


def test_names_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="name at least one"):
        Together({})
    with pytest.raises(UserError, match="'a/b' is no name"):
        Together({"a/b": Transcoder()})
