"""A new objective: reconstruction of the target's direction, not its length."""

import jax.numpy as jnp

from jaxinterp.objectives import ratio, total


def direction():
    def term(decomposition, batch, forward):
        y, guess = (array - decomposition.target_mean for array in (batch.targets, forward.output))
        product = jnp.linalg.norm(y, axis=-1) * jnp.linalg.norm(guess + 1e-6, axis=-1)
        cosine = ratio(jnp.sum(y * guess, axis=-1) / product, batch.weight)
        return 1 - cosine.value(), {"cosine": cosine}

    return term


objective = total(direction())
