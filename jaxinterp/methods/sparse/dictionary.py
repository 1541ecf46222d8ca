"""What the sparse-dictionary methods share: hyperparameters, start values, and what happens after a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import Activation, BatchTopK, ReLU, TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.base import MethodState, Recipe, gradient_method, warmup_linear
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_positive, check_whole
from jaxinterp.objectives import Metrics, Objective, Term, auxk, l1, reconstruction, scale, total

NEVER = 2**30  # tokens since a feature fired are counted up to about here, far below where int32 wraps


@dataclass(frozen=True)
class DictionaryHyperparameters:
    """The hyperparameters of every sparse dictionary.

    A method whose own `activation` has a name that is not among NAMES has that one only.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("topk", "batch_topk", "relu")

    features: int = 4608
    """Size of the dictionary."""
    activation: Literal["topk", "batch_topk", "relu"] | Activation = "topk"
    """How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""
    dead_after: int = 10_000_000
    """A feature is dead when it has not fired for this many tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam: linear warm-up over the first 5 percent, linear decay over the last half."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What Adam's first moment is kept in. (The second moves by a thousandth a step, which bfloat16 cannot hold.)"""
    normalise: bool = True
    """Whether inputs and outputs are centred and scaled to unit variance per dimension, on average."""
    objective: Objective | None = None
    """Another objective in place of the method's own terms, l1 and auxk: any pure function, by value."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        self._check_activation()
        check_whole(self, features=1, dead_after=0)
        if self.activation in ("topk", "batch_topk"):
            check_whole(self, k=1)
            if self.k > self.features:
                raise UserError(f"k={self.k} must lie between 1 and features={self.features}.")
        check_not_negative(self, "l1", "auxk")
        check_positive(self, "learning_rate")
        check_one_of(self, "moments", ("float32", "bfloat16"))
        if self.activation == "relu" and self.l1 == 0 and self.objective is None:
            raise UserError(
                "l1=0.0 with activation='relu' makes nothing sparse: give l1 a coefficient (0.01, say), or an "
                "objective of your own that does."
            )

    def _check_activation(self) -> None:
        only = type(self).activation
        if isinstance(only, str) and only not in self.NAMES:
            check_one_of(self, "activation", (only,), ": take SparseAutoencoder for others")
        elif isinstance(self.activation, str):
            check_one_of(self, "activation", self.NAMES, "; pass any other by value, such as JumpReLU.start(...)")

    def make_activation(self) -> Activation:
        """The activation as the decomposition holds it."""
        if not isinstance(self.activation, str):
            return self.activation
        if self.activation == "relu":
            return ReLU()
        return TopK(self.k) if self.activation == "topk" else BatchTopK(self.k)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Adam, for a run of so many steps."""
        return optax.adam(warmup_linear(self.learning_rate, steps), mu_dtype=self.moments)

    def terms(self) -> list[Term]:
        """reconstruction + l1 * L1: the method's own terms, to which AuxK comes."""
        return [reconstruction(), *self.l1_term()]

    def l1_term(self) -> list[Term]:
        """l1 * L1, where it has a coefficient."""
        return [scale(l1(), self.l1)] if self.l1 else []

    def make_objective(self) -> Objective:
        """The method's terms and AuxK, or the objective that was given."""
        if self.objective is not None:
            return self.objective
        revival = [auxk(self.auxk, dead_after=self.dead_after)] if self.auxk else []
        return total(*self.terms(), *revival)


def dictionary_recipe(
    hyper: DictionaryHyperparameters,
    init: Callable[[PRNGKeyArray, Batch, Any], Any],
    steps: int,
    *,
    unit_norm: bool,
) -> Recipe:
    """Adam on the objective; counters, thresholds and, if asked for, unit write vectors after every step."""
    optimizer = hyper.optimizer(steps)
    if unit_norm:
        return gradient_method(init, hyper.make_objective(), optimizer, _count_and_normalise, tangential)
    return gradient_method(init, hyper.make_objective(), optimizer, count)


def empty_dictionary(hyper: DictionaryHyperparameters, sample: Batch, *, skip: bool) -> Dictionary:
    """A dictionary of zeros with the means and scales of a sample; scales make the mean variance per dimension 1."""
    x, y = sample.inputs, sample.targets
    d_in, d_out = x.shape[1], y.shape[1]
    input_mean, input_variance = _moments(x, sample.weight)
    target_mean, target_variance = _moments(y, sample.weight)
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    if hyper.normalise:
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
        activation=hyper.make_activation(),
        sites=sample.sites,
    )


def count(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """Tokens since each feature fired, and the activation's own state."""
    dictionary = state.decomposition
    since = since_fired(dictionary.tokens_since_fired, metrics)
    activation = dictionary.activation.after_step(metrics, batch.step)
    changed = eqx.tree_at(lambda d: (d.tokens_since_fired, d.activation), dictionary, (since, activation))
    return MethodState(changed, state.optimizer)


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


def tangential(dictionary: Any, gradient: Any) -> Any:
    """The gradient without the part that would only lengthen a unit write vector: g_j - (g_j . D_j) D_j."""
    g, rows = gradient.decoder, dictionary.decoder
    along = jnp.sum(g * rows, axis=1, keepdims=True) * rows
    return eqx.tree_at(lambda tree: tree.decoder, gradient, g - along)


def _count_and_normalise(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    counted = count(state, batch, metrics, key)
    unit = eqx.tree_at(lambda d: d.decoder, counted.decomposition, unit_rows(counted.decomposition.decoder))
    return MethodState(unit, counted.optimizer)


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
