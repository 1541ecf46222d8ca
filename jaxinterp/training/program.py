"""The programs of one run, and the shapes of what they take: what the loop runs, and what preflight compiles.

Nothing here needs values: the model may be made of `jax.ShapeDtypeStruct`s, the mesh of devices that are not there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from jaxinterp.data.activations import Rows, check_finite, harvest, harvest_jit
from jaxinterp.data.batch import Sites
from jaxinterp.methods.base import Recipe
from jaxinterp.training.mesh import over_data, state_shardings
from jaxinterp.training.state import Schedules, TrainState, make_step, start_state


@dataclass(frozen=True)
class Program:
    """How one recipe is trained at these sites, on this mesh, with these sizes.

    batch_size: tokens a step; seq: tokens a window; buffer_batches: size of the shuffle buffer, in batches.
    """

    recipe: Recipe
    sites: Sites
    mesh: Mesh
    batch_size: int
    seq: int
    buffer_batches: int
    seed: int
    schedules: Schedules | None = None

    def jit_step(self) -> Any:
        """The training step as a program that takes over the state that it is given."""
        step = make_step(self.recipe, self.sites, self.mesh, self.schedules)
        return eqx.filter_jit(step, donate="all-except-first")

    def compile(self, model: Any, platform: str) -> Any:
        """The training step compiled for the mesh's devices, present or described, from shapes alone."""
        step = make_step(self.recipe, self.sites, self.mesh, self.schedules)
        with jax.set_mesh(self.mesh):
            arguments = (model, self.abstract_windows()), self.abstract_state(model)
            return jax.jit(step, donate_argnums=1).trace(*arguments).lower(lowering_platforms=(platform,)).compile()

    def first_state(self, model: Any, windows: Iterable[Mapping[str, Array]]) -> TrainState:
        """The state before the first step: `buffer_batches` batches are harvested, means and scales taken from them.

        Raises:
          UserError: an activation is not finite.
        """
        names = self.sites.names()
        first = zip(range(self.buffer_batches), windows, strict=False)
        filled = [harvest_jit(model, batch, names) for _, batch in first]
        buffer = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *filled)
        check_finite(buffer)
        return eqx.filter_jit(self._start)(model, buffer)

    def _start(self, model: Any, buffer: Rows) -> TrainState:
        return start_state(self.recipe, self.sites, self.mesh, model, buffer, self.seed)

    def abstract_windows(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of one batch of windows."""
        shape, lies = (self.batch_size // self.seq, self.seq), over_data(self.mesh)
        return {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lies),
            "weight": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=lies),
            "document": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=lies),
        }

    def abstract_state(self, model: Any) -> TrainState:
        """Shapes and shardings of the whole state."""
        rows = eqx.filter_eval_shape(harvest, model, self.abstract_windows(), self.sites.names())

        def filled(shape: Any) -> Any:
            return jax.ShapeDtypeStruct((shape.shape[0], self.buffer_batches * self.seq, *shape.shape[2:]), jnp.float32)

        state = eqx.filter_eval_shape(self._start, model, jax.tree.map(filled, rows))
        return jax.tree.map(
            lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
            state,
            state_shardings(state, self.mesh),
        )
