"""What an objective is, and how terms make one.

An objective is a pure function `(decomposition, batch, key, *, model=None) -> (loss, metrics)` on whole arrays: no axis
names, no psum, no mesh. A term is `(decomposition, batch, forward) -> (value, metrics)`; `forward` holds the codes and
the output, which are computed once however many terms there are: a compiler does not merge the backward passes of two
encoders.

Metrics are sums and counts, so that those of batches, steps and shards add exactly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.metrics import Metrics, Ratio, ratio
from jaxinterp.core.protocols import Forward, Objective, Term
from jaxinterp.objectives.check import apply_term, check_term

__all__ = ["Forward", "Metrics", "Objective", "Ratio", "Term", "ratio", "scale", "total"]


def total(*terms: Term) -> Objective:
    """The objective that encodes and decodes once and adds the terms up.

    Its metrics are those of the terms, and `l0` (active features per token), `fired` (per feature: the
    fraction of tokens that it is active on), `smallest_code` (the smallest that is active) and, of codes with a cap,
    `at_cap` (the fraction of tokens that reached it).

    Raises:
      UserError: at once where something is not a term; when it is traced where a term does not return (value, metrics).
    """
    for term in terms:
        check_term(term)

    def objective(
        decomposition: PyTree, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
    ) -> tuple[Float[Array, ""], Metrics]:
        codes = decomposition.encode(batch.inputs, k=batch.k, weight=batch.weight, training=True)
        forward = Forward(codes, decomposition.decode(codes, batch.inputs), key, model)
        loss = jnp.zeros((), jnp.float32)
        count = jnp.sum(batch.weight)
        metrics: Metrics = {
            "l0": ratio(codes.active(), batch.weight),
            "fired": Ratio(codes.fired(batch.weight), jnp.broadcast_to(count, (codes.features,))),
            "smallest_code": Ratio(codes.smallest(), jnp.ones((), jnp.float32)),
        }
        if codes.capped:
            metrics["at_cap"] = ratio(codes.at_cap(), batch.weight)
        for term in terms:
            value, more = apply_term(term, decomposition, batch, forward)
            loss, metrics = loss + value, metrics | more
        return loss, jax.lax.stop_gradient(metrics)

    return objective


def scale(term: Term, coefficient: float | str | Callable[[Array], Array]) -> Term:
    """The term times a coefficient: a number, a function of the training step, or a name in `batch.coefficients`.

    Raises:
      UserError: at once where `term` is not a term; when it is traced: there is no coefficient of that name.
    """
    check_term(term)

    def scaled(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        value, metrics = apply_term(term, decomposition, batch, forward)
        if isinstance(coefficient, str):
            if coefficient not in batch.coefficients:
                raise UserError(
                    f"scale(..., {coefficient!r}): the batch has no coefficient of that name. Give fit a schedule, "
                    f"schedules={{{coefficient!r}: lambda step: ...}}.{suggest(coefficient, batch.coefficients)}"
                )
            return batch.coefficients[coefficient] * value, metrics
        return (coefficient(batch.step) if callable(coefficient) else coefficient) * value, metrics

    return scaled
