"""top-AFA sparse autoencoder: as many features as bring the codes' norm nearest to the input's.

    z = max(a, 0) at the k* largest a,   a = y' E^T + b_E,   y' = (y - mean) / s
    k* = argmin_k | |z_1..k| - |y'| |                      the nearest, not the first that exceeds
    y ≈ s (z D + b_D) + mean,   |D_j| = 1
    loss = |y - ŷ|^2 / V + λ mean_t (|z_t| - |y'_t|)^2  [+ AuxK]

y [tokens, d]; E, D [features, d]; V the target's variance, s^2 = V / d: both terms then have the units of the paper, in
which inputs have unit variance per dimension and squared error is a mean over d. Without `normalise` the second term is
multiplied by s^2 d / V, which leaves λ with its meaning. There is no k: λ sets how many features are active.

Defaults: λ = 1/32 (published: 1/128 to 1/16, at 12,288 features of a residual stream of 768; Adam at 3e-4). In language
models it competes with TopK where more features are active than the input has dimensions: an option, not a default.

Differences from the published code: y' is centred about the training mean, in selection and penalty alike (there: about
b_D in the selection, not at all in the penalty); encoder biases are trained (there: none are used); `cap`, for sparse
codes, is ours; the rate's default is 1e-3, with warm-up and decay (there: 3e-4).

Source: Lee et al. 2025, arXiv 2503.24277, and SewoongLee/top-afa-sae (training/sae.py).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.adaptive import TopAFA
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_whole, one_array
from jaxinterp.methods.sparse.dictionary import (
    DictionaryFields,
    autoencoder_recipe,
    auxk_of,
    check_dictionary,
    l1_of,
)
from jaxinterp.objectives import Forward, Metrics, Objective, Term, ratio, reconstruction, scale, total


@dataclass(frozen=True)
class TopAFASparseAutoencoder(DictionaryFields):
    """Hyperparameters of a top-AFA sparse autoencoder."""

    afa: float = 1 / 32
    """λ: the coefficient of the squared difference of norms."""
    cap: int | None = None
    """None: dense codes. A number: sparse codes of at most so many features a token; see the metric `at_cap`."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_not_negative(self, "afa", "l1", "auxk")
        check_one_of(self, "array", ("out", "hidden", "in"))
        check_whole(self, cap=1)

    def needs(self, site: Site) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is not a single leaf.
        """
        name = one_array(site, self.array)
        return Sites(name, name)

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + λ afa + auxk * AuxK; or the objective that was given."""
        return self.objective or total(
            reconstruction(), *l1_of(self.l1), scale(norm_difference(), self.afa), *auxk_of(self.auxk, self)
        )

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return autoencoder_recipe(TopAFA(self.cap), self.make_objective(), self, steps)


def norm_difference() -> Term:
    """mean_t (|z_t| - |x'_t|)^2 s^2 d / V, x' the normalised input; metric `norm_difference`."""

    def term(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        # Not `linalg.norm`, whose gradient where no code is active is NaN.
        codes = jnp.sqrt(jnp.sum(forward.codes.values**2, axis=-1) + 1e-12)
        inputs = decomposition.normalise(batch.inputs)
        unit = decomposition.input_scale**2 * inputs.shape[-1] / decomposition.target_variance
        difference = ratio(unit * (codes - jnp.linalg.norm(inputs.astype(jnp.float32), axis=-1)) ** 2, batch.weight)
        return difference.value(), {"norm_difference": difference}

    return term
