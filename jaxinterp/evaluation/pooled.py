"""The effect on what an encoder says of a text: the cosine of its embedding with that of the unchanged model."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.evaluation.columns import Answer, Column
from jaxinterp.evaluation.effects import Columns, Effect

SIMILARITY = Answer(
    key="similarity",
    better=+1,
    name="Similarity",
    title="Similarity of embeddings with the MLP replaced",
    note="cosine with the unchanged model's, higher is better",
    unit="cosine",
    change="Change of similarity",
    best="the embeddings most similar to the unchanged model's when it stands in for the MLP",
    unchanged="at {} nothing would have changed",
    about="similarity: cosine of embeddings with the unchanged model's",
    counted="similarities on {:,} windows",
)

COLUMNS = (
    Column(
        "similarity_replaced",
        "Replaced",
        "Similarity of embeddings",
        "Mean cosine of a text's embedding with that of the unchanged model, with the MLP replaced by this row.",
        "three",
        +1,
        "similarity_replaced_interval",
        short="similarity",
    ),
    Column(
        "similarity_mean",
        "Mean",
        "Similarity of embeddings",
        "The same with the MLP's output replaced by its training mean.",
        "three",
    ),
    Column(
        "similarity_zero",
        "Zero",
        "Similarity of embeddings",
        "The same with the MLP's output replaced by zero.",
        "three",
    ),
    Column(
        "similarity_recovered_zero",
        "vs zero",
        "Recovered",
        "Share of the damage of zeroing the MLP that the replacement undoes: (replaced − zero) / (1 − zero).",
        "percent",
        +1,
        short="rec zero",
    ),
    Column(
        "similarity_recovered_mean",
        "vs mean",
        "Recovered",
        "Share of the damage of replacing the MLP by its mean output that the replacement undoes: "
        "(replaced − mean) / (1 − mean).",
        "percent",
        +1,
        short="rec mean",
    ),
    Column("compared", "Texts", "Recovered", "Number of windows of text whose embeddings were compared.", "count"),
)


def _compare_pooled(
    pooled: Float[Array, "batch d_model"], clean: Float[Array, "batch d_model"], windows: Mapping[str, Array]
) -> Columns:
    """Per window: the cosine of its embedding with that of the unchanged model. A window counts if a token does."""
    wide, wide_clean = (array.astype(jnp.float32) for array in (pooled, clean))
    lengths = jnp.linalg.norm(wide, axis=-1) * jnp.linalg.norm(wide_clean, axis=-1)
    cosine = jnp.sum(wide * wide_clean, axis=-1) / jnp.maximum(lengths, 1e-30)
    counts = jnp.any(windows["weight"] > 0, axis=1).astype(jnp.float32)
    return {"similarity": cosine[:, None], "counted": counts[:, None]}


POOLED = Effect(lambda trace: trace["pooled"], _compare_pooled, columns=COLUMNS, answer=SIMILARITY)
