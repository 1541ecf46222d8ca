"""What needs the model: your own text, steering and generating, the effect of an ablation. Pure functions to JSON."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.decomposition import Revivable, Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.sites import several
from jaxinterp.evaluation.features.ablation import ablation
from jaxinterp.evaluation.features.firings import find_firings
from jaxinterp.evaluation.features.head_parts import head_parts, why_no_parts
from jaxinterp.models.edits import Add
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.generate import generate
from jaxinterp.models.run import run
from jaxinterp.report.passages import token_text

MOST_TOKENS = 512
"""Of your own text; a prompt to be continued may have as many."""
MOST_NEW = 128
SHOWN = 12
"""Features of a text that are listed first, and of every token."""
WORDS = 8
"""Next tokens and heads that are listed."""
MEASURED = {"where_fires", "elsewhere", "tokens", "windows", "raised", "lowered", "heads"}
"""What `ablated` returns."""


@ordinary()
def fires_on(decomposition: Shown, subject: Subject, text: str) -> dict[str, Json]:
    """Which features fire on a text, token by token.

    Returns:
      tokens: their texts; fires: by token, (feature, activation), strongest first; features: the strongest ones of the
      whole text with an activation at every token.
    Raises:
      UserError: the text is empty or too long, or the subject has no tokenizer.
    """
    ids = _ids(subject, text)
    width = -(-len(ids) // 16) * 16  # programs are used again for texts of about the same length
    window = {"tokens": np.zeros(width, np.int32), "weight": np.zeros(width, np.float32)}
    window["tokens"][: len(ids)], window["weight"][: len(ids)] = ids, 1
    ((_, found),) = find_firings(decomposition, subject.model, [window])
    dense = np.zeros((len(ids), decomposition.decoder.shape[0]), np.float32)
    dense[found.where, found.features] = found.values
    fires: list[Json] = []
    for codes in dense:
        order = np.argsort(-np.abs(codes), kind="stable")[:SHOWN]
        fires.append([[int(j), _round(codes[j])] for j in order if codes[j] != 0])
    first = 1 if subject.tokenizer is not None and subject.tokenizer.begin is not None and len(ids) > 1 else 0
    peaks = np.abs(dense[first:]).max(axis=0)  # what an attention sink fires says little of the text
    chosen = [int(j) for j in np.argsort(-peaks, kind="stable")[: 2 * SHOWN] if peaks[j] > 0]
    return {
        "tokens": [token_text(subject.tokenizer, token) for token in ids],
        "fires": fires,
        "features": [{"i": j, "values": [_round(value) for value in dense[:, j]]} for j in chosen],
    }


def write_vector(decomposition: Shown, feature: int) -> Float[Array, " d_out"]:
    """What one unit of a feature adds to the written array, in the model's own units."""
    scale = decomposition.output_scale if isinstance(decomposition, Revivable) else 1.0
    return jnp.asarray(decomposition.decoder[feature] * scale, jnp.float32)


@ordinary()
def steered(
    decomposition: Shown,
    subject: Subject,
    prompt: str,
    feature: int,
    amount: float,
    *,
    new: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Json]:
    """Continue a prompt as it is, and with `amount` times a feature's write vector added at every token.

    Returns:
      plain, steered: the texts; kl: KL(unsteered || steered) of the next token, nats; before, after: the most probable
      next tokens; agrees: whether the first of both is the same.
    Raises:
      UserError: a number is out of range, or the prompt is empty or too long.
    """
    if not 1 <= new <= MOST_NEW:
        raise UserError(f"new={new} must be from 1 to {MOST_NEW} tokens.")
    if not np.isfinite(amount):
        raise UserError(f"amount={amount} must be a finite number.")
    ids = _ids(subject, prompt)
    (writes,) = several(decomposition.sites.writes)
    edits = {writes: Add(jnp.float32(amount) * write_vector(decomposition, feature))}
    sampling: dict[str, Any] = {"max_tokens": new, "temperature": temperature, "seed": seed}
    plain = generate(subject, ids, **sampling)
    changed = generate(subject, ids, edits=edits, **sampling)
    before, after = (np.asarray(each, np.float64) for each in _next_tokens(subject.model, jnp.asarray([ids]), edits))

    def words(log_p: np.ndarray) -> list[Json]:
        strongest = np.argsort(-log_p, kind="stable")[:WORDS]
        return [[token_text(subject.tokenizer, int(t)), _round(np.exp(log_p[t]))] for t in strongest]

    return {
        "plain": plain.text,
        "steered": changed.text,
        "kl": _round(max(0.0, float(np.sum(np.exp(before) * (before - after))))),
        "agrees": bool(before.argmax() == after.argmax()),
        "before": words(before),
        "after": words(after),
    }


