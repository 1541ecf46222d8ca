"""One worked example for each lifter whose methods do not follow a gradient."""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.fields import STATE, STATE_ROWS, PerToken
from jaxinterp.core.metrics import number, ratio
from jaxinterp.core.sites import Needs
from jaxinterp.methods.recipes import alternating_method, closed_form, streaming_method


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


@dataclass(frozen=True)
class StreamingPCA:
    """The leading eigenvectors of Cov(y): one pass for the mean, one for the covariance about it."""

    features: int = 4

    def needs(self, site):
        return Needs(f"{site}/out", f"{site}/out")

    def recipe(self, steps):
        def mean_of(given, moments):
            return moments["y"] / moments["count"]

        def parts_of(mean, moments):
            _, vectors = np.linalg.eigh(moments["yy"] / moments["count"])
            return Parts(vectors[:, ::-1][:, : self.features].T, np.asarray(mean))

        def first(given, batch, key, model):
            return {"count": jnp.sum(batch.weight), "y": batch.weight @ batch.targets}

        def second(mean, batch, key, model):
            y = batch.targets - mean
            return {"count": jnp.sum(batch.weight), "yy": (batch.weight[:, None] * y).T @ y}

        def zero(names):
            shapes = lambda d: {"count": (), "y": (d,), "yy": (d, d)}
            return lambda sample: {name: jnp.zeros(shapes(sample.targets.shape[1])[name]) for name in names}

        return (
            streaming_method(zero(("count", "y")), first, mean_of),
            streaming_method(zero(("count", "yy")), second, parts_of),
        )


@dataclass(frozen=True)
class WriteDirections:
    """The right singular vectors of an MLP's W_down, each times its singular value: from the weights alone."""

    layer: int = 0

    def needs(self, site):
        return Needs(rows="none")

    def recipe(self, steps):
        def solve(key, sample, model):
            weight = np.asarray(model.blocks[self.layer].mlp.down_proj.weight, np.float64)
            _, sizes, directions = np.linalg.svd(weight, full_matrices=False)
            return Parts(sizes[:, None] * directions, np.zeros(weight.shape[1]))

        return closed_form(solve)
