"""Principal components of what a leaf writes: the k directions of largest variance.

y ≈ mean + (y - mean) V^T V,    V: the k leading eigenvectors of Cov(y), as rows
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.plain import PrincipalComponents
from jaxinterp.methods.checks import check_whole, one_array
from jaxinterp.methods.recipes import streaming_method
from jaxinterp.methods.solved.moments import OfSites, Sums, covariance, narrow, of_sites, product


@dataclass(frozen=True)
class PrincipalComponentsMethod:
    """The k directions of largest variance of an array, and its mean.

    Attributes:
      k: how many; at most the array's width is used.
      array: of the leaf; `site` may name an array of the model instead.
    """

    k: int = 32
    array: str = "out"

    def __post_init__(self) -> None:
        """Raises UserError if k is not a positive whole number."""
        check_whole(self, k=1)

    def needs(self, site: Site) -> Sites:
        """The array itself."""
        name = one_array(site, self.array)
        return Sites(name, name)

    def recipe(self, steps: int) -> Recipe:
        """Moments over the stream, then eigenvectors in float64."""
        return streaming_method(_zero, _moments, self._solve, start=of_sites)

    def _solve(self, given: OfSites, sums: Sums) -> PrincipalComponents:
        mean = sums["y"] / float(sums["count"])
        _, vectors = np.linalg.eigh(covariance(sums["yy"] / float(sums["count"]), mean, mean))  # ascending
        return PrincipalComponents(narrow(vectors[:, ::-1][:, : self.k].T), narrow(mean), given.sites)


def _zero(sample: Batch) -> dict[str, Array]:
    d = sample.targets.shape[1]
    shapes: dict[str, tuple[int, ...]] = {"count": (), "y": (d,), "yy": (d, d)}
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def _moments(given: OfSites, batch: Batch, key: Array, model: PyTree) -> dict[str, Array]:
    y, w = batch.targets.astype(jnp.float32), batch.weight
    return {"count": jnp.sum(w), "y": w @ y, "yy": product(w, y, y)}
