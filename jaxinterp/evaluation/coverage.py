"""Coverage: how well single neurons detect given properties, and how many neurons a token uses.

    F1(f, t; g) of the classifier 1[a_f > t max a_f] for the property g        t in {0, .1, ..., .9}
    coverage = mean over properties g of the largest F1 over neurons f and thresholds t
    used     = (sum |a|)^2 / sum a^2 per token: n for n neurons that are equally active, whatever the activation

A neuron that is always active has F1 = 2 r / (1 + r) for a property of base rate r.

Source: Karvonen et al. 2024 (arXiv 2408.00113), as MoE-X (arXiv 2503.07639) uses it; `used` is a participation ratio.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

THRESHOLDS = tuple(number / 10 for number in range(10))


def f1_of_neurons(
    activations: Float[Array, "tokens neurons"], properties: Bool[Array, "tokens properties"], threshold: float
) -> Float[Array, "neurons properties"]:
    """F1 of 1[a_f > threshold * max a_f] for every neuron and property; 0 where both never hold."""
    fires = (activations > threshold * jnp.max(activations, axis=0)).astype(jnp.float32)
    holds = properties.astype(jnp.float32)
    hits = fires.T @ holds
    total = jnp.sum(fires, axis=0)[:, None] + jnp.sum(holds, axis=0)
    return jnp.where(total > 0, 2 * hits / jnp.maximum(total, 1), 0)


@jax.jit
def coverage(
    activations: Float[Array, "tokens neurons"], properties: Bool[Array, "tokens properties"]
) -> Float[Array, ""]:
    """The coverage of the module's equation. Properties that hold for no token count 0."""
    best = jnp.zeros(properties.shape[1])
    for threshold in THRESHOLDS:
        best = jnp.maximum(best, jnp.max(f1_of_neurons(activations, properties, threshold), axis=0))
    return jnp.mean(best)


def used(activations: Float[Array, "*axes neurons"]) -> Float[Array, "*axes"]:
    """How many neurons a token uses; 0 where none is active."""
    squares = jnp.sum(activations**2, axis=-1)
    return jnp.where(squares > 0, jnp.sum(jnp.abs(activations), axis=-1) ** 2 / jnp.maximum(squares, 1e-30), 0)
