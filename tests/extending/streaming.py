"""A method that adds moments up over a stream of rows and solves once: `streaming_method`, in two passes."""

from dataclasses import dataclass

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.fields import STATE, STATE_ROWS
from jaxinterp.core.sites import Needs
from jaxinterp.methods.recipes import streaming_method


class Components(eqx.Module):
    """y ≈ mean + z F: rows of F are orthonormal."""

    directions: Float[Array, "features d"] = eqx.field(metadata=STATE_ROWS)
    mean: Float[Array, " d"] = eqx.field(metadata=STATE)


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
            return Components(vectors[:, ::-1][:, : self.features].T, np.asarray(mean))

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
