"""An effect with columns of its own: how often the token that follows is among the model's ten guesses."""

import jax.numpy as jnp

from jaxinterp.data.activations import counted
from jaxinterp.evaluation.columns import Answer, Column
from jaxinterp.evaluation.effects import Effect

GUESSES = 10


def among_ten(logits, clean, windows):
    """1 for a next token that fewer than ten others are more likely than, else 0."""
    right = jnp.take_along_axis(logits[:, :-1], windows["tokens"][:, 1:, None], axis=-1)
    ahead = jnp.sum(logits[:, :-1] > right, axis=-1)
    return {"among_ten": (ahead < GUESSES).astype(jnp.float32), "counted": counted(windows)}


AMONG_TEN = Effect(
    lambda trace: trace.logits,
    among_ten,
    columns=(
        Column("among_ten_replaced", "Replaced", "Among ten guesses", "Share of next tokens among the ten most likely, "
               "with the array replaced by this row.", "percent", +1, "among_ten_replaced_interval", "in ten"),
        Column("among_ten_clean", "Clean", "Among ten guesses", "The same of the unchanged model.", "percent"),
    ),
    answer=Answer(
        key="among_ten",
        better=+1,
        name="Guesses",
        title="The next token is among ten guesses",
        note="share of next tokens, higher is better",
        unit="share of next tokens",
        change="Guesses lost",
        best="the most next tokens among ten guesses",
        unchanged="unchanged, the model has {}",
        about="in ten: share of next tokens among the ten most likely",
        counted="guesses of {:,} next tokens",
    ),
)  # fmt: skip
