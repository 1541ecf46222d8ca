"""What an objective sees: rows of activations by site name."""

from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from jaxinterp.core.sites import GRADIENT, Names, Needs, Sites, several

__all__ = ["GRADIENT", "Batch", "Names", "Needs", "Sites", "make_batch", "several"]


class Batch(eqx.Module):
    """Rows (tokens) of a training or evaluation batch.

    Attributes:
      arrays: by site name, `[tokens, d]`.
      weight: 1 for a token that counts, 0 for attention sinks and special tokens.
      step: the training step, for schedules.
      k: the number of active features asked for, at most the decomposition's own; None: its own.
      coefficients: by name, the numbers that `scale(term, "name")` reads; a sweep varies them without a new program.
      windows: "tokens", "weight" and "document" `[batch, seq]` of this step, for objectives that run the model. The
        rows above come out of a shuffle buffer and belong to other windows. None where no text is read.
      sites: which array is the input and which the target.
      rows: the numbers of the rows, where a method keeps its rows (`Needs(rows="kept")`); None in a stream.
    """

    arrays: dict[str, Float[Array, "tokens _d"]]
    weight: Float[Array, " tokens"]
    step: Int[Array, ""]
    k: Int[Array, ""] | None
    coefficients: dict[str, Float[Array, ""]]
    windows: dict[str, Array] | None
    sites: Sites = eqx.field(static=True)
    rows: Int[Array, " tokens"] | None = None

    @property
    def inputs(self) -> PyTree:
        """What the decomposition reads: `[tokens, d_in]`, a tuple of arrays where it reads several."""
        return self._arrays(self.sites.reads)

    @property
    def targets(self) -> PyTree:
        """What the decomposition should return: `[tokens, d_out]`, a tuple of arrays where it writes several."""
        return self._arrays(self.sites.writes)

    def gradient(self, name: str) -> Float[Array, "tokens _d"]:
        """The gradient of the model's next-token loss by an array that `Needs.gradients` named."""
        return self.arrays[name + GRADIENT]

    def _arrays(self, names: Names) -> PyTree:
        return self.arrays[names] if isinstance(names, str) else tuple(self.arrays[name] for name in names)


def make_batch(
    arrays: Mapping[str, ArrayLike],
    weight: ArrayLike,
    sites: Sites,
    *,
    step: ArrayLike = 0,
    k: ArrayLike | None = None,
    windows: dict[str, Array] | None = None,
    rows: ArrayLike | None = None,
    **coefficients: ArrayLike,
) -> Batch:
    """A batch from plain arrays: `make_batch({"x": x, "y": y}, weight, Sites("x", "y"))`."""
    return Batch(
        arrays={name: jnp.asarray(array) for name, array in arrays.items()},
        weight=jnp.asarray(weight, jnp.float32),
        step=jnp.asarray(step, jnp.int32),
        k=None if k is None else jnp.asarray(k, jnp.int32),
        coefficients={name: jnp.asarray(value, jnp.float32) for name, value in coefficients.items()},
        windows=windows,
        sites=sites,
        rows=None if rows is None else jnp.asarray(rows, jnp.int32),
    )
