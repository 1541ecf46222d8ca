"""A method with a step of its own: multiplicative updates over kept rows, written by `alternating_method`."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.fields import STATE, STATE_ROWS, PerToken
from jaxinterp.core.metrics import number, ratio
from jaxinterp.core.sites import Needs
from jaxinterp.methods.recipes import alternating_method


class Parts(eqx.Module):
    """x ≈ z F + mean: rows of F are parts."""

    parts: Float[Array, "features d"] = eqx.field(metadata=STATE_ROWS)
    mean: Float[Array, " d"] = eqx.field(metadata=STATE)


@dataclass(frozen=True)
class MultiplicativeUpdates:
    """x ≈ Z F, both non-negative: Z <- Z * (X F^T) / (Z F F^T), F <- F * (Z^T X) / (Z^T Z F)  (Lee and Seung 2001)."""

    features: int = 8
    tolerance: float = 0.0

    def needs(self, site):
        return Needs(f"{site}/hidden", f"{site}/hidden", rows="kept")

    def recipe(self, steps):
        def init(key, sample, model):
            code_key, part_key = jax.random.split(key)
            x = sample.inputs
            parts = jax.random.uniform(part_key, (self.features, x.shape[1]), minval=0.1)
            codes = jax.random.uniform(code_key, (x.shape[0], self.features), minval=0.1)
            return Parts(parts, jnp.zeros(x.shape[1])), PerToken(codes)

        def sweep(learned, codes, batch, key, model):
            x, z, f = batch.inputs * batch.weight[:, None], codes.array, learned.parts
            z = z * (x @ f.T) / (z @ (f @ f.T) + 1e-9)
            f = f * (z.T @ x) / (z.T @ z @ f + 1e-9)
            error = ratio(jnp.sum((x - z @ f) ** 2, axis=1), batch.weight)
            metrics = {"error": error, "converged": number(error.value() < self.tolerance)}
            return Parts(f, learned.mean), PerToken(z), metrics

        return alternating_method(init, sweep)
