"""Matryoshka sparse autoencoder: nested dictionaries in one, general features first.

    z = BatchTopK(y' E^T + b_E) over the whole dictionary,   y' = (y - mean) / s
    x̂_i = s (sum over j <= m_i of z_j D_j + b_D) + mean,   |D_j| = 1
    loss = 1/g sum_i |y - x̂_i|^2 / V  [+ AuxK on the residual of the whole]

y [tokens, d]; E, D [features, d]; prefixes m_1 < ... < m_g = features; V the target's variance. Features of the first
prefix take part in every x̂_i and so must explain as much as so few can; the later ones are free to specialise.

Defaults: prefixes of 1/16, 1/8, 1/4, 1/2 and all of the features (groups of m / 16, m / 16, m / 8, m / 4, m / 2);
k = 32; Adam at 1e-3 (published runs: 3e-4 at 36,864 features). The loss is the plain mean over prefixes:
dictionary_learning's code weighs each by 1/g and then takes the mean, and matryoshka_sae's counts the bias alone as one
more prefix; both only rescale it against AuxK, the latter by a part that no code changes.

Source: Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547; activation from arXiv 2412.06410.
"""

from dataclasses import dataclass
from typing import Literal

from jaxinterp.core.errors import UserError
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
from jaxinterp.objectives import Objective, total
from jaxinterp.objectives.matryoshka import check_sizes, prefixes


@dataclass(frozen=True)
class MatryoshkaSparseAutoencoder(DictionaryFields):
    """Hyperparameters of a Matryoshka sparse autoencoder."""

    activation: Chosen = "batch_topk"
    """BatchTopK, over all features at once; any other activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""
    prefixes: tuple[int, ...] | None = None
    """Rising sizes of the nested dictionaries, the last one `features`; None: 1/16, 1/8, 1/4, 1/2 and all of it."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_choice(self.activation, self.k, self.l1, self)
        check_not_negative(self, "l1", "auxk")
        check_one_of(self, "array", ("out", "hidden", "in"))
        check_sizes(self.sizes)
        if self.sizes[-1] != self.features:
            raise UserError(f"prefixes={self.sizes} must end with features={self.features}.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the nested dictionaries."""
        if self.prefixes is not None:
            return self.prefixes
        return tuple(sorted({max(1, self.features // part) for part in (16, 8, 4, 2, 1)}))

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
        """prefixes + l1 * L1 + auxk * AuxK; or the objective that was given."""
        return self.objective or total(prefixes(*self.sizes), *l1_of(self.l1), *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return autoencoder_recipe(self.make_activation(), self.make_objective(), self, steps)
