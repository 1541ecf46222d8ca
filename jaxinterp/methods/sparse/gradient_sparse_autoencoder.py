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
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxinterp.core.batch import GRADIENT, Batch, Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.checks import check_not_negative
from jaxinterp.methods.sparse.dictionary import dictionary_recipe
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder, start
from jaxinterp.objectives import Forward, Metrics, Term, ratio


@dataclass(frozen=True)
class GradientSparseAutoencoder(SparseAutoencoder):
    """Hyperparameters of a gradient sparse autoencoder; its activation is TopK."""

    own: float = 1.0
    """How much a feature's activation counts by itself: 0 selects by effect alone."""
    strength: float = 1.0
    """How much its effect counts."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        super().__post_init__()
        if self.activation != "topk" and not isinstance(self.activation, TopK):
            raise UserError(f"activation={self.activation!r} does not select by a score: leave it 'topk'.")
        check_not_negative(self, "own", "strength")
        if self.own == self.strength == 0:
            raise UserError("own=0 and strength=0 leave nothing to choose by: one of them must be positive.")

    def needs(self, site: Any) -> Sites:
        """The array and the gradient of the model's loss by it, read; the array, written."""
        name = super().needs(site).writes
        return Sites((str(name), f"{name}{GRADIENT}"), name)

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return dictionary_recipe(self, lambda key, sample, model: _start(self, key, sample), steps, unit_norm=True)

    def terms(self) -> list[Term]:
        """reconstruction + l1 * L1, and a metric."""
        return [*super().terms(), _effect]


def _start(hyper: GradientSparseAutoencoder, key: PRNGKeyArray, sample: Batch) -> EffectDictionary:
    name = sample.sites.writes
    dictionary = start(hyper, key, replace(sample, sites=Sites(name, name)))
    return EffectDictionary(dictionary, sample.sites, hyper.own, hyper.strength)


def _effect(decomposition: Any, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
    gradient = batch.inputs[1]
    size = jnp.sqrt(jnp.mean(gradient**2, axis=-1))
    change = jnp.abs(jnp.sum(gradient * (forward.output - batch.targets), axis=-1)) / jnp.maximum(size, 1e-30)
    return jnp.zeros((), jnp.float32), {"effect": ratio(change, batch.weight)}
