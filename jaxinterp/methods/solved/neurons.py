"""The MLP's own neurons as components: all that is solved for is their mean.

y ≈ mlp.write(mean a) + sum over the k neurons with the largest |a_j - mean_j| |w_j| of (a_j - mean_j) w_j
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.plain import Neurons
from jaxinterp.methods.checks import check_whole, one_leaf
from jaxinterp.methods.recipes import streaming_method
from jaxinterp.methods.solved.moments import Sums, narrow
from jaxinterp.models.mlp import MLP
from jaxinterp.models.sites import select


@dataclass(frozen=True)
class NeuronsMethod:
    """The k neurons of an MLP that matter most for each token, the others at their training mean.

    Attributes:
      k: active neurons per token; at most those of the MLP.
    """

    k: int = 32

    def __post_init__(self) -> None:
        """Raises UserError if k is not a positive whole number."""
        check_whole(self, k=1)

    def needs(self, site: Site) -> Sites:
        """Hidden activations and output, for their means; the decomposition itself reads the leaf's input."""
        return Sites(f"{one_leaf(site)}/hidden", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Means over the stream."""
        return streaming_method(_zero, _moments, self._solve, start=_mlp)

    def _solve(self, given: Neurons, sums: Sums) -> Neurons:
        count = float(sums["count"])
        k = min(self.k, sums["hidden"].shape[0])
        return Neurons(given.mlp, narrow(sums["hidden"] / count), narrow(sums["y"] / count), k, given.sites)


def own_mlp(model: PyTree, leaf: str) -> MLP:
    """The MLP at a leaf.

    Raises:
      UserError: it is not an MLP of this package, whose neurons have write vectors.
    """
    mlp = select(model, leaf).get()
    if not isinstance(mlp, MLP):
        raise UserError(
            f"site={leaf!r} is a {type(mlp).__name__}: the baselines read the neurons of this package's MLPs: load the "
            "same weights with `load`, or score without baselines."
        )
    return mlp


def _mlp(key: Array, sample: Batch, model: PyTree) -> Neurons:
    """The decomposition before its means are known."""
    leaf = sample.sites.leaf
    nothing = _zero(sample)
    return Neurons(own_mlp(model, leaf), nothing["hidden"], nothing["y"], 1, Sites(f"{leaf}/in", f"{leaf}/out"))


def _zero(sample: Batch) -> dict[str, Array]:
    shapes = {"count": (), "hidden": sample.inputs.shape[1:], "y": sample.targets.shape[1:]}
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


def _moments(given: Neurons, batch: Batch, key: Array, model: PyTree) -> dict[str, Array]:
    hidden, y, w = batch.inputs.astype(jnp.float32), batch.targets.astype(jnp.float32), batch.weight
    return {"count": jnp.sum(w), "hidden": w @ hidden, "y": w @ y}
