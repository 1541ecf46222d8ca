"""Token ids meet the rows of the embedding: an id without a row is an error, never another token's row.

    0 <= id < rows

An index outside an array is clamped or wrapped by JAX without a word: id 61 of a model of 61 rows would give the logits
of id 60. Where ids are values, `check_ids` raises; inside `jit`, where they are not, their rows are NaN.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.rules import EXACT
from jaxinterp.models.transformer import Transformer


def token_rows(model: PyTree) -> int | None:
    """Rows of the model's embedding; of an adapted model, its number of logits. None: it has neither."""
    if isinstance(model, Transformer):
        return model.embedding.token.shape[0]
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    logits = eqx.filter_eval_shape(
        lambda model, tokens: model(tokens, tap=lambda name, value: value, rules=EXACT), model, tokens
    )
    return None if logits is None else int(logits.shape[-1])


def check_ids(model: PyTree, tokens: Int[Array | np.ndarray, "..."], where: str = "tokens") -> None:
    """Every token id has a row in the model's embedding. Tracers and arrays of other processes pass unseen.

    Args:
      tokens: token ids of any shape.
      where: what holds them, for the message.
    Raises:
      UserError: an id has no row; the message names the first one and its position.
    """
    if isinstance(tokens, jax.core.Tracer) or (isinstance(tokens, jax.Array) and not tokens.is_fully_addressable):
        return
    check_rows(token_rows(model), np.asarray(tokens), where)


def check_rows(rows: int | None, ids: Int[np.ndarray, "..."], where: str = "tokens") -> None:
    """`check_ids` for a model with so many rows; None: nothing is known of them.

    Raises:
      UserError: an id has no row.
    """
    if rows is None or not ids.size or (ids.min() >= 0 and ids.max() < rows):
        return
    place = tuple(int(axis) for axis in np.argwhere((ids < 0) | (ids >= rows))[0])
    way_out = (
        "negative ids mark what is padded or ignored: leave those positions out"
        if ids[place] < 0
        else "the text was tokenised for another model: tokenise it with the tokenizer of this one"
    )
    raise UserError(
        f"{where}: token id {ids[place]} at position {list(place)} has no row in the model's embedding, which has ids "
        f"0 to {rows - 1}: {way_out}."
    )
