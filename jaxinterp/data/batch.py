"""What an objective sees: rows of activations by site name."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Sites:
    """The arrays that a decomposition reads and writes, by name: `blocks/3/mlp/in` and `blocks/3/mlp/out`."""

    reads: str
    writes: str

    def names(self) -> tuple[str, ...]:
        """The names, each once."""
        return tuple(dict.fromkeys((self.reads, self.writes)))

    @property
    def leaf(self) -> str:
        """The sublayer that both belong to: `blocks/3/mlp`."""
        return self.writes.rpartition("/")[0]


class Batch(eqx.Module):
    """Rows (tokens) of a training or evaluation batch.

    Attributes:
      arrays: by site name, `[tokens, d]`.
      weight: 1 for a token that counts, 0 for attention sinks and special tokens.
      step: the training step, for schedules.
      k: the number of active features asked for, at most the decomposition's own; None: its own.
      sites: which array is the input and which the target.
    """

    arrays: dict[str, Float[Array, "tokens _d"]]
    weight: Float[Array, " tokens"]
    step: Int[Array, ""]
    k: Int[Array, ""] | None
    sites: Sites = eqx.field(static=True)

    @property
    def inputs(self) -> Float[Array, "tokens d_in"]:
        """What the decomposition reads."""
        return self.arrays[self.sites.reads]

    @property
    def targets(self) -> Float[Array, "tokens d_out"]:
        """What the decomposition should return."""
        return self.arrays[self.sites.writes]


def make_batch(arrays: dict[str, Any], weight: Any, sites: Sites, step: Any = 0, k: Any = None) -> Batch:
    """A batch from plain arrays: `make_batch({"x": x, "y": y}, weight, Sites("x", "y"))`."""
    k = None if k is None else jnp.asarray(k, jnp.int32)
    return Batch(
        {name: jnp.asarray(array) for name, array in arrays.items()},
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(step, jnp.int32),
        k,
        sites,
    )
