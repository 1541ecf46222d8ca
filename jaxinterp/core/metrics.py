"""Metrics: sums and counts by name, so that those of batches, steps and shards add exactly."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class Ratio(eqx.Module):
    """A metric in two parts, total and count; its value is total / count. Ratios add part by part."""

    total: Float[Array, "..."]
    count: Float[Array, "..."]

    def value(self) -> Float[Array, "..."]:
        """total / count, 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0.0)


Metrics = dict[str, Ratio]
