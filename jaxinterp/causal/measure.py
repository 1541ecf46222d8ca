"""What a causal claim is about: one number a prompt, read from a trace; and how numbers of many prompts are compared.

A *metric* is a callable pytree `metric(trace) -> [batch]`. Prompts must not influence each other's number.

    LogitDifference         logit[answer] - logit[other]                   at one position of every prompt
    LogProbability          log p(answer)
    ProbabilityDifference   sum of p over `good` - sum of p over `bad`     (greater-than: years that are later, and not)
    Divergence              sum_v q(v) (log q(v) - log p(v)), q the reference: KL(q || p), nats

Sources: Wang et al. 2022, arXiv 2211.00593 (logit difference); Hanna et al. 2023, arXiv 2305.00586 (probability
difference).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.models.run import Trace

Metric = Callable[[Trace], Array]
"""A callable pytree from a trace to one number a prompt, [batch]."""


def at_position(
    logits: Float[Array, "batch seq vocab"], position: Int[Array, " batch"] | None
) -> Float[Array, "batch vocab"]:
    """The logits at one position of every prompt; None: the last one."""
    if position is None:
        return logits[:, -1]
    return jnp.take_along_axis(logits, position[:, None, None], axis=1)[:, 0]


def of_ids(values: Float[Array, "batch vocab"], ids: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """The value of one token of every prompt; NaN, which shows, for an id that is not in the vocabulary."""
    known = jnp.where(ids < 0, values.shape[1], ids)
    return values.at[jnp.arange(values.shape[0]), known].get(mode="fill", fill_value=jnp.nan)


class LogitDifference(eqx.Module):
    """logit[answer] - logit[other] at `position` of every prompt (None: the last)."""

    answer: Int[Array, " batch"]
    other: Int[Array, " batch"]
    position: Int[Array, " batch"] | None = None

    def __call__(self, trace: Trace) -> Float[Array, " batch"]:
        logits = at_position(trace.logits, self.position)
        return of_ids(logits, self.answer) - of_ids(logits, self.other)


class LogProbability(eqx.Module):
    """The log probability of `answer` at `position` of every prompt (None: the last), nats."""

    answer: Int[Array, " batch"]
    position: Int[Array, " batch"] | None = None

    def __call__(self, trace: Trace) -> Float[Array, " batch"]:
        log_p = jax.nn.log_softmax(at_position(trace.logits, self.position))
        return of_ids(log_p, self.answer)


class ProbabilityDifference(eqx.Module):
    """The probability of all tokens in `good` minus that of all in `bad`; both are 0/1 over the vocabulary."""

    good: Float[Array, "batch vocab"]
    bad: Float[Array, "batch vocab"]
    position: Int[Array, " batch"] | None = None

    def __call__(self, trace: Trace) -> Float[Array, " batch"]:
        p = jax.nn.softmax(at_position(trace.logits, self.position))
        return jnp.sum(p * (self.good - self.bad), axis=-1)


class Divergence(eqx.Module):
    """KL(reference || answer) at `position` of every prompt, nats. Its gradient vanishes at the reference itself.

    Attributes:
      reference: log probabilities, or logits (they are normalised).
    """

    reference: Float[Array, "batch vocab"]
    position: Int[Array, " batch"] | None = None

    def __call__(self, trace: Trace) -> Float[Array, " batch"]:
        log_q = jax.nn.log_softmax(self.reference)
        log_p = jax.nn.log_softmax(at_position(trace.logits, self.position))
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def normalised(
    value: Float[Array, "*axes"], clean: Float[Array, "*axes"], corrupted: Float[Array, "*axes"]
) -> Float[Array, "*axes"]:
    """(value - corrupted) / (clean - corrupted): 1 for the clean run, 0 for the corrupted one."""
    return (value - corrupted) / (clean - corrupted)


def pearson(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, ""]:
    """Pearson's correlation over all entries, in at least float32; NaN where one of them is constant."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    x, y = x.astype(wide).reshape(-1), y.astype(wide).reshape(-1)
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    return jnp.sum(x * y) / jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))


def spearman(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, ""]:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Array) -> Array:
    values = jnp.sort(x.reshape(-1))
    low, high = jnp.searchsorted(values, x.reshape(-1), side="left"), jnp.searchsorted(values, x.reshape(-1), "right")
    return (low + high).astype(jnp.promote_types(x.dtype, jnp.float32)) / 2
