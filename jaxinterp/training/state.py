"""Everything that changes during training, and the one jitted program that changes it."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from jaxinterp.data.activations import Rows, harvest, shuffle_in
from jaxinterp.data.batch import Batch, Sites
from jaxinterp.methods.base import Recipe
from jaxinterp.objectives import Metrics
from jaxinterp.training.mesh import state_shardings


class TrainState(eqx.Module):
    """One pytree: the method's own state, the shuffle buffer, the random key, the step."""

    method: Any
    buffer: Rows
    key: PRNGKeyArray
    step: Int[Array, ""]


Step = Callable[[tuple[Any, Mapping[str, Any]], TrainState], tuple[TrainState, Metrics]]


def start_state(recipe: Recipe, sites: Sites, buffer: Rows, seed: int) -> TrainState:
    """The state before the first step; the buffer's rows are the sample that means and scales come from."""
    start_key, run_key = jax.random.split(jax.random.key(seed))
    step = jnp.zeros((), jnp.int32)
    sample = Batch(buffer.arrays, buffer.weight, step, None, sites)
    return TrainState(recipe.init(start_key, sample), buffer, run_key, step)


def make_step(recipe: Recipe, sites: Sites, mesh: Mesh, k: Callable[[Array], Array] | None = None) -> Step:
    """The training program: ((model, windows), state) -> (state, metrics), to be jitted with the state donated.

    Forward pass up to the sites, shuffle buffer, the method's step and the metrics, in one program: no activation
    leaves the device.

    Args:
      k: the number of active features as a function of the step; None: the method's own.
    """

    def step(frozen: tuple[Any, Mapping[str, Any]], state: TrainState) -> tuple[TrainState, Metrics]:
        model, windows = frozen
        shuffle_key, step_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        rows = harvest(model, windows, sites.names())
        buffer, drawn = shuffle_in(state.buffer, rows, shuffle_key)
        batch = Batch(drawn.arrays, drawn.weight, state.step, None if k is None else k(state.step), sites)
        method, metrics = recipe.step(state.method, batch, step_key, model)
        state = TrainState(method, buffer, state.key, state.step + 1)
        return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh)), metrics

    return step
