"""Discrete codes: one small sparse autoencoder for the contributions of all heads, whose strongest feature is the code.

    x ≈ s (f D + b_D) + mean,   f = relu((x - mean) E^T / s + b_E),   |D_j| = 1,   c = argmax_j f_j
    loss = |x - x̂|^2 / V + λ sum_j f_j,   over all rows at once

x [examples * heads, d_model]; E, D [features, d_model]; c [examples, heads]. A row whose features are all silent has
the code 0. Prompts have no labels here: what the codes say of two kinds of prompts is for
`jaxinterp.evaluation.attention.discrete_codes` to read off.

Defaults: 200 features, λ = 0.02, Adam at 1e-3, 500 steps, 10 examples to train on, as published. Two differences: x is
centred and scaled as a whole, so that |x - x̂|^2 / V is the published mean square; only write vectors have length 1.

Source: O'Neill and Bui 2024, arXiv 2405.12522; defaults from the authors' code.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.core.batch import Batch, Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.recipes import one_pass
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder

SITE = Sites("heads", "heads")


@dataclass(frozen=True)
class DiscreteCodes:
    """Hyperparameters of the codes. The rows are prompts and heads, not tokens, so that `train` stands for `fit`."""

    features: int = 200
    """How many codes there are."""
    l1: float = 0.02
    """Coefficient of the L1 penalty on codes."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam: linear warm-up over the first 5 percent, linear decay over the last half."""
    steps: int = 500
    """Training steps, each on all rows."""
    training_examples: int = 10
    """How many examples, drawn at random, to train on."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter is invalid."""
        self.autoencoder()
        for name in ("steps", "training_examples"):
            if vars(self)[name] < 1:
                raise UserError(f"{name}={vars(self)[name]} must be at least 1.")

    def autoencoder(self) -> SparseAutoencoder:
        """The sparse autoencoder that is trained."""
        return SparseAutoencoder(
            features=self.features, activation="relu", l1=self.l1, auxk=0.0, learning_rate=self.learning_rate
        )

    def train(self, contributions: Float[Array, "examples heads d_model"], key: PRNGKeyArray) -> Dictionary:
        """The dictionary of these contributions, trained in one program.

        Raises:
          UserError: there are fewer examples than it is to train on.
        """
        examples = contributions.shape[0]
        if examples < self.training_examples:
            raise UserError(f"training_examples={self.training_examples} exceeds the {examples} examples given.")
        chosen_key, start_key = jax.random.split(key)
        chosen = jax.random.permutation(chosen_key, examples)[: self.training_examples]
        return _train(self, contributions[chosen].reshape(-1, contributions.shape[-1]), start_key)


def codes_of(
    dictionary: Dictionary, contributions: Float[Array, "examples heads d_model"]
) -> Int[Array, "examples heads"]:
    """c = argmax_j f_j for every example and head."""
    return jnp.argmax(dictionary.encode(contributions).dense(), axis=-1)


@eqx.filter_jit
def _train(hyper: DiscreteCodes, rows: Float[Array, "tokens d_model"], key: PRNGKeyArray) -> Dictionary:
    recipe = one_pass(hyper.autoencoder(), hyper.steps)

    def batch(step: Int[Array, ""] | int) -> Batch:
        return make_batch({"heads": rows}, jnp.ones(len(rows), jnp.float32), SITE, step=step)

    def body(state: object, step: Array) -> tuple[object, None]:
        return recipe.step(state, batch(step), jax.random.fold_in(key, step), None)[0], None

    start = recipe.init(key, batch(0), None)
    trained: Dictionary = recipe.finish(jax.lax.scan(body, start, jnp.arange(hyper.steps))[0])
    return trained
