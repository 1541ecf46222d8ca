"""Tokens -> activations: the model's forward pass up to the sites asked for, and the buffer that mixes them.

The rows never leave the device: `harvest` and `shuffle_in` are pure functions to be called inside the program that uses
them, and the compiler drops every layer behind the last site.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.batch import GRADIENT, Names
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.models.edits import Add
from jaxinterp.models.ids import check_ids
from jaxinterp.models.run import run

WINDOW = ("tokens", "weight", "document")
"""What a window of text has; other entries are activations."""

EXPERT = re.compile(r"(.+/mlp/experts/\d+)/(?:in|pre|up|hidden|out)(?:/gradient)?")
"""Arrays of one expert, which has some of the tokens only."""

CONSTANT = 1e-10
"""An array whose variance is at most this fraction of its mean square is constant: float32 tells no more."""


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


@dataclass(frozen=True)
class Harvest:
    """Which arrays of the model are taken, and how.

    names: arrays, and `<array>/gradient` for the gradient of the summed next-token loss by that array. dtype: what they
    are kept in. parts: how many forward passes a batch is cut into, one after another, each of which needs so much less
    memory. shards: over how many devices a batch's windows are spread, so that each has its share of every part.
    """

    names: tuple[str, ...]
    dtype: Literal["float32", "bfloat16"] = "float32"
    parts: int = 1
    shards: int = 1

    def __call__(self, model: PyTree, windows: Mapping[str, PyTree]) -> Rows:
        """The named arrays of a batch of windows, `[batch, seq, d]`; axes behind `seq` are flattened into d.

        Args:
          windows: "tokens", "weight" and, where windows hold several documents, "document", `[batch, seq]`; and arrays
            by name that were harvested before (`cached_windows`): where it has all, the model is not run.
        """
        if all(name in windows for name in self.names):
            return Rows({name: windows[name].astype(self.dtype) for name in self.names}, windows["weight"])
        asked = {name: windows[name] for name in WINDOW if name in windows}
        if self.parts == 1:
            return self._rows(self._arrays(model, asked), asked["weight"])
        one_by_one = jax.lax.map(lambda part: self._arrays(model, part), jax.tree.map(self._cut, asked))
        return self._rows(jax.tree.map(self._join, one_by_one), asked["weight"])

    @ordinary()
    def jitted(self, model: PyTree, windows: Mapping[str, PyTree]) -> Rows:
        """The same as a program of its own, compiled once for each model structure and shape.

        Raises:
          UserError: a token id has no row in the model's embedding.
        """
        check_ids(model, windows["tokens"], "text")
        return _take_jit(self, model, windows)

    def shapes(self, model: PyTree, windows: Mapping[str, PyTree]) -> PyTree:
        """The shapes of what it gives, traced once for each model structure and shape."""
        return eqx.filter_eval_shape(_take_jit, self, model, windows)

    def _arrays(self, model: PyTree, windows: Mapping[str, PyTree]) -> dict[str, Array]:
        names = tuple(dict.fromkeys((*self.names, *self._routed())))
        found = _traced(model, windows, names)
        return {name: found[name].astype(self.dtype).reshape(*windows["tokens"].shape, -1) for name in names}

    def _routed(self) -> list[str]:
        """Where the rows are those of one expert: the arrays that say which tokens it has."""
        experts = [EXPERT.fullmatch(name) for name in self.names]
        return sorted({f"{found[1]}/routed" for found in experts if found})

    def _rows(self, arrays: dict[str, Array], weight: Any) -> Rows:
        """The rows; tokens that an expert does not have count nothing."""
        for name in self._routed():
            weight = weight * arrays[name][..., 0].astype(weight.dtype)
        return Rows({name: arrays[name] for name in self.names}, weight)

    def _cut(self, array: Array) -> Array:
        """[batch, ...] -> [parts, batch / parts, ...]; a part has windows of every shard."""
        spread = array.reshape(self.shards, self.parts, -1, *array.shape[1:])
        return jnp.swapaxes(spread, 0, 1).reshape(self.parts, -1, *array.shape[1:])

    def _join(self, array: Array) -> Array:
        """The inverse of `_cut`."""
        spread = array.reshape(self.parts, self.shards, -1, *array.shape[2:])
        return jnp.swapaxes(spread, 0, 1).reshape(-1, *array.shape[2:])


@eqx.filter_jit
def _take_jit(take: Harvest, model: PyTree, windows: Mapping[str, PyTree]) -> Rows:
    return take(model, windows)


def harvest(model: PyTree, windows: Mapping[str, PyTree], names: tuple[str, ...]) -> Rows:
    """`Harvest(names)(model, windows)`: the named arrays in float32, from one forward pass."""
    return Harvest(names)(model, windows)


def _traced(model: PyTree, windows: Mapping[str, PyTree], names: tuple[str, ...]) -> dict[str, Array]:
    tokens = windows["tokens"]
    by = [name.removesuffix(GRADIENT) for name in names if name.endswith(GRADIENT)]
    trace = run(model, tokens, keep=(*names, *by))  # what nobody keeps, attention patterns above all, need not be made
    found = {name: trace[name] for name in names if not name.endswith(GRADIENT)}
    if by:
        zeros = {name: jnp.zeros_like(trace[name]) for name in by}
        gradients = jax.grad(_next_token_loss)(zeros, model, tokens, counted(windows))
        found |= {name + GRADIENT: gradient for name, gradient in gradients.items()}
    return found


def counted(windows: Mapping[str, PyTree]) -> Float[Array, "batch next"]:
    """1 where a next token counts: it and the token before it have weight and belong to one document.

    Without "document" among the windows each of them is taken to be one document.
    """
    weight = windows["weight"]
    counts = weight[:, :-1] * weight[:, 1:]
    if "document" in windows:
        counts = counts * (windows["document"][:, :-1] == windows["document"][:, 1:])
    return counts


def harvest_jit(model: PyTree, windows: Mapping[str, PyTree], names: tuple[str, ...]) -> Rows:
    """`harvest` as a program of its own, compiled once for each model structure, shape and set of names.

    Raises:
      UserError: a token id has no row in the model's embedding.
    """
    return Harvest(names).jitted(model, windows)


READ = ("tokens", "weight")
"""What a harvest of values reads of a window; gradients read the documents too."""


def on_device(batch: Mapping[str, ArrayLike], names: tuple[str, ...] = WINDOW) -> dict[str, Array]:
    """The entries of a batch of windows that a program reads, `[batch, seq]`, as arrays of the device."""
    return {name: jnp.asarray(batch[name]) for name in names}


def harvested(model: PyTree, batches: Iterable[Mapping[str, ArrayLike]], names: tuple[str, ...]) -> dict[str, Array]:
    """The named arrays of all batches, tokens that have weight only: `[tokens, d]`, in the order of the text.

    Args:
      batches: "tokens" and "weight" `[batch, seq]`; small ones, as all rows lie on this host before they are joined.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in batches:
        rows = harvest_jit(model, on_device(batch, READ), names).flat()
        counts = np.asarray(rows.weight) > 0
        for name in names:
            parts[name].append(np.asarray(rows.arrays[name])[counts])
    return {name: jnp.asarray(np.concatenate(arrays)) for name, arrays in parts.items()}


