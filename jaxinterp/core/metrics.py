"""Metrics: sums and counts, so that those of batches, steps and shards add exactly."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


class Ratio(eqx.Module):
    """A metric in two parts, total and count; its value is total / count. Ratios add part by part."""

    total: Float[Array, "..."]
    count: Float[Array, "..."]

    def value(self) -> Float[Array, "..."]:
        """total / count, 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0.0)


Metrics = dict[str, Ratio]
"""By name. Free but for four names with a meaning:

    loss           checked at every step, if it is there: finite, and not a sudden leap
    fired          per feature: on how many tokens of how many it was active; keeps count of dead features
    smallest_code  BatchTopK's threshold follows it
    converged      a value of 1 or more at a logged step ends the run
"""


def ratio(values: Float[Array, " tokens"], weight: Float[Array, " tokens"]) -> Ratio:
    """The weighted mean of one value a token, as a ratio of sums."""
    return Ratio(jnp.sum(values * weight), jnp.sum(weight))


def number(value: Shaped[Array, ""] | float) -> Ratio:
    """A plain number as a metric: those of several steps are averaged."""
    return Ratio(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))
