"""Transcoder: a sparse dictionary that reads what an MLP reads and writes what it writes.

    y ≈ s_out (z D + b_D) + mean_out,   z = activation(x' E^T + b_E),   x' = (x - mean_in) / s_in
    loss = |y - ŷ|^2 / V + l1 sum_j z_j |D_j| + auxk * AuxK,   V = sum over dimensions of the target's variance

x [tokens, d_in] = the MLP's input (after the norm); y [tokens, d_out] = its output; E [features, d_in], D [features,
d_out], z [tokens, features]; s = the root mean variance of a dimension. Write vectors are free in length, so that L1
counts each code with the length of what it writes.

Start: E uniform in ±1/sqrt(d_in), D = 0, biases 0 (the means of x and y are leaves of the dictionary).

Defaults: 4608 features, TopK with k = 32, AuxK at 1/32, Adam at 1e-3. Published: ReLU with an L1 of 1.4e-4 against a
mean square over |y| (no common unit with ours), unit write vectors, ghost gradients, 24,576 features, Adam at 4e-4,
60 million tokens in batches of 4096.

Source: Dunefsky, Chlenski, Nanda 2024 (arXiv 2406.11944) with ReLU and L1; TopK and start values as in EleutherAI's
sparsify.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxinterp.core.batch import Batch, Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.checks import one_leaf
from jaxinterp.methods.sparse.dictionary import DictionaryHyperparameters, dictionary_recipe, empty_dictionary


@dataclass(frozen=True)
class Transcoder(DictionaryHyperparameters):
    """Hyperparameters of a transcoder."""

    SKIP: ClassVar[bool] = False

    def needs(self, site: Any) -> Sites:
        """From the MLP's input to its output.

        Raises:
          UserError: the site is no single leaf.
        """
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective."""
        return dictionary_recipe(
            self, lambda key, sample, model: start(self, key, sample, skip=self.SKIP), steps, unit_norm=False
        )


def start(hyper: DictionaryHyperparameters, key: PRNGKeyArray, sample: Batch, *, skip: bool) -> Dictionary:
    """E uniform in ±1/sqrt(d_in), everything else 0."""
    dictionary = empty_dictionary(hyper, sample, skip=skip)
    bound = dictionary.encoder.shape[1] ** -0.5
    encoder = jax.random.uniform(key, dictionary.encoder.shape, minval=-bound, maxval=bound, dtype=jnp.float32)
    return eqx.tree_at(lambda d: d.encoder, dictionary, encoder)
