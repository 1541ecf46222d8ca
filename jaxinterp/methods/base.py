"""What a method is: a frozen dataclass of hyperparameters with two functions.

    needs(site) -> Sites              which arrays to harvest for an MLP leaf
    recipe(steps) -> Recipe           the pure functions that train it for that many steps

A `Recipe` is three pure functions, init, step and finish. `gradient_method` writes them for everything that is trained
by the gradient of an objective; a method with other updates (multiplicative, streaming moments) writes its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from jaxinterp.data.batch import Batch, Sites
from jaxinterp.decompositions.base import trainable
from jaxinterp.objectives import Metrics, Objective


class MethodState(eqx.Module):
    """What a method changes from step to step."""

    decomposition: Any
    optimizer: Any


class Recipe(NamedTuple):
    """A method's three pure functions.

    init(key, sample) -> state                           sample: a batch to take scales and means from
    step(state, batch, key, model) -> (state, metrics)
    finish(state) -> decomposition
    """

    init: Callable[[PRNGKeyArray, Batch], Any]
    step: Callable[[Any, Batch, PRNGKeyArray, Any], tuple[Any, Metrics]]
    finish: Callable[[Any], Any]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of hyperparameters, without arrays."""

    def needs(self, site: str) -> Sites: ...
    def recipe(self, steps: int) -> Recipe: ...


def no_change(decomposition: Any, metrics: Metrics, step: Int[Array, ""]) -> Any:
    """The `after_step` of a method that does nothing after its step."""
    return decomposition


def gradient_method(
    init: Callable[[PRNGKeyArray, Batch], Any],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    after_step: Callable[[Any, Metrics, Array], Any] = no_change,
    project: Callable[[Any, Any], Any] = lambda decomposition, gradient: gradient,
) -> Recipe:
    """The recipe of a method that follows the gradient of an objective.

    Args:
      init: (key, sample) -> decomposition.
      objective: a pure function (decomposition, batch, key, *, model) -> (loss, metrics).
      optimizer: any optax transformation; it sees the trainable leaves only.
      after_step: (decomposition, metrics, step) -> decomposition: norms, counters, thresholds. Pure.
      project: (decomposition, gradient) -> gradient: what is taken out of the gradient before the optimizer.
    """

    def start(key: PRNGKeyArray, sample: Batch) -> MethodState:
        decomposition = init(key, sample)
        return MethodState(decomposition, optimizer.init(eqx.filter(decomposition, trainable(decomposition))))

    def step(state: MethodState, batch: Batch, key: PRNGKeyArray, model: Any = None) -> tuple[MethodState, Metrics]:
        trained, fixed = eqx.partition(state.decomposition, trainable(state.decomposition))

        def loss(trained: Any) -> tuple[Array, Metrics]:
            return objective(eqx.combine(trained, fixed), batch, key, model=model)

        gradient, metrics = jax.grad(loss, has_aux=True)(trained)
        gradient = project(state.decomposition, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, trained)
        decomposition = eqx.combine(optax.apply_updates(trained, updates), fixed)
        return MethodState(after_step(decomposition, metrics, batch.step), optimizer_state), metrics

    return Recipe(start, step, lambda state: state.decomposition)


def warmup_linear(peak: float, steps: int, warmup: float = 0.05, decay: float = 0.5) -> optax.Schedule:
    """A learning rate that rises linearly over the first `warmup` of the steps and falls to 0 over the last `decay`."""
    up, down = max(1, round(warmup * steps)), max(1, round(decay * steps))
    rise = optax.linear_schedule(peak / up, peak, up)
    fall = optax.linear_schedule(peak, 0.0, down)
    return optax.join_schedules([rise, fall], [max(up, steps - down)])
