"""The experts of a mixture as a decomposition: exact, with their own vectors, kept on disk, scored and edited."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.own_experts import own_experts
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.models.mixtures.moe_x import random_moe_x
from jaxinterp.models.mixtures.monet import random_monet
from jaxinterp.models.mixtures.product_keys import random_product_keys

KEY = jax.random.key(0)
MIXTURES = {
    "MoE-X": lambda: random_moe_x(KEY, 6, 5, 4, 2),
    "product keys": lambda: random_product_keys(KEY, 6, 6, 4, 2, 3, 5),
    "PEER": lambda: random_product_keys(KEY, 6, 6, 4, 2, 3, 5, "peer"),
    "Monet": lambda: noisy(random_monet(KEY, 6, 4, 3, 2, 2)),
}
X = jax.random.normal(jax.random.key(1), (9, 6))


called = eqx.filter_jit(lambda module, x: module(x))  # one program, not one for each operation


def noisy(monet):
    """Biases and running statistics that are not 0 and 1."""
    draw = np.random.default_rng(0)
    places = lambda m: (m.experts.up_bias, m.experts.down_bias, m.mean)
    values = [jnp.asarray(draw.normal(size=each.shape), jnp.float32) for each in places(monet)]
    return eqx.tree_at(places, monet, tuple(values))


@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_is_lost_and_it_comes_back_from_disk(name, tmp_path):
    """Broken: read or write vectors in another order."""
    mixture = MIXTURES[name]()
    found = own_experts(mixture, "blocks/0/mlp")
    wanted, own = np.asarray(called(mixture, X)), called(found, X)
    codes = eqx.filter_jit(lambda found, x: found.encode(x))(found, X)
    np.testing.assert_allclose(own, wanted, atol=1e-5)
    np.testing.assert_allclose(codes.dense() @ found.decoder, wanted, atol=1e-5)
    assert np.abs(codes.dense() @ found.decoder[::-1] - wanted).max() > 0.05
    assert found.decoder.shape == (found.features, 6) and codes.features == found.features
    again = load_decomposition(save(found, tmp_path / "own"))
    np.testing.assert_array_equal(called(again, X), own)


def test_read_vectors_are_what_neurons_see():
    """A token along one read vector of MoE-X gives its neuron the largest activation, before the router's weight."""
    mixture = random_moe_x(KEY, 6, 5, 4, 4)  # all experts are used
    found = own_experts(mixture, "blocks/0/mlp")
    x = found.encoder / jnp.linalg.norm(found.encoder, axis=1, keepdims=True)
    pre = np.asarray(x @ found.encoder.T)
    active = np.asarray(found.encode(x).dense()) > 0
    np.testing.assert_array_equal(active, pre > 0)
    assert (active != (np.asarray(x @ found.encoder[::-1].T) > 0)).any()


def test_other_modules_are_refused():
    vertical = random_monet(KEY, 6, 4, 4, 2, 2, "vertical")
    with pytest.raises(UserError, match="vertical Monet"):
        own_experts(vertical, "blocks/0/mlp")
    with pytest.raises(UserError, match="blocks/0/mlp"):
        own_experts(eqx.nn.Identity(), "blocks/0/mlp")


def test_it_has_a_row_of_the_scoreboard_and_its_codes_are_sites():
    """In a language model with MoE-X: FVU 0, the loss of the model; an edit of its codes changes the logits."""
    from jaxinterp.decompositions.components import Scale
    from jaxinterp.models.run import run
    from jaxinterp.models.sites import replace, select
    from tests.models.mixtures.in_a_model import TOKENS, model_of

    model = model_of("moe_x")
    own = own_experts(select(model, "blocks/0/mlp").get(), "blocks/0/mlp")
    replaced = replace(model, {"blocks/0/mlp": own})
    trace = run(replaced, TOKENS)
    np.testing.assert_allclose(trace.logits, run(model, TOKENS).logits, atol=1e-5)
    assert trace["blocks/0/mlp/codes"].shape == (4, 8, own.features)
    edited = run(replaced, TOKENS, edits={"blocks/0/mlp/codes": Scale(jnp.zeros(own.features))})
    assert np.abs(edited.logits - trace.logits).max() > 1e-3
