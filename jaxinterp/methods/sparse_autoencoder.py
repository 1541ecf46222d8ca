"""Sparse autoencoder: a sparse dictionary of one array, here the MLP's output or its hidden activations.

    y ≈ s (z D + b_D) + mean,   z = activation((y - mean) E^T / s + b_E),   |D_j| = 1

Start: rows of D random unit vectors, E = D, biases 0. After every step the rows of D are made unit vectors again, and
the part of their gradient that would only lengthen them is taken out before it.

Sources: Bricken et al. 2023 (ReLU, L1); Gao et al. 2024, arXiv 2406.04093 (TopK, AuxK, E = D at the start); Bussmann et
al. 2024, arXiv 2412.06410 (BatchTopK).
"""

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from jaxinterp.data.batch import Batch, Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.dictionary import DictionaryHyperparameters, dictionary_recipe, empty_dictionary, unit_rows


@dataclass(frozen=True)
class SparseAutoencoder(DictionaryHyperparameters):
    """Hyperparameters of a sparse autoencoder."""

    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""

    def needs(self, site: str) -> Sites:
        """The same array, read and written."""
        return Sites(f"{site}/{self.array}", f"{site}/{self.array}")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return dictionary_recipe(self, lambda key, sample, model: _start(self, key, sample), steps, unit_norm=True)


def _start(hyper: DictionaryHyperparameters, key: PRNGKeyArray, sample: Batch) -> Dictionary:
    dictionary = empty_dictionary(hyper, sample, skip=False)
    rows = unit_rows(jax.random.normal(key, dictionary.decoder.shape))
    return eqx.tree_at(lambda d: (d.encoder, d.decoder), dictionary, (rows, rows))
