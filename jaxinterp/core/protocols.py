"""What people implement: documented callables. Anything that has these signatures will do; nothing is inherited.

    Method       needs(site) -> Needs;  recipe(steps) -> Recipe          a frozen dataclass of hyperparameters
    Recipe       init, step, finish on a state                           by a lifter of methods.recipes, or by hand
    Objective    (decomposition, batch, key, *, model) -> (loss, metrics)
    Term         (decomposition, batch, forward) -> (value, metrics)      summands of an objective: `total(...)`
    Edit         array -> array                                           an intervention in a forward pass

Here `PyTree` is whatever a method trains: a decomposition, a tuple of them, a model.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.metrics import Metrics
from jaxinterp.core.sites import Needs, Site, Sites


class MethodState(eqx.Module):
    """What a method changes from step to step: one pytree, saved in every checkpoint.

    Attributes:
      decomposition: what is learned; the marks of its fields (`core.fields`) say what is trained and how it is spread.
      optimizer: the optimizer's state, None without one.
      aux: anything else that must outlive a step and is dropped at the end: moments, codes of kept rows (marked
        `spread="token"`, see `TOKEN_ROWS` and `PerToken`).
    """

    decomposition: PyTree
    optimizer: PyTree = None
    aux: PyTree = None


class Init(Protocol):
    """The state before the first step. Called once a pass, by `fit`; traced, unless `Recipe.init_on` is "host"."""

    def __call__(self, key: PRNGKeyArray, sample: Batch, model: PyTree, previous: PyTree = None, /) -> PyTree:
        """The state before the first step.

        Args:
          key: for everything random in the start values.
          sample: rows to take scales and means from: the first shuffle buffer, or all kept rows; without rows
            (`rows="none"`) a batch of no arrays and no tokens.
          model: the frozen subject model.
          previous: what the pass before it returned from `finish`; None in the first pass.
        Returns:
          A pytree of arrays, usually a `MethodState`. Structure, shapes and dtypes must stay the same at every step.
        """
        ...


class Step(Protocol):
    """One training step. Traced into one program with the harvest; pure."""

    def __call__(self, state: PyTree, batch: Batch, key: PRNGKeyArray, model: PyTree, /) -> tuple[PyTree, Metrics]:
        """The state after a step, and metrics.

        Args:
          state: what `init` or the step before returned. Whole arrays: the mesh is not seen.
          batch: the rows of this step; all kept rows where `Needs.rows` is "kept".
          key: another one at every step.
          model: the frozen subject model.
        Returns:
          The new state, of the same structure, and the metrics: sums and counts of this step. `loss` is optional.
        """
        ...


class Finish(Protocol):
    """What a pass returns: called once, by `fit`, in every process, outside of any program. May compute on the host."""

    def __call__(self, state: PyTree, /) -> PyTree:
        """The decomposition. Arrays of one row a token and optimizers are left behind."""
        ...


class Recipe(NamedTuple):
    """A method's three functions for one pass over the data.

    Attributes:
      init, step, finish: see `Init`, `Step`, `Finish`. `step` is None where there is nothing to step: `finish` follows
        `init`, and `fit` needs no `steps`.
      init_on: where `init` runs: "device" (traced), or "host" (as it is, on concrete arrays: for solvers of NumPy).
      steps: how many steps this pass takes; None: those of `fit`.
    """

    init: Init
    step: Step | None
    finish: Finish
    init_on: Literal["device", "host"] = "device"
    steps: int | None = None


Recipes = Recipe | tuple[Recipe, ...]
"""One pass, or several: each starts from what the one before it returned."""


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of hyperparameters, without arrays, which says what it needs and how it is trained.

    Final: methods share functions, and none inherits from another. Values that make no sense are refused in
    `__post_init__` with a `UserError`, before compute is spent.
    """

    def needs(self, site: Site, /) -> Needs | Sites:
        """Which arrays it wants for a site.

        Args:
          site: the name that `fit(..., site=)` was given, a tuple of names where that was a glob, None without one.
        Returns:
          `Needs`; `Sites(reads, writes)` is short for `Needs(reads, writes)`.
        Raises:
          UserError: it cannot work there.
        """
        ...

    def recipe(self, steps: int, /) -> Recipes:
        """How it is trained in so many steps (for schedules of learning rates)."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A pure function from a decomposition and a batch to a loss and metrics, on whole arrays: no axis names, no mesh.

    Called by `gradient_method`, inside the training program. `model` is the frozen subject model, for objectives that
    have it in the loop; it is an argument because a closed-over weight becomes a literal of the compiled program.
    Which metrics have a meaning: see `core.metrics.Metrics`; `loss` is added where it is missing.
    """

    def __call__(
        self, decomposition: PyTree, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """(the loss that is differentiated, metrics)."""
        ...


class Forward(NamedTuple):
    """What was computed once for all terms.

    Attributes:
      codes: what `encode` returned.
      output: what `decode` returned, `[tokens, d_out]`.
      key: for terms that draw.
      model: the frozen subject model, or None.
    """

    codes: PyTree
    output: PyTree
    key: PRNGKeyArray
    model: PyTree


@runtime_checkable
class Term(Protocol):
    """One summand of an objective, called by `total(...)`.

    It says by the annotation of `decomposition` what it needs of it: `Decomposition`, `Features`, or a class.
    """

    def __call__(self, decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Float[Array, ""], Metrics]:
        """(a scalar that is added to the loss, metrics that are added to those of the other terms)."""
        ...


@runtime_checkable
class Edit(Protocol):
    """A callable pytree: the array that flows on in place of a named one. Called by `run(..., edits={name: edit})`."""

    def __call__(self, x: Array, /) -> Array:
        """The edited array, of the same shape and dtype."""
        ...
