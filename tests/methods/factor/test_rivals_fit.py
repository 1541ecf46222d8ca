"""Rivals of the transcoder through `fit`: on a mesh, in the place of the leaf, on the scoreboard, resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.trees import named_leaves
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.models.sites import SetTo, replace, run
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from tests.methods.laboratory import SITE, fitted, subject, text

METHODS = {
    "decoders": MixtureOfDecodersMethod(features=64, hidden=32, k=8, learning_rate=3e-3),
    "transforms": LinearTransformsMethod(ranks=(16, 8, 8), k=2, learning_rate=3e-3),
    "neurons": ProductKeyNeuronsMethod(n=8, channels=2, knn=4, d_key=16, learning_rate=3e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_changes_nothing_and_the_leaf_is_replaced(name):
    """Invariants 5 and 19."""
    one, many = fitted(METHODS[name]), fitted(METHODS[name], make_mesh(2, 4))
    leaves = named_leaves(many.decomposition)
    for leaf_name, leaf in named_leaves(one.decomposition).items():
        np.testing.assert_allclose(np.asarray(leaves[leaf_name]), leaf, rtol=0, atol=1e-4, err_msg=leaf_name)
    for first, second in zip(one.history, many.history, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert one.history[-1]["fvu"] < one.history[0]["fvu"]
    rows = leaves["gate" if name == "decoders" else "read"]
    assert rows.sharding.spec[0] == "feature"
    replaces_the_leaf_and_scores(one.decomposition)


def replaces_the_leaf_and_scores(found):
    """In its leaf's place it does what an edit of the leaf's output does; its row of the scoreboard is finite."""
    model, tokens = subject().model, jnp.arange(16).reshape(2, 8)
    read = run(model, tokens)[f"{SITE}/in"]
    edited = run(model, tokens, edits={f"{SITE}/out": SetTo(found(read))})
    np.testing.assert_allclose(run(replace(model, {SITE: found}), tokens).logits, edited.logits, rtol=1e-4, atol=1e-3)
    assert float(jnp.abs(edited.logits - run(model, tokens).logits).max()) > 0.1
    row = score(found, subject(), text(), tokens=1024, ce_tokens=1024)
    assert 0 < row["fvu"] < 1.5 and row["l0"] > 0 and np.isfinite(row["ce_replaced"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neurons"])
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """Invariant 9."""
    sizes = {"site": SITE, "steps": 8, "batch_size": 256, "buffer_batches": 2, "log_every": 1}
    whole = fit(METHODS[name], subject(), text(), **sizes).decomposition
    options = sizes | {"checkpoint": tmp_path / "run", "save_every": 1}
    fit(METHODS[name], subject(), text(), **options, stop_after=4)
    again = fit(METHODS[name], subject(), text(), **options, resume=True).decomposition
    for first, second in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first, second)
