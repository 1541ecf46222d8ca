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
from jaxinterp.decompositions.activations import Activation
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder
from jaxinterp.objectives import Term
from jaxinterp.objectives.matryoshka import check_sizes, prefixes


@dataclass(frozen=True)
class MatryoshkaSparseAutoencoder(SparseAutoencoder):
    """Hyperparameters of a Matryoshka sparse autoencoder."""

    activation: Literal["topk", "batch_topk", "relu"] | Activation = "batch_topk"
    """BatchTopK, over all features at once; any other activation, by value."""
    prefixes: tuple[int, ...] | None = None
    """Rising sizes of the nested dictionaries, the last one `features`; None: 1/16, 1/8, 1/4, 1/2 and all of it."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        super().__post_init__()
        check_sizes(self.sizes)
        if self.sizes[-1] != self.features:
            raise UserError(f"prefixes={self.sizes} must end with features={self.features}.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the nested dictionaries."""
        if self.prefixes is not None:
            return self.prefixes
        return tuple(sorted({max(1, self.features // part) for part in (16, 8, 4, 2, 1)}))

    def terms(self) -> list[Term]:
        """prefixes + l1 * L1."""
        return [prefixes(*self.sizes), *self.l1_term()]
