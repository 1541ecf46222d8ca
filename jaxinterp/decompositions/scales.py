"""The means and scales that a decomposition is trained in: part of it, and never trained.

    x' = (x - input_mean) / input_scale,   y = output_scale y' + output_mean

Scales make the mean variance of a dimension 1. `target_mean` and `target_variance` describe the target over the
training sample and take no part in the equations.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float


class Scales(eqx.Module):
    """Means and scales of what is read and written; mark the field that holds them as STATE."""

    input_mean: Float[Array, " d_in"]
    input_scale: Float[Array, ""]
    output_mean: Float[Array, " d_out"]
    output_scale: Float[Array, ""]

    def normalise(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_in"]:
        """x', in float32 (float64 for float64)."""
        return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) - self.input_mean) / self.input_scale

    def restore(self, y: Float[Array, "*axes d_out"]) -> Float[Array, "*axes d_out"]:
        """y of y'."""
        return self.output_scale * y + self.output_mean


def moments(
    rows: Float[Array, "tokens d"], weight: Float[Array, " tokens"]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """The weighted mean of the rows, and their mean squared distance from it; 1 where that is 0."""
    count = jnp.maximum(jnp.sum(weight), 1.0)
    mean = weight @ rows / count
    variance = jnp.sum(weight @ (rows - mean) ** 2) / count
    return mean, jnp.where(variance > 0, variance, 1.0)


def scales_of(
    x: Float[Array, "tokens d_in"], y: Float[Array, "tokens d_out"], weight: Float[Array, " tokens"]
) -> Scales:
    """Means and scales of a sample."""
    input_mean, input_variance = moments(x, weight)
    output_mean, output_variance = moments(y, weight)
    return Scales(
        input_mean,
        jnp.sqrt(input_variance / x.shape[1]),
        output_mean,
        jnp.sqrt(output_variance / y.shape[1]),
    )
