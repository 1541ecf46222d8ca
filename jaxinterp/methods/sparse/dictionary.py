"""What the sparse-dictionary methods share: hyperparameters, start values, and what happens after a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.decompositions.activations import Activation, BatchTopK, ReLU, TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.checks import check_one_of, check_positive, check_whole
from jaxinterp.methods.recipes import gradient_method, warmup_linear
from jaxinterp.objectives import Metrics, Objective, Term, auxk, l1, scale

NEVER = 2**30  # tokens since a feature fired are counted up to about here, far below where int32 wraps


@dataclass(frozen=True)
class TrainingFields:
    """The hyperparameters that every sparse dictionary has. Fields only: what a method does is in its own file."""

    features: int = 4608
    """Size of the dictionary."""
    dead_after: int = 10_000_000
    """A feature is dead when it has not fired for this many tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam: linear warm-up over the first 5 percent, linear decay over the last half."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What Adam's first moment is kept in. (The second moves by a thousandth a step, which bfloat16 cannot hold.)"""
    objective: Objective | None = None
    """Another objective in place of the method's own terms and AuxK: any pure function, by value."""


@dataclass(frozen=True)
class DictionaryFields(TrainingFields):
    """Those of a dictionary whose inputs may have any scale. Fields only."""

    normalise: bool = True
    """Whether inputs and outputs are centred and scaled to unit variance per dimension, on average."""


Chosen = Literal["topk", "batch_topk", "relu"] | Activation
"""How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""


def check_dictionary(hyper: TrainingFields) -> None:
    """Raises UserError if one of the shared hyperparameters has a value that makes no sense."""
    check_whole(hyper, features=1, dead_after=0)
    check_positive(hyper, "learning_rate")
    check_one_of(hyper, "moments", ("float32", "bfloat16"))


def check_choice(activation: Chosen, k: int, l1: float, hyper: TrainingFields) -> None:
    """Raises UserError if the activation is an unknown word, k is out of range, or nothing makes the codes sparse."""
    if not isinstance(activation, str):
        return
    check_one_of(
        hyper, "activation", ("topk", "batch_topk", "relu"), "; pass any other by value, such as JumpReLU.start(...)"
    )
    if activation != "relu":
        check_k_of(k, hyper)
    elif l1 == 0 and hyper.objective is None:
        raise UserError(
            "l1=0.0 with activation='relu' makes nothing sparse: give l1 a coefficient (0.01, say), or an "
            "objective of your own that does."
        )


def check_k_of(k: int, hyper: TrainingFields) -> None:
    """Raises UserError if k is not a whole number between 1 and the number of features."""
    check_whole(hyper, k=1)
    if k > hyper.features:
        raise UserError(f"k={k} must lie between 1 and features={hyper.features}.")


def chosen(activation: Chosen, k: int) -> Activation:
    """The activation as the decomposition holds it."""
    if not isinstance(activation, str):
        return activation
    if activation == "relu":
        return ReLU()
    return TopK(k) if activation == "topk" else BatchTopK(k)


def adam(hyper: TrainingFields, steps: int) -> optax.GradientTransformation:
    """Adam, for a run of so many steps."""
    return optax.adam(warmup_linear(hyper.learning_rate, steps), mu_dtype=hyper.moments)


def l1_of(coefficient: float) -> list[Term]:
    """coefficient * L1, if there is a coefficient."""
    return [scale(l1(), coefficient)] if coefficient else []


def auxk_of(coefficient: float, hyper: TrainingFields) -> list[Term]:
    """coefficient * AuxK, if there is a coefficient."""
    return [auxk(coefficient, dead_after=hyper.dead_after)] if coefficient else []


def dictionary_recipe(
    init: Callable[..., PyTree],
    objective: Objective,
    hyper: TrainingFields,
    steps: int,
    *,
    unit_norm: bool,
) -> Recipe:
    """Adam on the objective; counters, thresholds and, if asked for, unit write vectors after every step."""
    if unit_norm:
        return gradient_method(init, objective, adam(hyper, steps), count_and_normalise, tangential)
    return gradient_method(init, objective, adam(hyper, steps), count)


def autoencoder_recipe(activation: Activation, objective: Objective, hyper: DictionaryFields, steps: int) -> Recipe:
    """`dictionary_recipe` of a plain autoencoder: D random unit rows, E = D, unit write vectors."""

    def init(key: PRNGKeyArray, sample: Batch, model: PyTree) -> Dictionary:
        return autoencoder_start(hyper, activation, key, sample)

    return dictionary_recipe(init, objective, hyper, steps, unit_norm=True)


def autoencoder_start(hyper: DictionaryFields, activation: Activation, key: PRNGKeyArray, sample: Batch) -> Dictionary:
    """D random unit rows, E = D, biases 0."""
    dictionary = empty_dictionary(hyper, activation, sample, skip=False, normalise=hyper.normalise)
    rows = unit_rows(jax.random.normal(key, dictionary.decoder.shape, dtype=jnp.float32))
    return eqx.tree_at(lambda d: (d.encoder, d.decoder), dictionary, (rows, rows))


def empty_dictionary(
    hyper: TrainingFields, activation: Activation, sample: Batch, *, skip: bool, normalise: bool
) -> Dictionary:
    """A dictionary of zeros with the means and scales of a sample; scales make the mean variance per dimension 1."""
    x, y = sample.inputs, sample.targets
    d_in, d_out = x.shape[1], y.shape[1]
    input_mean, input_variance = _moments(x, sample.weight)
    target_mean, target_variance = _moments(y, sample.weight)
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    if normalise:
        input_scale, output_scale = jnp.sqrt(input_variance / d_in), jnp.sqrt(target_variance / d_out)
        output_mean = target_mean
    else:
        input_mean, output_mean = zero * input_mean, zero * target_mean
        input_scale, output_scale = one, one
    return Dictionary(
        encoder=jnp.zeros((hyper.features, d_in), jnp.float32),
        encoder_bias=jnp.zeros(hyper.features, jnp.float32),
        decoder=jnp.zeros((hyper.features, d_out), jnp.float32),
        decoder_bias=jnp.zeros(d_out, jnp.float32),
        skip=jnp.zeros((d_in, d_out), jnp.float32) if skip else None,
        input_mean=input_mean,
        input_scale=input_scale,
        output_mean=output_mean,
        output_scale=output_scale,
        target_mean=target_mean,
        target_variance=target_variance,
        tokens_since_fired=jnp.zeros(hyper.features, jnp.int32),
        activation=activation,
        sites=sample.sites,
    )


def count(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """Tokens since each feature fired, and the activation's own state."""
    dictionary = state.decomposition
    since = since_fired(dictionary.tokens_since_fired, metrics)
    activation = dictionary.activation.after_step(metrics, batch.step)
    changed = eqx.tree_at(lambda d: (d.tokens_since_fired, d.activation), dictionary, (since, activation))
    return MethodState(changed, state.optimizer, state.aux)


