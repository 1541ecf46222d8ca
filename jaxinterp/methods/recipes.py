"""The four lifters: what is special about a method goes in, a `Recipe` that `fit` trains comes out.

    gradient_method      follows the gradient of an objective                            (dictionaries, gates, masks)
    alternating_method   sweeps over kept rows by closed-form or multiplicative updates  (matrix factorisations)
    streaming_method     adds moments up, then solves on the host in float64             (PCA, least squares)
    closed_form          solves at once, from the weights alone                          (spectra, exact transcoders)

Each is a function of pure functions; a method with other habits writes the three functions of a `Recipe` itself.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import trainable
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import Finish, Init, Method, MethodState, Objective, Recipe, Step
from jaxinterp.objectives.check import checked

AfterStep = Callable[[MethodState, Batch, Metrics, PRNGKeyArray], MethodState]
"""(state, batch, metrics, key) -> state: norms, counters, thresholds, resampling. Pure."""

Project = Callable[[PyTree, PyTree], PyTree]
"""(decomposition, gradient) -> the gradient that the optimizer gets."""


def no_change(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """The `after_step` of a method that does nothing after its step."""
    return state


def whole_gradient(decomposition: PyTree, gradient: PyTree) -> PyTree:
    """The `project` that leaves the gradient as it is."""
    return gradient


def gradient_method(
    init: Callable[..., PyTree],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    after_step: AfterStep = no_change,
    project: Project = whole_gradient,
    trained: Callable[[PyTree], PyTree] = trainable,
) -> Recipe:
    """The recipe of a method that follows the gradient of an objective.

    Args:
      init: (key, sample, model) -> decomposition; in a later pass (key, sample, model, previous).
      objective: a pure function (decomposition, batch, key, *, model) -> (loss, metrics).
      optimizer: any optax transformation; it sees the trained leaves only.
      after_step: (state, batch, metrics, key) -> state: norms, counters, thresholds, resampling. Pure.
      project: (decomposition, gradient) -> gradient: what is taken out of the gradient before the optimizer.
      trained: decomposition -> True at every leaf that the gradient trains; default: its PARAMETER fields.
    Raises:
      UserError: the objective is a term or takes other arguments; when it is traced, another mistake of `checked`.
    """
    objective = checked(objective)

    def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
        decomposition = _first(init, key, sample, model, previous)
        marks = trained(decomposition)
        if not any(jax.tree.leaves(marks)):
            raise UserError(
                f"{type(decomposition).__name__} has nothing to train: mark its fields with "
                "eqx.field(metadata=PARAMETER), or pass trained=..."
            )
        return MethodState(decomposition, optimizer.init(eqx.filter(decomposition, marks)))

    def step(state: MethodState, batch: Batch, key: PRNGKeyArray, model: PyTree = None) -> tuple[MethodState, Metrics]:
        leaves, fixed = eqx.partition(state.decomposition, trained(state.decomposition))
        loss_key, after_key = jax.random.split(key)

        def loss(leaves: PyTree) -> tuple[Array, Metrics]:
            value, metrics = objective(eqx.combine(leaves, fixed), batch, loss_key, model=model)
            return value, {"loss": Ratio(value, jnp.ones((), jnp.float32)), **metrics}

        gradient, metrics = jax.grad(loss, has_aux=True)(leaves)
        gradient = project(state.decomposition, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, leaves)
        decomposition = eqx.combine(optax.apply_updates(leaves, updates), fixed)
        return after_step(MethodState(decomposition, optimizer_state, state.aux), batch, metrics, after_key), metrics

    return Recipe(start, step, learned)


def alternating_method(init: Callable[..., tuple[PyTree, PyTree]], sweep: Callable[..., tuple]) -> Recipe:
    """The recipe of a method that sweeps over rows: one step is one sweep.

    Together with `Needs(..., rows="kept")`, a sweep sees all rows every time, in the same order, and `aux` may hold one
    row of codes for each. Let `sweep` return the metric `converged` (1 or more: stop) where it can tell.

    Args:
      init: (key, sample, model) -> (decomposition, aux); in a later pass (key, sample, model, previous). `sample` holds
        all kept rows. Arrays of aux with one row a token are marked (`TOKEN_ROWS`, or wrapped in `PerToken`), so that
        they lie beside their rows on a mesh.
      sweep: (decomposition, aux, batch, key, model) -> (decomposition, aux, metrics). Pure.
    """

    def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
        decomposition, aux = _first(init, key, sample, model, previous)
        return MethodState(decomposition, None, aux)

    def step(state: MethodState, batch: Batch, key: PRNGKeyArray, model: PyTree = None) -> tuple[MethodState, Metrics]:
        decomposition, aux, metrics = sweep(state.decomposition, state.aux, batch, key, model)
        return MethodState(decomposition, None, aux), metrics

    return Recipe(start, step, learned)


class Sums(eqx.Module):
    """Sums over many steps in float32, each with what rounding took from it (Kahan 1965): sum = total - lost."""

    total: PyTree
    lost: PyTree

    def add(self, new: PyTree) -> "Sums":
        """The sums with those of another batch added."""
        due = jax.tree.map(jnp.subtract, new, self.lost)
        total = jax.tree.map(jnp.add, self.total, due)
        lost = jax.tree.map(lambda after, before, due: (after - before) - due, total, self.total, due)
        return Sums(total, lost)

    def wide(self) -> PyTree:
        """The sums as NumPy arrays in float64 on this host (integers as they are)."""
        return jax.tree.map(lambda total, lost: np.asarray(_wide(total) - _wide(lost)), self.total, self.lost)


def streaming_method(
    zero: Callable[..., PyTree],
    update: Callable[..., PyTree],
    solve: Callable[[PyTree, PyTree], PyTree],
    start: Callable[..., PyTree] | None = None,
) -> Recipe:
    """The recipe of a method that adds moments up over a stream of rows and solves once, on the host, in float64.

    Args:
      zero: (sample) -> the moments of no rows: a pytree of zeros, in the shapes that `update` returns. Floating-point
        moments are added with compensation, so that a long stream loses nothing to rounding.
      update: (given, batch, key, model) -> the moments of one batch, which are added. Pure.
      solve: (given, moments) -> decomposition; NumPy arrays in float64 come in. Runs on the host, in every process, and
        all processes take the answer of process 0; where one process steps alone, it solves alone.
      start: (key, sample, model) -> `given`: what stays fixed during the stream, such as random read vectors; in a
        later pass (key, sample, model, previous). Default: `previous`.
    """

    def begin(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
        given = previous if start is None else _first(start, key, sample, model, previous)
        zeros = zero(sample)
        return MethodState(given, None, Sums(zeros, jax.tree.map(jnp.zeros_like, zeros)))

    def step(state: MethodState, batch: Batch, key: PRNGKeyArray, model: PyTree = None) -> tuple[MethodState, Metrics]:
        moments = update(state.decomposition, batch, key, model)
        return MethodState(state.decomposition, None, state.aux.add(moments)), {}

    def finish(state: MethodState) -> PyTree:
        answer = solve(here(state.decomposition), state.aux.wide())
        # Sums that one process alone added up, as `baselines` does for its report, are solved by it alone.
        return of_first_process(answer) if _over_processes(state.aux) else _as_arrays(answer)

    return Recipe(begin, step, finish)


def closed_form(solve: Callable[..., PyTree]) -> Recipe:
    """The recipe of a method that computes its answer at once: from the weights, with `Needs(rows="none")`.

    Args:
      solve: (key, sample, model) -> decomposition; in a later pass (key, sample, model, previous). Runs as it is, on
        the host: it may use NumPy in float64, or jitted functions. All processes take the answer of process 0.
        `sample` has rows where the method's needs ask for them: those of the first shuffle buffer.
    """

    def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
        return MethodState(of_first_process(_first(solve, key, sample, model, previous)))

    return Recipe(start, None, learned, init_on="host")


class OnePass(NamedTuple):
    """A recipe of a single pass that can be stepped: what methods made of other methods are made of."""

    init: Init
    step: Step
    finish: Finish
    init_on: Literal["device", "host"]


def one_pass(method: Method, steps: int) -> OnePass:
    """The recipe of a method of one pass; where there is nothing to step, a step changes nothing.

    Raises:
      UserError: it has several passes.
    """
    recipe = method.recipe(steps)
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"{type(method).__name__} takes {len(recipe)} passes, which only fit(...) can run: train it alone."
        )
    return OnePass(recipe.init, recipe.step or _stay, recipe.finish, recipe.init_on)


def _stay(state: PyTree, batch: Batch, key: PRNGKeyArray, model: PyTree) -> tuple[PyTree, Metrics]:
    return state, {}


def learned(state: MethodState) -> PyTree:
    """The `finish` that keeps the decomposition and drops the rest."""
    return state.decomposition


def here(tree: PyTree) -> PyTree:
    """Every array of the tree whole in this process; all processes must call it together."""

    def whole(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def of_first_process(tree: PyTree) -> PyTree:
    """The tree with the arrays of process 0, in float32 where they were wider; all processes must call it together."""
    if jax.process_count() > 1:
        arrays, rest = eqx.partition(tree, eqx.is_array)
        tree = eqx.combine(multihost_utils.broadcast_one_to_all(arrays), rest)
    return _as_arrays(tree)


def _as_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if eqx.is_array(leaf) else leaf, tree)


def _over_processes(tree: PyTree) -> bool:
    """Whether a part of the arrays lies in another process."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def _wide(array: Array) -> np.ndarray:
    plain = np.asarray(here(array))
    return plain.astype(np.float64) if np.issubdtype(plain.dtype, np.floating) else plain


def _first(init: Callable[..., PyTree], key: PRNGKeyArray, sample: Batch, model: PyTree, previous: PyTree) -> PyTree:
    """What a user's function gives: `previous` is passed on where there is one."""
    return init(key, sample, model) if previous is None else init(key, sample, model, previous)


def warmup_linear(peak: float, steps: int, warmup: float = 0.05, decay: float = 0.5) -> optax.Schedule:
    """A learning rate that rises linearly over the first `warmup` of the steps and falls to 0 over the last `decay`."""
    up, down = max(1, round(warmup * steps)), max(1, round(decay * steps))
    rise = optax.linear_schedule(peak / up, peak, up)
    fall = optax.linear_schedule(peak, 0.0, down)
    return optax.join_schedules([rise, fall], [max(up, steps - down)])


def add_up(metrics: list[Metrics]) -> Metrics:
    """The metrics of several at once: ratios add as those of batches do, `fired` stands one after another."""
    summed = jax.tree.map(lambda *parts: sum(parts), *metrics)
    if "fired" in summed:
        summed["fired"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *[one["fired"] for one in metrics])
    return summed
