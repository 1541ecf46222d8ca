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

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.checks import check_not_negative, one_leaf
from jaxinterp.methods.sparse.dictionary import (
    Chosen,
    DictionaryFields,
    auxk_of,
    check_choice,
    check_dictionary,
    chosen,
    dictionary_recipe,
    empty_dictionary,
    l1_of,
)
from jaxinterp.objectives import Objective, reconstruction, total


@dataclass(frozen=True)
class Transcoder(DictionaryFields):
    """Hyperparameters of a transcoder."""

    activation: Chosen = "topk"
    """How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_choice(self.activation, self.k, self.l1, self)
        check_not_negative(self, "l1", "auxk")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output.

        Raises:
          UserError: the site is not a single leaf.
        """
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def make_activation(self) -> Activation:
        """The activation as the dictionary holds it."""
        return chosen(self.activation, self.k)

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + auxk * AuxK; or the objective that was given."""
        return self.objective or total(reconstruction(), *l1_of(self.l1), *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective."""
        return transcoder_recipe(self.make_activation(), self.make_objective(), self, steps, skip=False)


def transcoder_recipe(
    activation: Activation, objective: Objective, hyper: DictionaryFields, steps: int, *, skip: bool
) -> Recipe:
    """Adam on the objective; write vectors are free in length."""

    def init(key: PRNGKeyArray, sample: Batch, model: PyTree) -> Dictionary:
        return start(hyper, activation, key, sample, skip=skip)

    return dictionary_recipe(init, objective, hyper, steps, unit_norm=False)


def start(
    hyper: DictionaryFields, activation: Activation, key: PRNGKeyArray, sample: Batch, *, skip: bool
) -> Dictionary:
    """E uniform in ±1/sqrt(d_in), everything else 0."""
    dictionary = empty_dictionary(hyper, activation, sample, skip=skip, normalise=hyper.normalise)
    bound = dictionary.encoder.shape[1] ** -0.5
    encoder = jax.random.uniform(key, dictionary.encoder.shape, minval=-bound, maxval=bound, dtype=jnp.float32)
    return eqx.tree_at(lambda d: d.encoder, dictionary, encoder)
