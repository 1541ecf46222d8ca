"""Transcoder: a sparse dictionary that reads what an MLP reads and writes what it writes.

    y ≈ s_out (z D + b_D) + mean_out,   z = activation(x' E^T + b_E),   x' = (x - mean_in) / s_in
    x = the MLP's input (after the norm), y = its output

Start: E uniform in ±1/sqrt(d_in), D = 0, biases 0 (the means of x and y are leaves of the dictionary).

Source: Dunefsky, Chlenski, Nanda 2024 (arXiv 2406.11944) with ReLU and L1; TopK and start values as in EleutherAI's
sparsify. Write vectors are free in length.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from jaxinterp.data.batch import Batch, Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.dictionary import DictionaryHyperparameters, dictionary_recipe, empty_dictionary


@dataclass(frozen=True)
class Transcoder(DictionaryHyperparameters):
    """Hyperparameters of a transcoder."""

    def needs(self, site: str) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{site}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective."""
        return dictionary_recipe(
            self, lambda key, sample, model: start(self, key, sample, skip=False), steps, unit_norm=False
        )


def start(hyper: DictionaryHyperparameters, key: PRNGKeyArray, sample: Batch, *, skip: bool) -> Dictionary:
    """E uniform in ±1/sqrt(d_in), everything else 0."""
    dictionary = empty_dictionary(hyper, sample, skip=skip)
    bound = dictionary.encoder.shape[1] ** -0.5
    encoder = jax.random.uniform(key, dictionary.encoder.shape, minval=-bound, maxval=bound)
    return eqx.tree_at(lambda d: d.encoder, dictionary, encoder)