def since_fired(since: Array, metrics: Metrics) -> Array:
    """The counters of tokens since each feature fired, after a batch with these metrics.

    Raises:
      UserError: the metrics do not say what fired, but those of a term for dead features are among them.
    """
    if "fired" in metrics:
        fired = metrics["fired"]
        return jnp.where(fired.total > 0, 0, jnp.minimum(since, NEVER) + fired.count.astype(jnp.int32))
    for term in ("auxk", "ghost"):
        if term in metrics:
            raise UserError(
                f"without the metric 'fired' no feature is ever dead, and {term} never acts: let the objective return "
                "the metrics of total(...) too."
            )
    return since


def unit_rows(rows: Array) -> Array:
    """Every row divided by its length."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def tangential(dictionary: PyTree, gradient: PyTree) -> PyTree:
    """The gradient without the part that would only lengthen a unit write vector: g_j - (g_j . D_j) D_j."""
    g, rows = gradient.decoder, dictionary.decoder
    # Kept apart from the rest, which Adam's update then computes as it reads: no matrix is written for it.
    along = jax.lax.optimization_barrier(jnp.sum(g * rows, axis=1, keepdims=True))
    return eqx.tree_at(lambda tree: tree.decoder, gradient, g - along * rows)


def count_and_normalise(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """`count`, and write vectors of length 1: D_j / |D_j|."""
    counted = count(state, batch, metrics, key)
    # Kept apart from Adam's update, which the norms would compute a second time, one factor of it as a whole matrix.
    decoder = jax.lax.optimization_barrier(counted.decomposition.decoder)
    unit = eqx.tree_at(lambda d: d.decoder, counted.decomposition, unit_rows(decoder))
    return MethodState(unit, counted.optimizer, counted.aux)


def moments(rows: Array, weight: Array) -> tuple[Array, Array]:
    """The weighted mean and variance of every dimension."""
    count = jnp.maximum(jnp.sum(weight), 1.0)
    mean = weight @ rows / count
    return mean, weight @ (rows - mean) ** 2 / count


def _moments(rows: Array, weight: Array) -> tuple[Array, Array]:
    """The weighted mean of the rows, and their mean squared distance from it; 1 where that is 0."""
    mean, variances = moments(rows, weight)
    variance = jnp.sum(variances)
    return mean, jnp.where(variance > 0, variance, 1.0)
