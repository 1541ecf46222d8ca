"""Toy models of superposition: more sparse features than hidden dimensions, with known mechanisms in the weights.

    y = relu((x W_in) W_out + b)        W_in [features, hidden], W_out = W_in^T of the tied model, b [features]

x has independent entries, U(0, 1) with probability `probability` and 0 otherwise; samples without any active feature
are given one. The mechanisms are the rows of W_in: feature j is read by row j alone.

Source: Elhage et al. 2022 (Toy Models of Superposition); sizes 5-2 and 40-10 as in arXiv 2501.14926 and 2506.20790.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch, make_batch
from jaxinterp.core.protocols import Method
from jaxinterp.core.sites import Sites
from jaxinterp.methods.recipes import one_pass

IN, OUT = "linear1", "linear2"
"""The names of the two matrices."""


@runtime_checkable
class Toy(Protocol):
    """A toy model that is decomposed: see `targets.ToyTarget`."""

    @property
    def features(self) -> int: ...
    def reads(self, x: Float[Array, "*axes features"]) -> dict[str, Float[Array, "*axes _in"]]: ...


class Superposition(eqx.Module):
    """The trained toy model."""

    weight_in: Float[Array, "features hidden"]
    weight_out: Float[Array, "hidden features"]
    bias: Float[Array, " features"]

    @property
    def features(self) -> int:
        """How many inputs there are."""
        return self.bias.shape[0]

    def weights(self) -> dict[str, Float[Array, "_in _out"]]:
        """Both matrices by name."""
        return {IN: self.weight_in, OUT: self.weight_out}

    def __call__(
        self, x: Float[Array, "*axes features"], apply: Callable[[str, Array], Array] | None = None
    ) -> Float[Array, "*axes features"]:
        """The output; `apply(name, what it reads)` takes the place of both matrices where it is given."""
        weights = self.weights()
        linear = apply or (lambda name, x: x @ weights[name])
        return jax.nn.relu(linear(OUT, linear(IN, x)) + self.bias)

    def reads(self, x: Float[Array, "*axes features"]) -> dict[str, Float[Array, "*axes _in"]]:
        """What each matrix reads in the unchanged model."""
        return {IN: x, OUT: x @ self.weight_in}


def draw_sparse(key: PRNGKeyArray, samples: int, features: int, probability: float) -> Float[Array, "samples features"]:
    """Samples with at least one active feature each."""
    on_key, size_key, one_key = jax.random.split(key, 3)
    active = jax.random.bernoulli(on_key, probability, (samples, features))
    one = jax.nn.one_hot(jax.random.randint(one_key, (samples,), 0, features), features, dtype=bool)
    active = jnp.where(jnp.any(active, axis=1, keepdims=True), active, one)
    return active * jax.random.uniform(size_key, (samples, features))


def train_superposition(
    key: PRNGKeyArray,
    features: int = 5,
    hidden: int = 2,
    *,
    probability: float = 0.05,
    steps: int = 10_000,
    batch_size: int = 2048,
    learning_rate: float = 5e-3,
    weight_decay: float = 0.01,
) -> Superposition:
    """The tied model after AdamW on |x - y|^2."""
    start_key, data_key = jax.random.split(key)
    weight = jax.random.normal(start_key, (features, hidden)) / features**0.5
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def loss(free: tuple[Array, Array], x: Array) -> Array:
        weight, bias = free
        return jnp.mean((x - Superposition(weight, weight.T, bias)(x)) ** 2)

    @jax.jit
    def run(free: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(carry: tuple[tuple[Array, Array], optax.OptState], at: Array) -> tuple[tuple, None]:
            free, state = carry
            x = draw_sparse(jax.random.fold_in(data_key, at), batch_size, features, probability)
            updates, state = optimizer.update(jax.grad(loss)(free, x), state, free)
            return (optax.apply_updates(free, updates), state), None

        return jax.lax.scan(step, (free, optimizer.init(free)), jnp.arange(steps))[0][0]

    weight, bias = run((weight, jnp.zeros(features)))
    return Superposition(weight, weight.T, bias)


def decompose(
    method: Method,
    model: Toy,
    key: PRNGKeyArray,
    *,
    steps: int,
    batch_size: int,
    probability: float = 0.05,
    draw: Callable[[PRNGKeyArray, int, int, float], Float[Array, "samples features"]] = draw_sparse,
) -> tuple[PyTree, dict[str, float]]:
    """Train a parameter decomposition of the model on fresh samples; one compiled scan.

    Args:
      draw: (key, samples, features, probability) -> samples.
    Returns:
      The decomposition, and the means of its metrics over the last tenth of the steps.
    """
    recipe, sites = one_pass(method, steps), Sites("x", "x")
    start_key, data_key = jax.random.split(key)

    @jax.jit
    def run(model: Toy, start_key: PRNGKeyArray, data_key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        def batch(step: Array) -> Batch:
            samples = draw(jax.random.fold_in(data_key, step), batch_size, model.features, probability)
            return make_batch({"x": samples}, jnp.ones(batch_size), sites, step=step)

        def body(state: PyTree, step: Array) -> tuple[PyTree, PyTree]:
            state, metrics = recipe.step(state, batch(step), jax.random.fold_in(start_key, step), model)
            return state, {name: ratio.value() for name, ratio in metrics.items()}

        return jax.lax.scan(body, recipe.init(start_key, batch(jnp.int32(steps)), model), jnp.arange(steps))

    state, history = run(model, start_key, data_key)
    late = {name: float(jnp.mean(values[-max(1, steps // 10) :])) for name, values in history.items()}
    return recipe.finish(state), late


def probe(decomposition: PyTree, model: Toy, size: float = 0.75) -> dict[str, Float[Array, "features parts"]]:
    """The causal importances g of every part for inputs with a single active feature of that size, by matrix."""
    one_hot = size * jnp.eye(model.features)
    return {name: g.lower for name, g in decomposition.importances(model.reads(one_hot)).items()}
