"""An objective of one's own: Huber's loss, which a few tokens with huge errors don't rule."""

import jax.numpy as jnp

from jaxinterp.objectives import ratio


def huber(decomposition, batch, key, *, model=None):
    """mean over tokens of sum_i h(e_i),  e = (y - ŷ) / sqrt(V),  h(e) = e^2 / 2 up to |e| = 1, |e| - 1/2 beyond."""
    codes = decomposition.encode(batch.inputs, k=batch.k, weight=batch.weight, training=True)
    error = jnp.abs(batch.targets - decomposition.decode(codes, batch.inputs)) / decomposition.target_variance**0.5
    each = jnp.sum(jnp.where(error < 1, error**2 / 2, error - 0.5), axis=-1)
    loss = ratio(each, batch.weight)
    return loss.value(), {"huber": loss, "l0": ratio(codes.active(), batch.weight)}
