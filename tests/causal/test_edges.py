"""Edge scores against finite differences along one path at a time (float64)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.edges import edge_scores
from jaxinterp.causal.measure import LogitDifference
from jaxinterp.causal.patch import Patch, path_effect
from jaxinterp.core.errors import UserError
from jaxinterp.models.run import run
from tests.causal.toys import TOKENS, Nodes, small_transformer

FILL = jnp.asarray([[0, 5, 2], [3, 2, 4]])
METRIC = LogitDifference(jnp.asarray([1, 2]), jnp.asarray([3, 0]))


def test_an_edge_is_the_slope_along_its_path():
    small = small_transformer()
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), small)
        edges = edge_scores(model, TOKENS, FILL, METRIC)
        score = lambda u, v: np.asarray(edges.scores[:, edges.sources.index(u), edges.targets.index(v)])
        name, step = "blocks/0/attn/z", 1e-5
        here, there = (run(model, tokens)[name] for tokens in (TOKENS, FILL))
        head = (jnp.arange(4) == 1)[:, None]
        sender = {name: Patch(here + step * (there - here), head)}
        frozen = (name, "blocks/0/mlp/out", "blocks/1/attn/z", "blocks/1/mlp/out")
        for target, receiver in (("blocks/1/mlp", "blocks/1/mlp/in"),):
            slope = np.asarray(path_effect(model, TOKENS, METRIC, sender, (receiver,), frozen=frozen)) / step
            np.testing.assert_allclose(score("blocks/0/attn/head/1", target), slope, rtol=1e-3, atol=1e-6)
            assert np.abs(slope).max() > 1e-4
        assert not score("blocks/1/mlp", "blocks/0/mlp").any() and not score("blocks/0/mlp", "blocks/0/attn").any()
        wrong = score("blocks/0/attn/head/2", target)
        assert np.abs(wrong - slope).max() > 1e-4


def test_models_without_such_edges_are_refused():
    with pytest.raises(UserError, match="need a Transformer"):
        edge_scores(Nodes("or"), TOKENS, FILL, METRIC)
    replaced = eqx.tree_at(lambda model: model.blocks[0].attn, small_transformer(), eqx.nn.Identity())
    with pytest.raises(UserError, match="one was replaced"):
        edge_scores(replaced, TOKENS, FILL, METRIC)
