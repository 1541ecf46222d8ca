"""Tokens -> activations: the model's forward pass up to the sites asked for, and the buffer that mixes them.

The rows never leave the device: `harvest` and `shuffle_in` are pure functions to be called inside the program that uses
them, and the compiler drops every layer behind the last site.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.data.batch import GRADIENT, Names
from jaxinterp.errors import UserError
from jaxinterp.models.sites import Add, run


class Rows(eqx.Module):
    """Activations by site name, with the weight of each token; `[..., d]` and `[...]`."""

    arrays: dict[str, Float[Array, "... _d"]]
    weight: Float[Array, "..."]

    def at(self, names: Names) -> Any:
        """The array of a name; a tuple of arrays for several."""
        return self.arrays[names] if isinstance(names, str) else tuple(self.arrays[name] for name in names)

    def flat(self) -> "Rows":
        """The same with one leading axis: `[tokens, d]` and `[tokens]`."""
        arrays = {name: array.reshape(-1, array.shape[-1]) for name, array in self.arrays.items()}
        return Rows(arrays, self.weight.reshape(-1))


def harvest(model: Any, windows: Mapping[str, Any], names: tuple[str, ...]) -> Rows:
    """The named arrays of a batch of windows, float32, `[batch, seq, d]`; axes behind `seq` are flattened into d.

    Args:
      windows: "tokens", "weight" and, where windows hold several documents, "document", `[batch, seq]`.
      names: arrays, and `<array>/gradient` for the gradient of the summed next-token loss by that array.
    """
    tokens, weight = windows["tokens"], windows["weight"]
    trace = run(model, tokens)
    found = {name: trace[name] for name in names if not name.endswith(GRADIENT)}
    by = [name.removesuffix(GRADIENT) for name in names if name.endswith(GRADIENT)]
    if by:
        zeros = {name: jnp.zeros_like(trace[name]) for name in by}
        gradients = jax.grad(_next_token_loss)(zeros, model, tokens, counted(windows))
        found |= {name + GRADIENT: gradient for name, gradient in gradients.items()}
    return Rows({name: found[name].astype(jnp.float32).reshape(*tokens.shape, -1) for name in names}, weight)


def counted(windows: Mapping[str, Any]) -> Float[Array, "batch next"]:
    """1 where a next token counts: it and the token before it have weight and belong to one document.

    Without "document" among the windows each of them is taken to be one document.
    """
    weight = windows["weight"]
    counts = weight[:, :-1] * weight[:, 1:]
    if "document" in windows:
        counts = counts * (windows["document"][:, :-1] == windows["document"][:, 1:])
    return counts


harvest_jit = eqx.filter_jit(harvest)
"""`harvest` as a program of its own, compiled once for each model structure, shape and set of names."""


def check_finite(rows: Rows) -> None:
    """Raises UserError if an activation is NaN or infinite, naming the site and how many."""
    for name, array in rows.arrays.items():
        broken = int(jnp.sum(~jnp.isfinite(array).all(axis=-1)))
        if broken:
            raise UserError(
                f"{broken} of {rows.weight.size} activations at {name!r} are NaN or infinite: check the model's "
                "weights and its dtype (float16 overflows where float32 and bfloat16 do not)."
            )


def shuffle_in(buffer: Rows, new: Rows, key: PRNGKeyArray) -> tuple[Rows, Rows]:
    """Put new rows into a device buffer at random places; what stood there comes out.

    The buffer is `[lanes, capacity, d]`, the new rows `[lanes, seq, d]`: window i of every batch goes to lane i. Lanes
    never mix, so that they can lie on different devices without traffic and in the same order on every mesh. Every row
    goes in once and comes out once, after a random wait of about capacity / seq batches.

    Returns:
      The buffer with the new rows, and as many old rows, `[lanes, seq, d]`.
    """
    lanes, capacity = buffer.weight.shape
    count = new.weight.shape[1]

    def places(lane: Int[Array, ""]) -> Int[Array, " seq"]:
        return jax.random.permutation(jax.random.fold_in(key, lane), capacity)[:count]

    chosen = jax.vmap(places)(jnp.arange(lanes))
    out = jax.tree.map(lambda stored: jax.vmap(lambda lane, at: lane[at])(stored, chosen), buffer)
    put = jax.vmap(lambda lane, at, rows: lane.at[at].set(rows))
    return jax.tree.map(lambda stored, rows: put(stored, chosen, rows), buffer, new), out


def _next_token_loss(deltas: dict[str, Array], model: Any, tokens: Array, counts: Array) -> Array:
    """The summed cross-entropy of the next tokens that count, with `deltas` added by name."""
    logits = run(model, tokens, edits={name: Add(delta) for name, delta in deltas.items()}).logits
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll * counts)
