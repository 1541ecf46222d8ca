"""Tokens -> rows of activations: the model's forward pass up to the sites asked for.

The rows never leave the device: `harvest` is a pure function to be called inside the program that uses them, and the
compiler drops every layer behind the last site.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxinterp.errors import UserError
from jaxinterp.models.sites import run


class Rows(eqx.Module):
    """Activations of many tokens, by site name, with the weight of each token."""

    arrays: dict[str, Float[Array, "tokens _d"]]
    weight: Float[Array, " tokens"]

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.weight.shape[0]


def harvest(model: Any, windows: Mapping[str, Any], names: Iterable[str]) -> Rows:
    """The named arrays for every token of a batch of windows, as float32 rows.

    Args:
      windows: "tokens" `[batch, seq]` and "weight" `[batch, seq]`.
    """
    trace = run(model, windows["tokens"])
    arrays = {name: trace[name].astype(jnp.float32) for name in names}
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in arrays.items()}
    return Rows(rows, windows["weight"].reshape(-1))


def check_finite(rows: Rows) -> None:
    """Raises UserError if an activation is NaN or infinite, naming the site and how many."""
    for name, array in rows.arrays.items():
        broken = int(jnp.sum(~jnp.isfinite(array).all(axis=1)))
        if broken:
            raise UserError(
                f"{broken} of {rows.count} activations at {name!r} are NaN or infinite: check the model's weights and "
                "its dtype (float16 overflows where float32 and bfloat16 do not)."
            )


def shuffle_in(buffer: Rows, new: Rows, key: PRNGKeyArray) -> tuple[Rows, Rows]:
    """Put new rows into a device buffer at random places; what stood there comes out.

    Every row goes in once and comes out once, after a random wait of about buffer.count / new.count calls, so that a
    training batch mixes tokens of many documents.

    Returns:
      The buffer with the new rows, and as many old rows.
    """
    places = jax.random.permutation(key, buffer.count)[: new.count]
    out = jax.tree.map(lambda array: array[places], buffer)
    return jax.tree.map(lambda array, rows: array.at[places].set(rows), buffer, new), out
