"""Gradient sparse autoencoder: TopK whose k features are chosen by activation times effect on the model's loss.

    S = the k features of largest  relu(a_j) (own + strength |D_j . g|),   z = relu(a) on S
    a = (y - mean) E^T / s + b_E,   y ≈ s (z D + b_D) + mean,   |D_j| = 1
    loss = |y - ŷ|^2 / V + l1 sum_j z_j + auxk * AuxK

y, g [tokens, d]; E, D [features, d]; s^2 = V / d. g is the gradient of the model's own next-token loss by y, over its
own root mean square: harvested in the same program as the activations, and data to the objective. The general form of
the choice, and what it falls back to without a gradient, stands in `decompositions/by_effect.py`; start and norms are
those of the TopK autoencoder. Metric `effect`: |g . (ŷ - y)| per token, the first-order change of the loss by the
reconstruction's error.

Defaults: own = strength = 1, k = 32, AuxK at 1/32, Adam at 1e-3. Trained from scratch with a pure effect score (`own`
= 0), a dictionary reconstructs badly: the default is the mixture. The published coefficients are not known to us.

Source: Olmo et al. 2025, arXiv 2411.10397 (score recalled).
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import GRADIENT, Site, Sites
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.methods.checks import check_not_negative, check_one_of, one_array
from jaxinterp.methods.sparse.dictionary import (
    DictionaryFields,
    autoencoder_start,
    auxk_of,
    check_dictionary,
    check_k_of,
    dictionary_recipe,
    l1_of,
)
from jaxinterp.objectives import Forward, Metrics, Objective, ratio, reconstruction, total


@dataclass(frozen=True)
class GradientSparseAutoencoder(DictionaryFields):
    """Hyperparameters of a gradient sparse autoencoder; its activation is TopK."""

    k: int = 32
    """Active features per token."""
    own: float = 1.0
    """How much a feature's activation counts by itself: 0 selects by effect alone."""
    strength: float = 1.0
    """How much its effect counts."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_k_of(self.k, self)
        check_not_negative(self, "own", "strength", "l1", "auxk")
        check_one_of(self, "array", ("out", "hidden", "in"))
        if self.own == self.strength == 0:
            raise UserError("own=0 and strength=0 leave nothing to choose by: one of them must be positive.")

    def needs(self, site: Site) -> Sites:
        """The array and the gradient of the model's loss by it, read; the array, written."""
        name = one_array(site, self.array)
        return Sites((name, f"{name}{GRADIENT}"), name)

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + auxk * AuxK, and the metric `effect`; or the objective that was given."""
        return self.objective or total(reconstruction(), *l1_of(self.l1), _effect, *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""

        def init(key: PRNGKeyArray, sample: Batch, model: PyTree) -> EffectDictionary:
            return _start(self, key, sample)

        return dictionary_recipe(init, self.make_objective(), self, steps, unit_norm=True)


def _start(hyper: GradientSparseAutoencoder, key: PRNGKeyArray, sample: Batch) -> EffectDictionary:
    name = sample.sites.writes
    own = replace(sample, sites=Sites(name, name))
    dictionary = autoencoder_start(hyper, TopK(hyper.k), key, own)
    return EffectDictionary(dictionary, sample.sites, hyper.own, hyper.strength)


def _effect(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
    gradient = batch.inputs[1]
    size = jnp.sqrt(jnp.mean(gradient**2, axis=-1))
    change = jnp.abs(jnp.sum(gradient * (forward.output - batch.targets), axis=-1)) / jnp.maximum(size, 1e-30)
    return jnp.zeros((), jnp.float32), {"effect": ratio(change, batch.weight)}
