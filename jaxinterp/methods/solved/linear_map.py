"""The best linear map from what a leaf reads to what it writes.

y ≈ mean_y + (x - mean_x) A,    A = (Cov(x) + ridge mean(diag Cov(x)) I)^-1 Cov(x, y)
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.plain import LinearMap
from jaxinterp.methods.checks import check_positive, one_leaf
from jaxinterp.methods.recipes import streaming_method
from jaxinterp.methods.solved.moments import OfSites, Sums, covariance, least_squares, narrow, of_sites, product


@dataclass(frozen=True)
class LinearMapMethod:
    """The best linear map from the leaf's input to its output, by least squares with a small ridge.

    Attributes:
      ridge: in units of the mean variance of an input.
    """

    ridge: float = 1e-4

    def __post_init__(self) -> None:
        """Raises UserError if the ridge is not positive."""
        check_positive(self, "ridge")

    def needs(self, site: Site) -> Sites:
        """Input and output of the leaf."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Moments over the stream, then one linear system in float64."""
        return streaming_method(_zero, _moments, self._solve, start=of_sites)

    def _solve(self, given: OfSites, sums: Sums) -> LinearMap:
        count = float(sums["count"])
        mean_x, mean_y = sums["x"] / count, sums["y"] / count
        of_x, across = covariance(sums["xx"] / count, mean_x, mean_x), covariance(sums["xy"] / count, mean_x, mean_y)
        return LinearMap(narrow(least_squares(of_x, across, self.ridge)), narrow(mean_x), narrow(mean_y), given.sites)


def _zero(sample: Batch) -> dict[str, Array]:
    d_in, d_out = sample.inputs.shape[1], sample.targets.shape[1]
    shapes: dict[str, tuple[int, ...]] = {
        "count": (), "x": (d_in,), "y": (d_out,), "xx": (d_in, d_in), "xy": (d_in, d_out),
    }  # fmt: skip
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def _moments(given: OfSites, batch: Batch, key: Array, model: PyTree) -> dict[str, Array]:
    x, y, w = batch.inputs.astype(jnp.float32), batch.targets.astype(jnp.float32), batch.weight
    return {"count": jnp.sum(w), "x": w @ x, "y": w @ y, "xx": product(w, x, x), "xy": product(w, x, y)}
