"""The exact transcoder of a ReLU MLP as a method: closed form, from the weights; the text gives the target's mean."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.exact import exact_transcoder
from jaxinterp.methods.checks import one_leaf
from jaxinterp.methods.recipes import closed_form
from jaxinterp.models.sites import select


@dataclass(frozen=True)
class ExactTranscoder:
    """The dictionary that is a dense ReLU MLP, one feature a neuron: `decompositions.exact`."""

    def needs(self, site: Site) -> Sites:
        """Input and output of the leaf."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Nothing to step."""
        return closed_form(_solve)


def _solve(key: Array, sample: Batch, model: PyTree) -> Dictionary:
    leaf, weight = sample.sites.leaf, sample.weight
    mean = (weight @ sample.targets.astype(jnp.float32)) / jnp.sum(weight)
    return exact_transcoder(select(model, leaf).get(), leaf, target_mean=mean)
