"""Steering at a strength that can be compared, and what it does: never one cell.

    strength   alpha such that the mean over contexts of KL(unsteered || steered) at the last token is a target, nats
    cell       site x direction x target x context: concept mass before and after, KL, entropy, fluency

Two vectors of the same length do not disturb a model alike, so that a comparison at equal alpha compares scales.
Bisection needs the divergence to grow with alpha, which fails beyond saturation: `converged` says whether the target
was met, and the strength that came nearest is kept.

Fluency is the perplexity of the steered text under the *unsteered* model.

Sources: matched KL, Rimsky et al.-style comparisons in arXiv 2506.10920 (SNMF); fragility over contexts, arXiv
2601.03047 ("coffee/coffins").
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.models.edits import Add, Edit
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.generate import generate
from jaxinterp.models.ids import check_ids
from jaxinterp.models.run import run
from jaxinterp.models.sites import check_site


class Strength(NamedTuple):
    """A solved strength: the value, what the function is there, and whether that is the target within tolerance."""

    value: Float[Array, ""]
    reached: Float[Array, ""]
    converged: Bool[Array, ""]


def solve_strength(
    function: Callable[[Array], Array],
    target: float | Array,
    *,
    low: float | Array = 0.0,
    high: float | Array = 100.0,
    steps: int = 20,
    tolerance: float = 0.05,
) -> Strength:
    """alpha in [low, high] with function(alpha) = target, by bisection; `steps` evaluations and one at `high`.

    The alpha that came nearest is kept, whether it met the target or not. converged: |reached - target| <= tolerance *
    |target|. Pure: `function` is traced once.

    Raises:
      UserError: low is not below high, or steps is not positive.
    """
    if steps < 1 or (isinstance(low, float | int) and isinstance(high, float | int) and not low < high):
        raise UserError(f"low={low}, high={high}, steps={steps}: low must be below high, steps positive.")

    def nearer(best: tuple[Array, Array], alpha: Array, value: Array) -> tuple[Array, Array]:
        better = jnp.abs(value - target) < jnp.abs(best[1] - target)
        return jnp.where(better, alpha, best[0]), jnp.where(better, value, best[1])

    def halve(_: Array, carry: tuple[Array, Array, tuple[Array, Array]]) -> tuple[Array, Array, tuple[Array, Array]]:
        bottom, top, best = carry
        middle = (bottom + top) / 2
        value = function(middle)
        above = value > target
        return jnp.where(above, bottom, middle), jnp.where(above, middle, top), nearer(best, middle, value)

    ends = jnp.asarray(low, jnp.result_type(float)), jnp.asarray(high, jnp.result_type(float))
    start = (ends[1], function(ends[1]))
    _, _, (value, reached) = jax.lax.fori_loop(0, steps, halve, (*ends, start))
    return Strength(value, reached, jnp.abs(reached - target) <= tolerance * jnp.abs(target))


Steering = Callable[[Array], Mapping[str, Edit]]
"""A callable pytree from a strength to edits by array name: `Along(site, direction)`, `Transport.edits`."""


class Along(eqx.Module):
    """The steering that adds alpha * direction at one array, every token."""

    site: str = eqx.field(static=True)
    direction: Float[Array, " d"]

    def __call__(self, alpha: Array) -> Mapping[str, Edit]:
        return {self.site: Add(alpha.astype(self.direction.dtype) * self.direction)}


class Outcome(NamedTuple):
    """What an edit does to the next token of every context.

    Attributes:
      kl: KL(unsteered || steered), nats.  entropy, entropy_before: of the next token, nats.
      concept, concept_before: probability of the concept's tokens.
      agrees: whether the most probable token is the same.
    """

    kl: Float[Array, " contexts"]
    entropy: Float[Array, " contexts"]
    entropy_before: Float[Array, " contexts"]
    concept: Float[Array, " contexts"]
    concept_before: Float[Array, " contexts"]
    agrees: Bool[Array, " contexts"]


def next_token_outcome(
    model: PyTree,
    tokens: Int[Array, "contexts seq"],
    edits: Mapping[str, Edit],
    concept: Int[Array, " words"],
    mask: Bool[Array, "contexts seq"] | None = None,
) -> Outcome:
    """Compare the next token's distribution with and without edits.

    Args:
      mask: False for padding, which must be on the left.
    """
    log_q, log_p = (
        jax.nn.log_softmax(run(model, tokens, edits=some, mask=mask, keep=()).logits[:, -1]) for some in ({}, edits)
    )
    entropy = lambda log: -jnp.sum(jnp.exp(log) * log, axis=-1)
    return Outcome(
        jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1),
        entropy(log_p),
        entropy(log_q),
        jnp.sum(jnp.exp(log_p[:, concept]), axis=-1),
        jnp.sum(jnp.exp(log_q[:, concept]), axis=-1),
        jnp.argmax(log_p, axis=-1) == jnp.argmax(log_q, axis=-1),
    )


def matched_strength(
    model: PyTree,
    tokens: Int[Array, "contexts seq"],
    site: str,
    direction: Float[Array, " d"],
    target: float,
    *,
    mask: Bool[Array, "contexts seq"] | None = None,
    low: float = 0.0,
    high: float = 100.0,
    steps: int = 20,
    tolerance: float = 0.05,
) -> Strength:
    """The alpha at which adding alpha * direction at `site`, every token, costs `target` nats of KL on average.

    Raises:
      UserError: an unknown site, a target that is not positive, or as `solve_strength`.
    """
    check_site(model, site)
    steering = Along(site, direction)
    return matched_steering(
        model, tokens, steering, target, mask=mask, low=low, high=high, steps=steps, tolerance=tolerance
    )


def matched_steering(
    model: PyTree,
    tokens: Int[Array, "contexts seq"],
    steering: Steering,
    target: float,
    *,
    mask: Bool[Array, "contexts seq"] | None = None,
    low: float = 0.0,
    high: float = 100.0,
    steps: int = 20,
    tolerance: float = 0.05,
) -> Strength:
    """The strength at which the edits `steering(strength)` cost `target` nats of KL on average over contexts.

    Raises:
      UserError: a target that is not positive, low not below high, or as `run` for the edits.
    """
    if target <= 0 or not low < high:
        raise UserError(f"target={target} must be positive, and low={low} below high={high}.")
    ends = jnp.asarray(target), jnp.asarray(low), jnp.asarray(high)
    return _matched(model, tokens, steering, mask, *ends, steps, tolerance)


@eqx.filter_jit
def _matched(
    model: PyTree,
    tokens: Array,
    steering: Steering,
    mask: Array | None,
    target: Array,
    low: Array,
    high: Array,
    steps: int,
    tolerance: float,
) -> Strength:
    log_q = jax.nn.log_softmax(run(model, tokens, mask=mask, keep=()).logits[:, -1])

    def divergence(alpha: Array) -> Array:
        log_p = jax.nn.log_softmax(run(model, tokens, edits=steering(alpha), mask=mask, keep=()).logits[:, -1])
        return jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1))

    return solve_strength(divergence, target, low=low, high=high, steps=steps, tolerance=tolerance)


def perplexity(
    model: PyTree, rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]
) -> Float[np.ndarray, " rows"]:
    """exp of the mean negative log-likelihood of each row behind its prompt, under the model as it is.

    Rows are padded on the right, which a causal model does not see. NaN of an empty row.

    Raises:
      UserError: rows and prompts differ in number, a prompt is empty, or an id is not in the vocabulary.
    """
    if len(rows) != len(prompts) or not all(len(prompt) for prompt in prompts):
        raise UserError(
            f"{len(rows)} rows behind {len(prompts)} prompts: give a prompt of at least one token for each."
        )
    width = max((len(prompt) + len(row) for prompt, row in zip(prompts, rows, strict=True)), default=0)
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(prompt) + len(row)] = [*prompt, *row]
        check_ids(model, tokens, "rows")
        found.append(
            float(_perplexity(model, jnp.asarray(tokens), *map(jnp.asarray, (len(prompt), len(row)))))
            if len(row)
            else np.nan
        )
    return np.asarray(found)


@eqx.filter_jit
def _perplexity(model: PyTree, tokens: Array, start: Array, count: Array) -> Array:
    log_p = jax.nn.log_softmax(run(model, tokens, keep=()).logits[0, :-1])
    nll = -jnp.take_along_axis(log_p, tokens[0, 1:, None], axis=-1)[:, 0]
    place = jnp.arange(1, tokens.shape[1])
    return jnp.exp(jnp.sum(jnp.where((place >= start) & (place < start + count), nll, 0)) / count)


def steering_rows(
    subject: Subject,
    directions: Mapping[tuple[str, str], Float[Array | np.ndarray, " d"] | Steering],
    contexts: Sequence[str],
    concept: Sequence[int],
    *,
    targets: Sequence[float] = (0.1, 0.5),
    high: float = 100.0,
    steps: int = 20,
    words: int = 0,
) -> list[dict[str, Json]]:
    """A row for every (site, direction), target and context: the table that a claim about steering needs.

    Args:
      directions: by (site, name): a direction that is added at the site, or a `Steering` (the site is then a label).
      contexts: texts; padded on the left to one length.
      concept: token ids whose probability is the concept mass.
      targets: of the mean KL over contexts, nats.
      words: tokens to generate for fluency; 0: none.
    Returns:
      dicts with site, direction, target, context, alpha, converged, and the fields of `Outcome`; `fluency` and `text`
      where words > 0.
    Raises:
      UserError: no context, no concept token, or no direction; or a token id that is not in the vocabulary.
    """
    if not contexts or not len(concept) or not directions:
        raise UserError("contexts, concept and directions must not be empty.")
    tokens, mask = padded([subject.ids(text) for text in contexts])
    wanted = jnp.asarray(concept, jnp.int32)
    check_ids(subject.model, wanted, "concept")
    outcome = eqx.filter_jit(next_token_outcome)
    rows: list[dict[str, Json]] = []
    for (site, name), given in directions.items():
        steering: Steering
        if isinstance(given, jax.Array | np.ndarray):
            check_site(subject.model, site)
            steering = Along(site, jnp.asarray(given))
        else:
            steering = given
        for target in targets:
            found = matched_steering(subject.model, tokens, steering, target, mask=mask, high=high, steps=steps)
            edits = dict(steering(found.value))
            columns = outcome(subject.model, tokens, edits, wanted, mask)
            extra: list[dict[str, Json]] = [{} for _ in contexts]
            if words:
                out = generate(subject, list(contexts), max_tokens=words, edits=edits)
                fluent = perplexity(subject.model, out.tokens, out.prompts)
                extra = [{"fluency": float(p), "text": text} for p, text in zip(fluent, out.texts, strict=True)]
            for place, context in enumerate(contexts):
                cell = {field: float(value[place]) for field, value in columns._asdict().items()}
                rows.append(
                    {
                        "site": site,
                        "direction": name,
                        "target": target,
                        "context": context,
                        "alpha": float(found.value),
                        "converged": bool(found.converged),
                        **cell,
                        **extra[place],
                    }
                )
    return rows


def fragility(rows: Sequence[Mapping[str, Json]]) -> list[dict[str, Json]]:
    """By direction: over all cells, the gain in concept mass: mean, lowest, highest, share of cells where it is > 0."""
    names = dict.fromkeys(row["direction"] for row in rows)
    summary = []
    for name in names:
        gains = np.asarray([row["concept"] - row["concept_before"] for row in rows if row["direction"] == name])
        met = np.mean([row["converged"] for row in rows if row["direction"] == name])
        summary.append(
            {
                "direction": name,
                "cells": len(gains),
                "gain": float(gains.mean()),
                "lowest": float(gains.min()),
                "highest": float(gains.max()),
                "share_above_0": float((gains > 0).mean()),
                "converged": float(met),
            }
        )
    return summary


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Rows of ids padded with 0 on the left, and the mask that is False there."""
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for place, row in enumerate(rows):
        tokens[place, width - len(row) :] = row
        mask[place, width - len(row) :] = True
    return jnp.asarray(tokens), jnp.asarray(mask)
