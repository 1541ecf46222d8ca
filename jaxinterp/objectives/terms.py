"""The terms that sparse dictionaries are trained with.

Reconstruction is divided by a constant, the target's variance, so that it means the same for every site and model. L1
is in the units of the codes (normalised inputs have length sqrt(d)): its coefficient depends on d.

With target y, output ŷ, token weights w, V = `decomposition.target_variance` (a constant of the training sample):

    reconstruction   sum_t w_t |y_t - ŷ_t|^2 / (V sum_t w_t)            the fraction of variance unexplained
    l1               sum_t w_t sum_j z_tj |D_j| / sum_t w_t
    auxk             |ê - e|^2 / |e|^2 * min(dead / k_aux, 1),  e = sg(y - ŷ),  ê = z_dead D

Sources: methods as named; AuxK from Gao et al. 2024 (arXiv 2406.04093, appendix A.2), in the one form that neither adds
the bias twice nor starves the encoder: the residual is a constant, no bias is decoded, gradients reach dead encoder
rows, live features get none.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Revivable, Target, Vectors
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term, ratio


def reconstruction() -> Term:
    """Squared error per token over the target's variance; metric `fvu`."""

    def term(decomposition: Target, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        error = jnp.sum((batch.targets - forward.output) ** 2, axis=-1) / decomposition.target_variance
        fvu = ratio(error, batch.weight)
        return fvu.value(), {"fvu": fvu}

    return term


def l1() -> Term:
    """The sum of codes, each times the length of its write vector; metric `l1`."""

    def term(decomposition: Vectors, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        # Not `linalg.norm`, whose gradient at a write vector of zeros (a transcoder's start) is NaN.
        lengths = jnp.sqrt(jnp.sum(decomposition.decoder**2, axis=1) + 1e-12)
        mass = ratio(forward.codes.weighted(lengths), batch.weight)
        return mass.value(), {"l1": mass}

    return term


def auxk(coefficient: float = 1 / 32, *, k: int | None = None, dead_after: int = 10_000_000) -> Term:
    """Dead features learn what the live ones leave over; metric `auxk`.

    Args:
      k: how many dead features a token may use; default: half of d_out.
      dead_after: a feature is dead when it has not fired for this many tokens.
    """

    def term(decomposition: Revivable, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        dead = decomposition.tokens_since_fired > dead_after
        k_aux = min(k or max(batch.targets.shape[1] // 2, 1), decomposition.features)
        residual = jax.lax.stop_gradient((batch.targets - forward.output) / decomposition.output_scale)
        weight = batch.weight[:, None]

        def of_dead(decomposition: Revivable) -> Array:
            helped = decomposition.combine(decomposition.encode_among(batch.inputs, dead, k_aux))
            error = jnp.sum(weight * (helped - residual) ** 2) / (jnp.sum(weight * residual**2) + 1e-12)
            share = jnp.minimum(jnp.sum(dead).astype(jnp.float32) / k_aux, 1.0)
            return (error * share).astype(jnp.float32)

        # The second selection costs an encoder matmul: only where there is a dead feature.
        value = jax.lax.cond(jnp.any(dead), of_dead, lambda _: jnp.zeros((), jnp.float32), decomposition)
        return coefficient * value, {"auxk": Ratio(value, jnp.ones((), jnp.float32))}

    return term
