"""The data-parallel step on a mesh is the step that `jax.pmap` takes; docs/decisions.md says why it is not used."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.fields import trainable
from jaxinterp.core.trees import named_leaves
from jaxinterp.methods import Transcoder, gradient_method
from jaxinterp.objectives import reconstruction, total
from jaxinterp.training.mesh import make_mesh

SITES = Sites("x", "y")
D, TOKENS, STEPS = 32, 256, 20


def rows(step):
    keys = jax.random.split(jax.random.key(step))
    return {"x": jax.random.normal(keys[0], (TOKENS, D)), "y": jax.random.normal(keys[1], (TOKENS, D))}


def batch_of(arrays, step):
    return make_batch(arrays, jnp.ones(len(arrays["x"])), SITES, step=step)


@pytest.fixture(scope="module")
def parts():
    """A transcoder, its objective and optimizer: nothing else happens in a step. Momentum enlarges no rounding."""
    objective, optimizer = total(reconstruction()), optax.sgd(10.0, momentum=0.9)
    state = Transcoder(features=64, k=4).recipe(STEPS).init(jax.random.key(0), batch_of(rows(0), 0), None)
    return state.decomposition, objective, optimizer


def test_the_step_on_a_mesh_is_the_step_of_pmap(parts):
    start, objective, optimizer = parts
    recipe = gradient_method(lambda key, sample, model: start, objective, optimizer)
    mesh = make_mesh(8)
    with jax.set_mesh(mesh):
        step = eqx.filter_jit(recipe.step)
        state = recipe.init(jax.random.key(0), batch_of(rows(0), 0))
        for number in range(STEPS):
            arrays = jax.device_put(rows(number), NamedSharding(mesh, P("data")))
            state, _ = step(state, batch_of(arrays, number), jax.random.key(1))

    leaves, fixed = eqx.partition(start, trainable(start))

    def each(leaves, moments, arrays):
        def loss(leaves):
            return objective(eqx.combine(leaves, fixed), batch_of(arrays, 0), jax.random.key(1), model=None)[0]

        gradient = jax.lax.pmean(jax.grad(loss)(leaves), "device")
        updates, moments = optimizer.update(gradient, moments, leaves)
        return optax.apply_updates(leaves, updates), moments

    mapped = jax.pmap(each, axis_name="device")
    everywhere = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), tree)
    leaves, moments = everywhere(leaves), everywhere(optimizer.init(leaves))
    for number in range(STEPS):
        arrays = {name: array.reshape(8, TOKENS // 8, D) for name, array in rows(number).items()}
        leaves, moments = mapped(leaves, moments, arrays)

    ours = named_leaves(eqx.filter(state.decomposition, trainable(state.decomposition)))
    before = named_leaves(start)
    for name, leaf in named_leaves(leaves).items():
        np.testing.assert_allclose(ours[name], leaf[0], rtol=0, atol=1e-5, err_msg=name)
        assert not np.allclose(before[name], leaf[0], atol=1e-3), f"{name} did not train"
