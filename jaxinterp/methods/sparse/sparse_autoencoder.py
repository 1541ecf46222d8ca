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
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxinterp.core.batch import Batch, Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.checks import check_one_of, one_array
from jaxinterp.methods.sparse.dictionary import (
    DictionaryHyperparameters,
    dictionary_recipe,
    empty_dictionary,
    unit_rows,
)


@dataclass(frozen=True)
class SparseAutoencoder(DictionaryHyperparameters):
    """Hyperparameters of a sparse autoencoder."""

    ARRAYS: ClassVar[tuple[str, ...]] = ("out", "hidden", "in")

    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        super().__post_init__()
        check_one_of(self, "array", self.ARRAYS)

    def needs(self, site: Any) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is no single leaf.
        """
        name = one_array(site, self.array)
        return Sites(name, name)

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return dictionary_recipe(self, lambda key, sample, model: start(self, key, sample), steps, unit_norm=True)


def start(hyper: DictionaryHyperparameters, key: PRNGKeyArray, sample: Batch) -> Dictionary:
    """D random unit rows, E = D, biases 0."""
    dictionary = empty_dictionary(hyper, sample, skip=False)
    rows = unit_rows(jax.random.normal(key, dictionary.decoder.shape, dtype=jnp.float32))
    return eqx.tree_at(lambda d: (d.encoder, d.decoder), dictionary, (rows, rows))
