"""Coefficients of given features by non-negative least squares: what semi-NMF says about tokens it has not seen.

    y(x) = argmin over y >= 0 of |x - y F|^2

F [features, d] = features, y [tokens, features]. Projected gradient with momentum (Beck and Teboulle's FISTA) on the
features x features Gram matrix of unit rows; a token whose momentum points uphill loses it (O'Donoghue and Candes).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def nonnegative_least_squares(
    rows: Float[Array, "*axes d"], features: Float[Array, "features d"], *, iterations: int = 200
) -> Float[Array, "*axes features"]:
    """y(x) of the module's equation, for every row.

    Args:
      iterations: of projected gradient; the error falls at least with their square. `optimality_gap` measures it.
    Returns:
      Coefficients, exactly 0 where the constraint holds a feature down. A feature of length 0 gets 0.
    """
    lengths = jnp.linalg.norm(features, axis=1)
    unit = features / jnp.where(lengths > 0, lengths, 1)[:, None]
    gram = unit @ unit.T
    step = 1 / jnp.maximum(jnp.max(jnp.sum(jnp.abs(gram), axis=1)), 1)  # no eigenvalue exceeds a row's sum of sizes
    projections = rows @ unit.T

    def once(_: Array, carry: tuple) -> tuple:
        y, ahead, momentum = carry
        new = jnp.maximum(ahead - step * (ahead @ gram - projections), 0)
        uphill = jnp.sum((ahead - new) * (new - y), axis=-1, keepdims=True) > 0
        grown = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        reach = jnp.where(uphill, 0, (momentum - 1) / grown)
        return new, new + reach * (new - y), jnp.where(uphill, 1, grown)

    zero = jnp.zeros_like(projections)
    y, _, _ = jax.lax.fori_loop(0, iterations, once, (zero, zero, jnp.ones_like(projections[..., :1])))
    return y / jnp.where(lengths > 0, lengths, 1)


def optimality_gap(
    rows: Float[Array, "*axes d"], features: Float[Array, "features d"], coefficients: Float[Array, "*axes features"]
) -> Float[Array, "*axes"]:
    """How far coefficients are from optimal, per token and relative to |x|^2: <y, g> - min(0, |x| min_j g_j / |F_j|).

    g = F (y F - x), the gradient. At the optimum y >= 0, g >= 0 and <y, g> = 0, so that the gap is 0.
    """
    gradient = (coefficients @ features - rows) @ features.T
    lengths = jnp.maximum(jnp.linalg.norm(features, axis=1), 1e-30)
    energy = jnp.maximum(jnp.sum(rows**2, axis=-1), 1e-30)
    worst = jnp.minimum(jnp.min(gradient / lengths, axis=-1), 0) * jnp.sqrt(energy)
    return (jnp.abs(jnp.sum(coefficients * gradient, axis=-1)) - worst) / energy