def check_finite(rows: Rows) -> None:
    """Raises UserError if an activation is NaN or infinite, naming the site and how many."""
    for name, array in rows.arrays.items():
        broken = int(jnp.sum(~jnp.isfinite(array).all(axis=-1)))
        if broken:
            raise UserError(
                f"{broken} of {rows.weight.size} activations at {name!r} are NaN or infinite: check the model's "
                "weights and its dtype (float16 overflows where float32 and bfloat16 do not)."
            )


def check_varies(rows: Rows, names: tuple[str, ...]) -> None:
    """Raises UserError if a named array is the same for every token, within what float32 can tell.

    Its variance is 0 then, and every number that is divided by it undefined.
    """
    for name in names:
        variance, size = (float(number) for number in _spread(rows.arrays[name], rows.weight))
        if not variance > CONSTANT * size:
            raise UserError(
                f"{name!r} is the same for every token (variance {variance:.3g}): there is nothing to explain, and no "
                "FVU. Was the sublayer pruned, zeroed or ablated? Choose another site, or leave this layer out."
            )


@jax.jit
def _spread(array: Float[Array, "... d"], weight: Float[Array, "..."]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean squared distance from the mean, and the mean square, over the tokens that have weight."""
    rows, weight = array.reshape(-1, array.shape[-1]).astype(jnp.float32), weight.reshape(-1).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight), 1.0)
    away = rows - rows[jnp.argmax(weight)][None, :]  # exactly 0 where the array is constant: its own mean would round
    variance = jnp.sum(weight * jnp.sum((away - ((weight @ away) / count)[None, :]) ** 2, axis=-1)) / count
    return variance, jnp.sum(weight * jnp.sum(rows**2, axis=-1)) / count


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
    # Read before it is written: else the program copies the buffer.
    buffer, out = jax.lax.optimization_barrier((buffer, out))
    put = jax.vmap(lambda lane, at, rows: lane.at[at].set(rows))
    return jax.tree.map(lambda stored, rows: put(stored, chosen, rows), buffer, new), out


def _next_token_loss(deltas: dict[str, Array], model: PyTree, tokens: Array, counts: Array) -> Array:
    """The summed cross-entropy of the next tokens that count, with `deltas` added by name."""
    logits = run(model, tokens, edits={name: Add(delta) for name, delta in deltas.items()}).logits
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll * counts)
