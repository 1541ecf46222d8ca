"""What the sparse-dictionary methods share: hyperparameters, start values, and what happens after a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxinterp.data.batch import Batch
from jaxinterp.decompositions.activations import Activation, BatchTopK, ReLU, TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.errors import UserError
from jaxinterp.methods.base import MethodState, Recipe, gradient_method, warmup_linear
from jaxinterp.objectives import Metrics, Objective, auxk, l1, reconstruction, scale, total

NEVER = 2**30  # tokens since a feature fired are counted up to about here, far below where int32 wraps


@dataclass(frozen=True)
class DictionaryHyperparameters:
    """The hyperparameters of every sparse dictionary."""

    features: int = 4608
    """Size of the dictionary."""
    activation: Literal["topk", "batch_topk", "relu"] | Activation = "topk"
    """How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off."""
    dead_after: int = 10_000_000
    """A feature is dead when it has not fired for this many tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam: linear warm-up over the first 5 percent, linear decay over the last half."""
    normalise: bool = True
    """Whether inputs and outputs are centred and scaled to unit variance per dimension, on average."""
    objective: Objective | None = None
    """Another objective in place of reconstruction + l1 + auxk: any pure function, by value."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        if self.features < 1:
            raise UserError(f"features={self.features} must be at least 1.")
        if self.activation in ("topk", "batch_topk") and not 1 <= self.k <= self.features:
            raise UserError(f"k={self.k} must lie between 1 and features={self.features}.")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate={self.learning_rate} must be positive.")

    def make_activation(self) -> Activation:
        """The activation as the decomposition holds it."""
        if isinstance(self.activation, str):
            return (
                {"topk": TopK, "batch_topk": BatchTopK}[self.activation](self.k)
                if self.activation != "relu"
                else ReLU()
            )
        return self.activation

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + AuxK, or the objective that was given."""
        if self.objective is not None:
            return self.objective
        terms = [reconstruction()]
        if self.l1:
            terms.append(scale(l1(), self.l1))
        if self.auxk:
            terms.append(auxk(self.auxk, dead_after=self.dead_after))
        return total(*terms)


def dictionary_recipe(
    hyper: DictionaryHyperparameters,
    init: Callable[[PRNGKeyArray, Batch, Any], Any],
    steps: int,
    *,
    unit_norm: bool,
) -> Recipe:
    """Adam on the objective; counters, thresholds and, if asked for, unit write vectors after every step."""
    optimizer = optax.adam(warmup_linear(hyper.learning_rate, steps))
    if unit_norm:
        return gradient_method(init, hyper.make_objective(), optimizer, _count_and_normalise, tangential)
    return gradient_method(init, hyper.make_objective(), optimizer, count)


def empty_dictionary(hyper: DictionaryHyperparameters, sample: Batch, *, skip: bool) -> Dictionary:
    """A dictionary of zeros with the means and scales of a sample; scales make the mean variance per dimension 1."""
    x, y = sample.inputs, sample.targets
    d_in, d_out = x.shape[1], y.shape[1]
    input_mean, input_variance = _moments(x, sample.weight)
    target_mean, target_variance = _moments(y, sample.weight)
    zero, one = jnp.zeros(()), jnp.ones(())
    if hyper.normalise:
        input_scale, output_scale = jnp.sqrt(input_variance / d_in), jnp.sqrt(target_variance / d_out)
        output_mean = target_mean
    else:
        input_mean, output_mean = zero * input_mean, zero * target_mean
        input_scale, output_scale = one, one
    return Dictionary(
        encoder=jnp.zeros((hyper.features, d_in)),
        encoder_bias=jnp.zeros(hyper.features),
        decoder=jnp.zeros((hyper.features, d_out)),
        decoder_bias=jnp.zeros(d_out),
        skip=jnp.zeros((d_in, d_out)) if skip else None,
        input_mean=input_mean,
        input_scale=input_scale,
        output_mean=output_mean,
        output_scale=output_scale,
        target_mean=target_mean,
        target_variance=target_variance,
        tokens_since_fired=jnp.zeros(hyper.features, jnp.int32),
        activation=hyper.make_activation(),
        sites=sample.sites,
    )


def count(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """Tokens since each feature fired, and the activation's own state."""
    dictionary = state.decomposition
    since = dictionary.tokens_since_fired
    if "fired" in metrics:
        fired = metrics["fired"]
        longer = jnp.minimum(since, NEVER) + fired.count.astype(jnp.int32)
        since = jnp.where(fired.total > 0, 0, longer)
    activation = dictionary.activation.after_step(metrics, batch.step)
    changed = eqx.tree_at(lambda d: (d.tokens_since_fired, d.activation), dictionary, (since, activation))
    return MethodState(changed, state.optimizer)


def unit_rows(rows: Array) -> Array:
    """Every row divided by its length."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def tangential(dictionary: Any, gradient: Any) -> Any:
    """The gradient without the part that would only lengthen a unit write vector: g_j - (g_j . D_j) D_j."""
    g, rows = gradient.decoder, dictionary.decoder
    along = jnp.sum(g * rows, axis=1, keepdims=True) * rows
    return eqx.tree_at(lambda tree: tree.decoder, gradient, g - along)


def _count_and_normalise(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    counted = count(state, batch, metrics, key)
    unit = eqx.tree_at(lambda d: d.decoder, counted.decomposition, unit_rows(counted.decomposition.decoder))
    return MethodState(unit, counted.optimizer)


def _moments(rows: Array, weight: Array) -> tuple[Array, Array]:
    """The weighted mean of the rows, and their mean squared distance from it."""
    total = jnp.maximum(jnp.sum(weight), 1.0)
    mean = jnp.sum(weight[:, None] * rows, axis=0) / total
    variance = jnp.sum(weight[:, None] * (rows - mean) ** 2) / total
    return mean, jnp.where(variance > 0, variance, 1.0)
