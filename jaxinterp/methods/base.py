"""What a method is: a frozen dataclass of hyperparameters with two functions.

    needs(site) -> Sites              which arrays to harvest for an MLP leaf (or for several: a tuple of names)
    recipe(steps) -> Recipe           the pure functions that train it for that many steps

A `Recipe` is three pure functions, init, step and finish. `gradient_method` writes them for everything that is trained
by the gradient of an objective; a method with other updates (multiplicative, streaming moments) writes its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxinterp.core.batch import Batch, Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.base import trainable
from jaxinterp.objectives import Metrics, Objective, Ratio
from jaxinterp.objectives.check import checked


class MethodState(eqx.Module):
    """What a method changes from step to step."""

    decomposition: Any
    optimizer: Any


class Recipe(NamedTuple):
    """A method's three pure functions.

    init(key, sample, model) -> state                    sample: a batch to take scales and means from
    step(state, batch, key, model) -> (state, metrics)   model: the frozen subject model
    finish(state) -> decomposition
    """

    init: Callable[[PRNGKeyArray, Batch, Any], Any]
    step: Callable[[Any, Batch, PRNGKeyArray, Any], tuple[Any, Metrics]]
    finish: Callable[[Any], Any]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of hyperparameters, without arrays."""

    def needs(self, site: Any) -> Sites: ...
    def recipe(self, steps: int) -> Recipe: ...


def add_up(metrics: list[Metrics]) -> Metrics:
    """The metrics of several at once: ratios add as those of batches do, `fired` stands one after another."""
    summed = jax.tree.map(lambda *parts: sum(parts), *metrics)
    if "fired" in summed:
        summed["fired"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *[one["fired"] for one in metrics])
    return summed


def no_change(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """The `after_step` of a method that does nothing after its step."""
    return state


def gradient_method(
    init: Callable[[PRNGKeyArray, Batch, Any], Any],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    after_step: Callable[[MethodState, Batch, Metrics, PRNGKeyArray], MethodState] = no_change,
    project: Callable[[Any, Any], Any] = lambda decomposition, gradient: gradient,
    trained: Callable[[Any], Any] = trainable,
) -> Recipe:
    """The recipe of a method that follows the gradient of an objective.

    Args:
      init: (key, sample, model) -> decomposition.
      objective: a pure function (decomposition, batch, key, *, model) -> (loss, metrics).
      optimizer: any optax transformation; it sees the trained leaves only.
      after_step: (state, batch, metrics, key) -> state: norms, counters, thresholds, resampling. Pure.
      project: (decomposition, gradient) -> gradient: what is taken out of the gradient before the optimizer.
      trained: decomposition -> True at every leaf that the gradient trains; default: its PARAMETER fields.
    Raises:
      UserError: the objective is a term or takes other arguments; when it is traced, another mistake of `checked`.
    """
    objective = checked(objective)

    def start(key: PRNGKeyArray, sample: Batch, model: Any = None) -> MethodState:
        decomposition = init(key, sample, model)
        marks = trained(decomposition)
        if not any(jax.tree.leaves(marks)):
            raise UserError(
                f"{type(decomposition).__name__} has nothing to train: mark its fields with "
                "eqx.field(metadata=PARAMETER), or pass trained=..."
            )
        return MethodState(decomposition, optimizer.init(eqx.filter(decomposition, marks)))

    def step(state: MethodState, batch: Batch, key: PRNGKeyArray, model: Any = None) -> tuple[MethodState, Metrics]:
        leaves, fixed = eqx.partition(state.decomposition, trained(state.decomposition))
        loss_key, after_key = jax.random.split(key)

        def loss(leaves: Any) -> tuple[Array, Metrics]:
            value, metrics = objective(eqx.combine(leaves, fixed), batch, loss_key, model=model)
            return value, {"loss": Ratio(value, jnp.ones(())), **metrics}

        gradient, metrics = jax.grad(loss, has_aux=True)(leaves)
        gradient = project(state.decomposition, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, leaves)
        decomposition = eqx.combine(optax.apply_updates(leaves, updates), fixed)
        return after_step(MethodState(decomposition, optimizer_state), batch, metrics, after_key), metrics

    return Recipe(start, step, lambda state: state.decomposition)


def warmup_linear(peak: float, steps: int, warmup: float = 0.05, decay: float = 0.5) -> optax.Schedule:
    """A learning rate that rises linearly over the first `warmup` of the steps and falls to 0 over the last `decay`."""
    up, down = max(1, round(warmup * steps)), max(1, round(decay * steps))
    rise = optax.linear_schedule(peak / up, peak, up)
    fall = optax.linear_schedule(peak, 0.0, down)
    return optax.join_schedules([rise, fall], [max(up, steps - down)])
