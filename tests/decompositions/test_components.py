"""A linear map as a sum of rank-one parts, in the place of a projection."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.components import Components, Scale
from jaxinterp.models.layers import Linear, cut_axes
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace, select, sites
from jaxinterp.models.transformer import TransformerConfig, initialise

CONFIG = TransformerConfig(
    vocab_size=50, d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, d_mlp=24, context=32, rotary_dimensions=8
)
TOKENS = jnp.arange(10).reshape(2, 5)
SITE = "blocks/1/mlp/up_proj"


@pytest.fixture(scope="module")
def parts():
    """The model in float64, and its up projection as 5 parts and the rest."""
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initialise(CONFIG, jax.random.key(0)))
        linear = select(model, SITE).get()
        read, write = (jax.random.normal(jax.random.key(n), (5, d), jnp.float64) for n, d in ((1, 16), (2, 24)))
        yield model, linear, Components.of(linear, read, write)


def test_a_map_in_parts_is_the_map(parts):
    model, linear, components = parts
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(3), (2, 3, 16), jnp.float64)
        np.testing.assert_allclose(components(x), linear(x), rtol=1e-12)
        np.testing.assert_allclose(components.linear()(x), linear(x), rtol=1e-12)
        alone = Components.of(linear, components.read, components.write, keep_rest=False)
        by_hand = sum(np.outer(np.asarray(v), np.asarray(u)) for v, u in zip(alone.read, alone.write, strict=True))
        np.testing.assert_allclose(alone(x), np.asarray(x) @ by_hand, rtol=1e-12)
        replaced = replace(model, {SITE: components})
        np.testing.assert_allclose(run(replaced, TOKENS).logits, run(model, TOKENS).logits, rtol=1e-10, atol=1e-12)
        added = [name for name in sites(replaced) if name not in sites(model)]
        assert added == [f"{SITE}/components", f"{SITE}/rest"]


def test_a_masked_forward_pass_is_an_edit(parts):
    """Part 2 masked out = the model whose matrix lacks it; masking another gives another answer."""
    model, linear, components = parts
    with jax.enable_x64(True):
        replaced = replace(model, {SITE: components})
        mask = jnp.ones(5).at[2].set(0)
        masked = run(replaced, TOKENS, edits={f"{SITE}/components": Scale(mask)}).logits
        weight = linear.weight - jnp.outer(components.read[2], components.write[2])
        expected = run(replace(model, {SITE: Linear(weight, None)}), TOKENS).logits
        np.testing.assert_allclose(masked, expected, rtol=1e-10, atol=1e-12)
        other = run(replaced, TOKENS, edits={f"{SITE}/components": Scale(jnp.ones(5).at[3].set(0))}).logits
        assert float(jnp.abs(other - expected).max()) > 1e-3, "broken: another part"
        bare = run(replaced, TOKENS, edits={f"{SITE}/rest": Scale(jnp.zeros(()))}).logits
        alone = Components.of(linear, components.read, components.write, keep_rest=False)
        np.testing.assert_allclose(bare, run(replace(model, {SITE: alone}), TOKENS).logits, rtol=1e-10, atol=1e-12)


def test_the_gradient_by_a_mask_is_that_of_finite_differences(parts):
    model, _, components = parts
    with jax.enable_x64(True):
        replaced = replace(model, {SITE: components})

        def answer(mask):
            return run(replaced, TOKENS, edits={f"{SITE}/components": Scale(mask)}).logits[0, -1, 3]

        gradient, h = jax.grad(answer)(jnp.ones(5)), 1e-5
        finite = [(answer(jnp.ones(5).at[i].add(h)) - answer(jnp.ones(5).at[i].add(-h))) / (2 * h) for i in range(5)]
        np.testing.assert_allclose(gradient, finite, rtol=1e-7)


def test_parts_lie_as_the_map_does(parts):
    _, _, components = parts
    axes = cut_axes({"up": components, "down": eqx.tree_at(lambda c: c.rest, components, None)})
    assert (axes["up/write"], axes["up/read"], axes["up/rest"]) == (1, None, 1)
    assert named_leaves(components).keys() == {"read", "write", "rest"}


def test_vectors_of_other_lengths_are_refused(parts):
    _, linear, components = parts
    with pytest.raises(UserError, match=r"do not fit a linear map of 16 inputs and 24 outputs"):
        Components.of(linear, components.write, components.read)
