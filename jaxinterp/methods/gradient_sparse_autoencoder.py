"""Gradient sparse autoencoder: TopK whose k features are chosen by activation times effect on the model's loss.

The equation stands in `decompositions/by_effect.py`; objective, start and norms are those of the TopK autoencoder. The
gradient of the model's own next-token loss is harvested in the same program as the activations, and is data to the
objective. Metric `effect`: |g . (ŷ - y)| per token, the first-order change of the loss by the reconstruction's error,
with g over its own root mean square.

Trained from scratch with a pure effect score (`own` = 0), a dictionary reconstructs badly: the default is the mixture.
Source: Olmo et al. 2025, arXiv 2411.10397 (score recalled).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxinterp.data.batch import Batch, Sites
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.dictionary import DictionaryHyperparameters, dictionary_recipe, empty_dictionary, unit_rows
from jaxinterp.objectives import Forward, Metrics, Objective, auxk, ratio, reconstruction, total


@dataclass(frozen=True)
class GradientSparseAutoencoder(DictionaryHyperparameters):
    """Hyperparameters of a gradient sparse autoencoder; its activation is TopK."""

    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""
    own: float = 1.0
    """How much a feature's activation counts by itself: 0 selects by effect alone."""
    strength: float = 1.0
    """How much its effect counts."""

    def needs(self, site: str) -> Sites:
        """The array and the gradient of the model's loss by it, read; the array, written."""
        name = f"{site}/{self.array}"
        return Sites((name, f"{name}/gradient"), name)

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return dictionary_recipe(self, lambda key, sample, model: _start(self, key, sample), steps, unit_norm=True)

    def make_objective(self) -> Objective:
        """reconstruction + AuxK, or the objective that was given."""
        if self.objective is not None:
            return self.objective
        return total(reconstruction(), _effect, auxk(self.auxk, dead_after=self.dead_after))


def _start(hyper: GradientSparseAutoencoder, key: PRNGKeyArray, sample: Batch) -> EffectDictionary:
    name = sample.sites.writes
    dictionary = empty_dictionary(hyper, replace(sample, sites=Sites(name, name)), skip=False)
    rows = unit_rows(jax.random.normal(key, dictionary.decoder.shape))
    dictionary = eqx.tree_at(lambda d: (d.encoder, d.decoder), dictionary, (rows, rows))
    return EffectDictionary(dictionary, sample.sites, hyper.own, hyper.strength)


def _effect(decomposition: Any, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
    gradient = batch.inputs[1]
    size = jnp.sqrt(jnp.mean(gradient**2, axis=-1))
    change = jnp.abs(jnp.sum(gradient * (forward.output - batch.targets), axis=-1)) / jnp.maximum(size, 1e-30)
    return jnp.zeros(()), {"effect": ratio(change, batch.weight)}