@eqx.filter_jit
def _next_tokens(model: PyTree, tokens: Array, edits: Any) -> tuple[Array, Array]:
    """Log-probabilities of the next token, without the edits and with them."""
    before, after = run(model, tokens, keep=()).logits[0, -1], run(model, tokens, edits=edits, keep=()).logits[0, -1]
    return jax.nn.log_softmax(before.astype(jnp.float32)), jax.nn.log_softmax(after.astype(jnp.float32))


@ordinary()
def ablated(
    decomposition: Shown, subject: Subject, rows: np.ndarray, fired: np.ndarray, feature: int
) -> dict[str, Json]:
    """The effect of setting a feature to 0 in some windows of text: on the loss, and on the next token where it fires.

    Args:
      rows: token ids, `[windows, seq]`.
      fired: where the feature fires, `[windows, seq]`.
    Returns:
      where_fires, elsewhere: mean change of the loss of the token that follows, in nats, over tokens on which it fires
      and over all others; tokens: how many they are; raised, lowered: the next tokens whose log-probability it changes
      most, (token, nats), through all later layers; heads: the attention heads with the largest direct part in its
      pre-activation, (layer.head, part), each window at its strongest token; None where it reads no sum of heads.
    """
    once = np.zeros(len(rows), bool)
    once[np.unique(rows, axis=0, return_index=True)[1]] = True  # a window that fills the batch up counts once
    fires = (np.asarray(fired) != 0) & once[:, None]
    found = ablation(decomposition, subject.model, jnp.asarray(rows), feature, jnp.asarray(fires))
    effect, raises = np.asarray(found.effect, np.float64)[once], np.asarray(found.raises)
    here = fires[once, :-1]

    def words(sign: int) -> list[Json]:
        order = np.argsort(-sign * raises, kind="stable")[:WORDS]
        return [[token_text(subject.tokenizer, int(t)), _round(raises[t])] for t in order if sign * raises[t] > 0]

    return {
        "where_fires": _round(effect[here].mean()) if here.any() else None,
        "elsewhere": _round(effect[~here].mean()) if (~here).any() else None,
        "tokens": [int(here.sum()), int((~here).sum())],
        "windows": int(once.sum()),
        "raised": words(1),
        "lowered": words(-1),
        "heads": _strongest_heads(decomposition, subject, rows, np.abs(fired).argmax(axis=1), once, feature),
    }


def _strongest_heads(
    decomposition: Shown, subject: Subject, rows: np.ndarray, positions: np.ndarray, once: np.ndarray, feature: int
) -> list[Json] | None:
    """Mean parts of heads over windows, the largest first."""
    if why_no_parts(decomposition, subject.model) is not None:
        return None
    parts = head_parts(decomposition, subject.model, jnp.asarray(rows), feature, jnp.asarray(positions))
    mean = np.asarray(parts)[once].mean(axis=0)
    order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:WORDS]
    layers, heads = np.unravel_index(order, mean.shape)
    return [[f"{layer}.{head}", _round(mean[layer, head])] for layer, head in zip(layers, heads, strict=True)]


def _ids(subject: Subject, text: str) -> list[int]:
    ids = subject.ids(text)
    if not ids or not text:
        raise UserError("the text is empty: write something.")
    if len(ids) > MOST_TOKENS:
        raise UserError(f"the text has {len(ids):,} tokens: give at most {MOST_TOKENS}.")
    return ids


def _round(value: float | Array | np.generic) -> float:
    """Four significant digits."""
    return float(f"{float(value):.4g}")
