"""What an objective sees: rows of activations by site name."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Names = str | tuple[str, ...]

GRADIENT = "/gradient"
"""The end of a name that means the gradient of the model's own next-token loss by the array named before it."""


@dataclass(frozen=True)
class Sites:
    """The arrays that a decomposition reads and writes, by name: `blocks/3/mlp/in` and `blocks/3/mlp/out`.

    A tuple of names where it reads or writes several arrays at once. A name may end in GRADIENT.
    """

    reads: Names
    writes: Names

    def names(self) -> tuple[str, ...]:
        """The names, each once."""
        return tuple(dict.fromkeys((*several(self.reads), *several(self.writes))))

    @property
    def without_gradients(self) -> "Sites":
        """What a forward pass alone can give: gradients are left out, and one name is no tuple."""
        reads = tuple(name for name in several(self.reads) if not name.endswith(GRADIENT))
        return Sites(reads[0] if len(reads) == 1 else reads, self.writes)

    @property
    def leaf(self) -> str:
        """The sublayer whose array is written (the first one's, where there are several): `blocks/3/mlp`."""
        return several(self.writes)[0].rpartition("/")[0]


def several(names: Names) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (names,) if isinstance(names, str) else names


class Batch(eqx.Module):
    """Rows (tokens) of a training or evaluation batch.

    Attributes:
      arrays: by site name, `[tokens, d]`.
      weight: 1 for a token that counts, 0 for attention sinks and special tokens.
      step: the training step, for schedules.
      k: the number of active features asked for, at most the decomposition's own; None: its own.
      coefficients: by name, the numbers that `scale(term, "name")` reads; a sweep varies them without a new program.
      windows: "tokens", "weight" and "document" `[batch, seq]` of this step, for objectives that run the model. The
        rows above come out of a shuffle buffer and belong to other windows.
      sites: which array is the input and which the target.
    """

    arrays: dict[str, Float[Array, "tokens _d"]]
    weight: Float[Array, " tokens"]
    step: Int[Array, ""]
    k: Int[Array, ""] | None
    coefficients: dict[str, Float[Array, ""]]
    windows: dict[str, Array] | None
    sites: Sites = eqx.field(static=True)

    @property
    def inputs(self) -> Any:
        """What the decomposition reads: `[tokens, d_in]`, a tuple of arrays where it reads several."""
        return self._arrays(self.sites.reads)

    @property
    def targets(self) -> Any:
        """What the decomposition should return: `[tokens, d_out]`, a tuple of arrays where it writes several."""
        return self._arrays(self.sites.writes)

    def _arrays(self, names: Names) -> Any:
        return self.arrays[names] if isinstance(names, str) else tuple(self.arrays[name] for name in names)


def make_batch(
    arrays: dict[str, Any],
    weight: Any,
    sites: Sites,
    *,
    step: Any = 0,
    k: Any = None,
    windows: Any = None,
    **coefficients: Any,
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
    )
