"""Ghost gradients: dead features learn as if an exponential had made them active.

With r = sg((y - ŷ) / s) the residual in normalised units, a = x' E^T + b_E, and sums over dead features only:

    g_t   = sum_j exp(a_tj) D_j
    ĝ_t   = g_t sg(|r_t| / (2 |g_t|))                       half as long as the residual
    error = sum_t w_t |ĝ_t - r_t|^2 / sum_t w_t |r_t|^2
    ghost = error sg(fvu / error)                           as large as the reconstruction's own loss, whatever it is

y, ŷ [tokens, d_out]; a [tokens, features]; D [features, d_out]; w token weights; sg: no gradient passes. An exponential
has a gradient however far below its threshold a feature is, where a ReLU (and so AuxK) has none; what it pays is a
dense `tokens x features` array and three matrix products, in a branch that is not run while no feature is dead.

Live features, biases of the decoder and paths beside the codes get no gradient at all. As ĝ does not change when all
exp(a_t) are multiplied by one number, the largest a_t of each token is taken off first: nothing overflows. Where g_t is
0 (a transcoder whose write vectors are still 0) it is left as it is.

Source: Anthropic, Circuits Updates January 2024, "Ghost Grads" (recalled), in the form of the code of Dunefsky,
Chlenski, Nanda 2024 (arXiv 2406.11944); theirs compares with x - ŷ even where the target y is another array, and
rescales element by element.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Normalised
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term, ratio


def ghost(coefficient: float = 1.0, *, dead_after: int = 10_000_000) -> Term:
    """Dead features learn what the live ones leave over, through exp(a); metric `ghost`: `error` of the module.

    Args:
      coefficient: of the term, which is otherwise as large as the fraction of variance unexplained (published: 1).
      dead_after: a feature is dead when it has not fired for this many tokens.
    """

    def term(decomposition: Normalised, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        dead = decomposition.tokens_since_fired > dead_after
        residual = jax.lax.stop_gradient((batch.targets - forward.output) / decomposition.output_scale)
        squares = jnp.sum(residual**2, axis=-1)
        fvu = ratio(squares * decomposition.output_scale**2 / decomposition.target_variance, batch.weight).value()

        def of_dead(decomposition: Normalised) -> Array:
            a = decomposition.normalise(batch.inputs) @ decomposition.encoder.T + decomposition.encoder_bias
            a = jnp.where(dead, a, -jnp.inf)
            a = a - jax.lax.stop_gradient(jnp.max(a, axis=-1, keepdims=True))
            g = jnp.exp(a) @ decomposition.decoder
            length = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(g**2, axis=-1)))
            half = jnp.where(length > 0, jnp.sqrt(squares) / (2 * jnp.where(length > 0, length, 1.0)), 1.0)
            gap = ratio(jnp.sum((half[:, None] * g - residual) ** 2, axis=-1), batch.weight)
            return (gap.total / (jnp.sum(batch.weight * squares) + 1e-12)).astype(jnp.float32)

        error = jax.lax.cond(jnp.any(dead), of_dead, lambda _: jnp.zeros((), jnp.float32), decomposition)
        fixed = jax.lax.stop_gradient(error)
        value = error * jnp.where(fixed > 0, fvu / jnp.where(fixed > 0, fixed, 1.0), 0.0)
        return coefficient * value, {"ghost": Ratio(error, jnp.ones((), jnp.float32))}

    return term
