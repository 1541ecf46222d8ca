"""Sparse autoencoder: a sparse dictionary of one array, here the MLP's output, its hidden activations or its input.

    y ≈ s (z D + b_D) + mean,   z = activation((y - mean) E^T / s + b_E),   |D_j| = 1
    loss = |y - ŷ|^2 / V + l1 sum_j z_j + auxk * AuxK,   V = sum over dimensions of the target's variance

y [tokens, d]; E, D [features, d]; z [tokens, features], of which TopK and BatchTopK keep k a token; s^2 = V / d.

Start: rows of D random unit vectors, E = D, biases 0. After every step the rows of D are made unit vectors again, and
the part of their gradient that would only lengthen them is taken out before it.

Defaults: 4608 features, TopK with k = 32, AuxK at 1/32 after 10 million tokens, Adam at 1e-3. Published: TopK with the
bias of D at the geometric median (here: the mean), 1e-4 at 32,768 features and batches of 131,072, a feature dead
after 10 million tokens; BatchTopK 12,288 features, k = 32, 3e-4, batches of 4096; ReLU with L1 3e-4 to 1.2e-3 and a
coefficient that rises over the first steps (here: `scale` with a function of the step, in an objective).

Sources: Bricken et al. 2023 (ReLU, L1); Gao et al. 2024, arXiv 2406.04093 (TopK, AuxK, E = D at the start); Bussmann et
al. 2024, arXiv 2412.06410 (BatchTopK).
"""

from dataclasses import dataclass
from typing import Literal

from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.activations import Activation
from jaxinterp.methods.checks import check_not_negative, check_one_of, one_array
from jaxinterp.methods.sparse.dictionary import (
    Chosen,
    DictionaryFields,
    autoencoder_recipe,
    auxk_of,
    check_choice,
    check_dictionary,
    chosen,
    l1_of,
)
from jaxinterp.objectives import Objective, reconstruction, total


@dataclass(frozen=True)
class SparseAutoencoder(DictionaryFields):
    """Hyperparameters of a sparse autoencoder."""

    activation: Chosen = "topk"
    """How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_choice(self.activation, self.k, self.l1, self)
        check_not_negative(self, "l1", "auxk")
        check_one_of(self, "array", ("out", "hidden", "in"))

    def needs(self, site: Site) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is not a single leaf.
        """
        name = one_array(site, self.array)
        return Sites(name, name)

    def make_activation(self) -> Activation:
        """The activation as the dictionary holds it."""
        return chosen(self.activation, self.k)

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + auxk * AuxK; or the objective that was given."""
        return self.objective or total(reconstruction(), *l1_of(self.l1), *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return autoencoder_recipe(self.make_activation(), self.make_objective(), self, steps)
