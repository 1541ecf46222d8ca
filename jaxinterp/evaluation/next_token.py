"""The effect on what a model predicts: cross-entropy, KL and agreement of the next token.

    nll      -log p(next token), in nats
    kl       KL(clean || replaced), in nats
    agrees   whether both find the same token most likely

A next token counts where it and the token before it have weight and belong to one document.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.data.activations import counted
from jaxinterp.evaluation.columns import Answer, Column
from jaxinterp.evaluation.effects import Columns, Effect, Row, Table, summary
from jaxinterp.kernels import chunks, platforms

CROSS_ENTROPY = Answer(
    key="ce",
    better=-1,
    name="Cross-entropy",
    title="Cross-entropy with the MLP replaced",
    note="nats per token, lower is better",
    unit="nats",
    change="Cross-entropy added",
    best="the lowest cross-entropy when it stands in for the MLP",
    unchanged="unchanged, the model has {}",
    about="CE: cross-entropy of the next token",
    counted="cross-entropies on {:,} next tokens",
    counted_key="ce_tokens",
)

COLUMNS = (
    Column(
        "ce_replaced",
        "Replaced",
        "Cross-entropy, nats per token",
        "The model's cross-entropy on held-out text with the MLP replaced by this row.",
        "three",
        -1,
        "ce_replaced_interval",
        short="CE",
    ),
    Column(
        "ce_clean",
        "Clean",
        "Cross-entropy, nats per token",
        "The unchanged model's cross-entropy: what a perfect replacement would reach.",
        "three",
    ),
    Column(
        "ce_mean",
        "Mean",
        "Cross-entropy, nats per token",
        "Cross-entropy with the MLP's output replaced by its training mean.",
        "three",
    ),
    Column(
        "ce_zero",
        "Zero",
        "Cross-entropy, nats per token",
        "Cross-entropy with the MLP's output replaced by zero.",
        "three",
    ),
    Column(
        "ce_recovered_zero",
        "vs zero",
        "Recovered",
        "Share of the damage of zeroing the MLP that the replacement undoes: (zero − replaced) / (zero − clean).",
        "percent",
        +1,
        short="rec zero",
    ),
    Column(
        "ce_recovered_mean",
        "vs mean",
        "Recovered",
        "Share of the damage of replacing the MLP by its mean output that the replacement undoes: "
        "(mean − replaced) / (mean − clean).",
        "percent",
        +1,
        short="rec mean",
    ),
    Column(
        "kl",
        "KL",
        "Predictions",
        "Mean Kullback–Leibler divergence, in nats per token, of the replaced model's next-token distribution from "
        "the clean model's.",
        "three",
        -1,
        short="KL",
    ),
    Column(
        "top1_agreement",
        "Top-1",
        "Predictions",
        "Fraction of tokens on which the clean and the replaced model predict the same next token.",
        "percent",
        +1,
        short="top-1",
    ),
)


AT_A_TIME = {"cpu": 2**19, "gpu": 2**28, "tpu": 2**28}
"""Logits that are compared at a time: on a CPU they fit its cache, elsewhere what is made of them stays small."""


@jax.jit
def compare(
    logits: Float[Array, "batch seq vocab"], clean: Float[Array, "batch seq vocab"], tokens: Int[Array, "batch seq"]
) -> Columns:
    """Per next token: its negative log-likelihood, KL(clean || logits), whether the most likely token agrees.

    A few tokens at a time: log-probabilities of the whole batch never stand in memory.
    """
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab), clean.reshape(-1, vocab), jnp.roll(tokens, -1, axis=1).reshape(-1)
    size = 2 ** int(math.log2(max(1, AT_A_TIME[platforms.current()] // vocab)))  # a power of 2 divides most batches
    found = chunks.mapped(lambda part: _of_tokens(*part), rows, size)
    return {name: column.reshape(tokens.shape)[:, :-1] for name, column in found.items()}


def _of_tokens(
    logits: Float[Array, "tokens vocab"], clean: Float[Array, "tokens vocab"], next_token: Int[Array, " tokens"]
) -> Columns:
    log_p, log_clean = jax.nn.log_softmax(logits), jax.nn.log_softmax(clean)
    return {
        "nll": -jnp.take_along_axis(log_p, next_token[:, None], axis=-1)[..., 0],
        "kl": jnp.sum(jnp.exp(log_clean) * (log_clean - log_p), axis=-1),
        "agrees": _most_likely(log_p) == _most_likely(log_clean),
    }


def _most_likely(log_p: Float[Array, "tokens vocab"]) -> Int[Array, " tokens"]:
    """`argmax`, which a CPU computes number by number: the first place of the maximum; of NaN, one behind the last."""
    places = jax.lax.broadcasted_iota(jnp.int32, log_p.shape, 1)
    return jnp.min(jnp.where(log_p == jnp.max(log_p, axis=-1, keepdims=True), places, log_p.shape[1]), axis=-1)


def _compare_next_tokens(logits: Array, clean: Array, windows: Mapping[str, Array]) -> Columns:
    return compare(logits, clean, windows["tokens"]) | {"counted": counted(windows)}


def _next_token_numbers(table: Table) -> Row:
    """Cross-entropy in nats, KL and agreement of the most likely token."""
    others = {"kl": table.mean("kl"), "top1_agreement": table.mean("agrees")}
    return summary(table, "nll", "ce") | others | {"ce_tokens": int(table["counted"].sum())}


NEXT_TOKEN = Effect(lambda trace: trace.logits, _compare_next_tokens, _next_token_numbers, COLUMNS, CROSS_ENTROPY)
