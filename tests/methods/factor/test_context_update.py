"""The rank-one update of a context: exact in float64 for dense and gated MLPs, norms, streams and a real block."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.factor import context_update as context
from jaxinterp.models.layers import Linear, Norm
from jaxinterp.models.mlp import MLP
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.tiny import tiny_subject


def mlp(gated, seed=0, d=8, width=20):
    rng = np.random.default_rng(seed)
    linear = lambda i, o: Linear(jnp.asarray(rng.normal(size=(i, o))), jnp.asarray(rng.normal(size=o)))
    return MLP(linear(d, width) if gated else None, linear(d, width), linear(width, d), "silu")


@pytest.mark.parametrize("gated", [True, False])
def test_the_update_is_exact_and_of_rank_one(float64, gated):
    rng = np.random.default_rng(1)
    r_context, r = jnp.asarray(rng.normal(size=8)), jnp.asarray(rng.normal(size=8))
    norm = Norm(jnp.asarray(rng.uniform(0.5, 2, size=8)), None, "rms", 1e-6, 0.0)
    old = mlp(gated)
    new = context.updated_mlp(old, norm(r_context), norm(r), r_context - r)
    wanted = r_context + old(norm(r_context))
    np.testing.assert_allclose(r + new(norm(r)), wanted, atol=1e-12)
    change = np.asarray(new.up_proj.weight - old.up_proj.weight)
    assert np.linalg.matrix_rank(change, tol=1e-9) == 1
    update = context.weight_update(old.up_proj.weight, norm(r_context), norm(r))
    np.testing.assert_allclose(update.matrix(), change, atol=1e-12)
    assert float(update.size()) == pytest.approx(np.linalg.norm(change), rel=1e-9)
    assert float(context.update_size(old.up_proj.weight, norm(r_context), norm(r))) == pytest.approx(
        np.linalg.norm(change)
    )


@pytest.mark.parametrize("broken", ["before the norm", "gate left", "no stream", "elsewhere"])
def test_a_broken_update_is_not_exact(float64, broken):
    """With arrays from before the norm; gate not updated; output bias left; at another position than its own."""
    rng = np.random.default_rng(1)
    r_context, r, other = (jnp.asarray(rng.normal(size=8)) for _ in range(3))
    norm = Norm(jnp.asarray(rng.uniform(0.5, 2, size=8)), None, "rms", 1e-6, 0.0)
    old = mlp(True)
    read = (r_context, r) if broken == "before the norm" else (norm(r_context), norm(r))
    new = context.updated_mlp(old, *read, None if broken == "no stream" else r_context - r)
    if broken == "gate left":
        new = MLP(old.gate_proj, new.up_proj, new.down_proj, "silu")
    at = other if broken == "elsewhere" else r
    assert float(jnp.abs(at + new(norm(at)) - (r_context + old(norm(r_context)))).max()) > 1e-2


def test_a_patched_block_does_to_the_query_what_its_context_does():
    """In the tiny model: the query alone, block 1's MLP updated, has the stream of the query in its context."""
    model = tiny_subject().model
    tokens = jax.random.randint(jax.random.key(0), (1, 12), 0, 200)
    alone, whole = run(model, tokens[:, -1:]), run(model, tokens)
    leaf = "blocks/1/mlp"
    z_context, z = whole[f"{leaf}/in"][0, -1], alone[f"{leaf}/in"][0, -1]
    shift = whole["blocks/1/resid/mid"][0, -1] - alone["blocks/1/resid/mid"][0, -1]
    patched = run(replace(model, {leaf: context.updated_mlp(model.blocks[1].mlp, z_context, z, shift)}), tokens[:, -1:])
    wanted, found = whole["blocks/1/resid/post"][0, -1], patched["blocks/1/resid/post"][0, -1]
    scale = float(jnp.abs(wanted).max())
    assert float(jnp.abs(found - wanted).max()) < 1e-5 * scale
    assert float(jnp.abs(alone["blocks/1/resid/post"][0, -1] - wanted).max()) > 1e-2 * scale


def test_updates_token_by_token_are_steps_of_the_implicit_descent(float64):
    rng = np.random.default_rng(0)
    weight, read, z = (jnp.asarray(rng.normal(size=shape)) for shape in ((5, 7), (4, 5), (5,)))
    matrices = [context.weight_update(weight, one, z).matrix() for one in read]
    wanted = [float(jnp.linalg.norm(b - a)) for a, b in itertools.pairwise(matrices)]
    np.testing.assert_allclose(context.token_updates(weight, read, z), wanted, rtol=1e-10)
    gradient = context.implicit_loss_gradient(weight, read[0], read[1], z)
    np.testing.assert_allclose(matrices[0] - gradient / jnp.sum(z**2), matrices[1], atol=1e-12)
    with pytest.raises(UserError, match="read has 1 rows"):
        context.token_updates(weight, read[:1], z)
