"""Whether an edit may run with a cache: one token at a time it must give what it gives on a whole sequence."""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Edit
from jaxinterp.models.layers import no_tap
from jaxinterp.models.run import run

MOST = 64
"""Positions that are tried."""


def check_tokenwise(model: PyTree, edits: Mapping[str, Edit], places: Int[Array, "batch slots"], width: int) -> None:
    """Raises UserError if an edit gives something else one token at a time, tried on random arrays.

    Args:
      places: the position of every slot, -1 for padding.
      width: slots of the prompt; those behind it will be filled one by one.
    """
    for name in edits:
        if name.endswith("/attn/pattern"):
            raise UserError(f"edits: {name!r} has a row for every key: give cache=False to edit it.")
    if not edits:
        return
    count = jnp.arange(places.shape[1])
    full = jnp.where(count < width, places, count - width + 1 + jnp.max(places, axis=1, keepdims=True))
    tried = jnp.concatenate([full[:, :1], full[:, max(1, full.shape[1] - MOST + 1) :]], axis=1)
    shape = jax.ShapeDtypeStruct(tried.shape, jnp.int32)
    arrays: dict[str, PyTree] = eqx.filter_eval_shape(
        lambda model, tokens: run(model, tokens, edits=_shapes_only(edits)).arrays, model, shape
    )
    for name, edit in edits.items():
        if name not in arrays:
            continue  # run says why
        key = jax.random.key(0)
        x = jax.random.normal(key, arrays[name].shape).astype(arrays[name].dtype)
        try:
            whole, alone = _both(edit, name, x, tried)
            same = whole.shape == alone.shape and bool(
                jnp.allclose(whole.astype(jnp.float32), alone.astype(jnp.float32), rtol=1e-2, atol=1e-3, equal_nan=True)
            )
        except (ValueError, TypeError, IndexError):
            same = False
        if not same:
            raise UserError(
                f"the edit at {name!r} gives something else one token at a time than on a whole sequence: it holds "
                "values for several positions, or mixes positions. Give cache=False, or an edit that takes positions=."
            )


def _shapes_only(edits: Mapping[str, Edit]) -> dict[str, Edit]:
    """Edits below other edits need those; all that keep shapes without looking at positions are left out."""
    return {name: edit for name, edit in edits.items() if takes(edit, "tap")}


@eqx.filter_jit
def _both(
    edit: Edit, name: str, x: Float[Array, "batch seq ..."], places: Int[Array, "batch seq"]
) -> tuple[Array, Array]:
    def apply(x: Array, places: Array) -> Array:
        given = {"positions": places, "tap": no_tap, "name": name}
        return edit(x, **{key: value for key, value in given.items() if takes(edit, key)})

    alone = jax.vmap(lambda column, place: apply(column[:, None], place[:, None])[:, 0], in_axes=1, out_axes=1)
    return apply(x, places), alone(x, places)
