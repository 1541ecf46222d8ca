"""Everything that changes during training, and the one jitted program that changes it."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.data.activations import WINDOW, Harvest, Rows, shuffle_in
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


Schedules = Mapping[str, Callable[[Array], Array]]
"""Functions of the training step by name: "k", and coefficients that terms read by name."""


def start_state(recipe: Recipe, sites: Sites, mesh: Mesh, model: Any, buffer: Rows, seed: int) -> TrainState:
    """The state before the first step; the buffer's rows are the sample that means and scales come from."""
    start_key, run_key = jax.random.split(jax.random.key(seed))
    sample = buffer.flat()
    method = recipe.init(start_key, make_batch(sample.arrays, sample.weight, sites), model)
    state = TrainState(method, buffer, run_key, jnp.zeros((), jnp.int32))
    return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def make_step(
    recipe: Recipe, sites: Sites, mesh: Mesh, schedules: Schedules | None = None, take: Harvest | None = None
) -> Step:
    """The training program: ((model, windows), state) -> (state, metrics), to be jitted with the state donated.

    Forward pass up to the sites, shuffle buffer, the method's step and the metrics, in one program: no activation
    leaves the device.

    Args:
      schedules: the number of active features ("k") and coefficients of terms, as functions of the step.
      take: how activations are harvested; default: the sites' arrays in float32, from one forward pass.
    """
    take = take or Harvest(sites.names())

    def step(frozen: tuple[Any, Mapping[str, Any]], state: TrainState) -> tuple[TrainState, Metrics]:
        model, windows = frozen
        shuffle_key, step_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        buffer, drawn = shuffle_in(state.buffer, take(model, windows), shuffle_key)
        rows = drawn.flat()
        text = {name: array for name, array in windows.items() if name in WINDOW}
        now = {name: schedule(state.step) for name, schedule in (schedules or {}).items()}
        batch = make_batch(rows.arrays, rows.weight, sites, step=state.step, windows=text, **now)
        method, metrics = recipe.step(state.method, batch, step_key, model)
        state = TrainState(method, buffer, state.key, state.step + 1)
        return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh)), metrics

    return step


@eqx.filter_jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no number of the tree is NaN or infinite."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in numbers]))
