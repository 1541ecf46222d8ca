"""The programs of one run, and the shapes of what they take: what the loop runs, and what preflight compiles.

Nothing here needs values: the model may be made of `jax.ShapeDtypeStruct`s, the mesh of devices that are not there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import GRADIENT, several
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Needs, RowsWanted, Sites, as_needs
from jaxinterp.data.activations import Harvest, Rows, check_finite, check_varies
from jaxinterp.training.mesh import over_data, state_shardings
from jaxinterp.training.state import Schedules, TrainState, make_step, start_state

Activations = Literal["auto", "float32", "bfloat16"]
BUFFER_BATCHES = 8
"""The usual size of the shuffle buffer."""


def kept_in(activations: Activations, platform: str) -> Literal["float32", "bfloat16"]:
    """What activations are kept and multiplied in on a platform."""
    if activations == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return activations


@dataclass(frozen=True)
class Program:
    """How one recipe is trained on what it needs, on this mesh, with these sizes.

    batch_size: tokens a step; seq: tokens a window; buffer_batches: size of the shuffle buffer, or of the kept rows, in
    batches; activations: what the buffer keeps them in and products are made of, "auto": bfloat16 but on a CPU;
    harvest_parts: how many forward passes a batch is cut into; cached: (shape, dtype) of arrays that come with the
    windows, by name.
    """

    recipe: Recipe
    needs: Needs | Sites
    mesh: Mesh
    batch_size: int
    seq: int
    buffer_batches: int
    seed: int
    schedules: Schedules | None = None
    activations: Activations = "auto"
    harvest_parts: int = 1
    cached: Mapping[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict)

    @property
    def take(self) -> Harvest:
        """How activations are harvested."""
        dtype = kept_in(self.activations, self.mesh.devices.flat[0].platform)
        return Harvest(self.needs.names(), dtype, self.harvest_parts, self.mesh.shape["data"])

    def jit_step(self) -> PyTree:
        """The training step as a program that takes over the state that it is given."""
        step = make_step(self.recipe, self.needs, self.mesh, self.schedules, self.take)
        return eqx.filter_jit(step, donate="all-except-first")

    def compile(self, model: PyTree, platform: str) -> PyTree:
        """The training step compiled for the mesh's devices, present or described, from shapes alone."""
        lowered = self.lower(model, platform)
        with jax.set_mesh(self.mesh):
            return lowered.compile()

    def lower(self, model: PyTree, platform: str) -> PyTree:
        """The training step as the compiler gets it, from shapes alone."""
        step = make_step(self.recipe, self.needs, self.mesh, self.schedules, self.take)
        with jax.set_mesh(self.mesh):
            arguments = (model, self.abstract_given(model)), self.abstract_state(model)
            return jax.jit(step, donate_argnums=1).trace(*arguments).lower(lowering_platforms=(platform,))

    def check(self, model: PyTree, previous: PyTree = None) -> None:
        """Trace one step from shapes alone: a mistake in an objective is found before anything is compiled.

        Raises:
          UserError: what the method or its objective says.
        """
        step = make_step(self.recipe, self.needs, self.mesh, self.schedules, self.take)
        eqx.filter_eval_shape(step, (model, self.abstract_given(model)), self.abstract_state(model, previous))

    @property
    def rows(self) -> RowsWanted:
        """Whether rows are streamed, kept or not taken at all."""
        return as_needs(self.needs).rows

    def harvested(self, model: PyTree, windows: Iterable[Mapping[str, Array]]) -> Rows:
        """The rows of the next `buffer_batches` batches of windows, `[lanes, capacity, d]`.

        Raises:
          UserError: an activation is not finite, or a target is constant.
        """
        first = zip(range(self.buffer_batches), windows, strict=False)
        filled = [self.take.jitted(model, batch) for _, batch in first]
        rows = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *filled)
        check_finite(rows)
        written = several(as_needs(self.needs).writes)
        check_varies(rows, tuple(name for name in written if not name.endswith(GRADIENT)))
        return rows

    def first_state(self, model: PyTree, windows: Iterable[Mapping[str, Array]], previous: PyTree = None) -> TrainState:
        """The state before the first step, of a method that reads a stream: the shuffle buffer is filled.

        Raises:
          UserError: an activation is not finite.
        """
        return self.start(model, self.harvested(model, windows) if self.rows != "none" else None, previous)

    def start(self, model: PyTree, rows: Rows | None, previous: PyTree = None) -> TrainState:
        """The state before the first step, from the full shuffle buffer or from all kept rows."""
        if self.recipe.init_on == "host":
            return self._start(model, rows, previous)
        return eqx.filter_jit(self._start)(model, rows, previous)

    def _start(self, model: PyTree, rows: Rows | None, previous: PyTree = None) -> TrainState:
        windows = self._empty_windows() if rows is None and as_needs(self.needs).windows else None
        return start_state(self.recipe, self.needs, self.mesh, model, rows, self.seed, previous, windows)

    def _empty_windows(self) -> dict[str, Array]:
        """Windows of zeros, of the shapes of a step's."""
        return {name: jnp.zeros(window.shape, window.dtype) for name, window in self.abstract_windows().items()}

    def abstract_windows(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of one batch of windows."""
        shape, lies = (self.batch_size // self.seq, self.seq), over_data(self.mesh)
        text = {"tokens": jnp.int32, "weight": jnp.float32, "document": jnp.int32}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=lies) for name, dtype in text.items()} | {
            name: jax.ShapeDtypeStruct((shape[0], *of_window), dtype, sharding=lies)
            for name, (of_window, dtype) in self.cached.items()
        }

    def abstract_given(self, model: PyTree) -> PyTree:
        """Shapes and shardings of what a step gets: a batch of windows, or all kept rows."""
        if self.rows != "kept":
            return self.abstract_windows()
        lies = over_data(self.mesh)
        place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)
        return jax.tree.map(place, self.abstract_rows(model))

    def abstract_rows(self, model: PyTree) -> Rows:
        """Shapes of the full shuffle buffer, or of all kept rows."""

        def filled(shape: Any) -> PyTree:
            return jax.ShapeDtypeStruct((shape.shape[0], self.buffer_batches * self.seq, *shape.shape[2:]), shape.dtype)

        rows: Rows = jax.tree.map(filled, self.take.shapes(model, self.abstract_windows()))
        return rows

    def abstract_state(self, model: PyTree, previous: PyTree = None) -> TrainState:
        """Shapes and shardings of the whole state."""
        buffer = None if self.rows == "none" else self.abstract_rows(model)
        state = eqx.filter_eval_shape(self._start, model, buffer, previous)
        return jax.tree.map(
            lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
            state,
            state_shardings(state, self.mesh),
        )
