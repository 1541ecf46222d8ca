"""Parts of parameters and what is seen at the output come back from `save` without their classes being given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.at_output import at_output
from jaxinterp.decompositions.parameter_parts import AttributionParts, Blocks
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.methods.factor.parameter_training import as_decomposition, start
from jaxinterp.methods.factor.semi_nmf import SemiNMF, begin
from jaxinterp.methods.factor.targets import LeafTarget
from jaxinterp.models.sites import select
from jaxinterp.models.tiny import tiny_subject

SITE = "blocks/0/mlp"


def kinds():
    model = tiny_subject().model
    mlp = select(model, SITE).get()
    d, hidden = mlp.up_proj.weight.shape
    parts = start(LeafTarget(SITE), jax.random.key(0), model, parts=3, hidden=2)
    yield parts
    yield as_decomposition(parts, model, SITE, jnp.zeros(d))
    yield AttributionParts({"linear1": Blocks(jnp.ones((2, 4, 1)), jnp.ones((2, 1, 3)))})
    name = f"{SITE}/hidden"
    rows = jax.random.normal(jax.random.key(1), (20, hidden))
    inner, _ = begin(SemiNMF(features=3), jax.random.key(2), make_batch({name: rows}, jnp.ones(20), Sites(name, name)))
    yield at_output(inner, mlp, jnp.zeros(d))


def test_every_kind_comes_back(tmp_path):
    for number, found in enumerate(kinds()):
        again = load_decomposition(save(found, tmp_path / str(number)))
        assert jax.tree.structure(again) == jax.tree.structure(found)
        for first, second in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(first, second)
        (tmp_path / str(number) / "decomposition.safetensors").unlink()
        with pytest.raises(UserError):
            load_decomposition(tmp_path / str(number))
