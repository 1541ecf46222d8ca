"""A toy residual MLP: more features than neurons, each to be passed through relu and added to the stream.

    r = x E,   r' = r + relu(r W_in) W_out,   y = r' E^T        E [features, d], rows of length 1, fixed
    trained to y = x + relu(x)

The mechanisms of W_in are the rows of E W_in: how feature j reaches the neurons. W_out writes what all neurons share:
no part of it belongs to a single feature. Samples have entries U(-1, 1) with probability `probability`, 0 otherwise.

Source: Bushnaq, Braun, Sharkey 2025 (arXiv 2506.20790), whose sizes are 100 features, 50 neurons and d 1,000.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxinterp.evaluation.planted.superposition import draw_sparse
from jaxinterp.methods.factor.parameters import Parts

IN, OUT = "mlp_in", "mlp_out"
"""The names of the two matrices."""


class ResidualMLP(eqx.Module):
    """The model of the module's text."""

    embed: Float[Array, "features d"]
    weight_in: Float[Array, "d neurons"]
    weight_out: Float[Array, "neurons d"]

    @property
    def features(self) -> int:
        """How many inputs there are."""
        return self.embed.shape[0]

    def weights(self) -> dict[str, Float[Array, "_in _out"]]:
        """Both matrices by name."""
        return {IN: self.weight_in, OUT: self.weight_out}

    def __call__(
        self, x: Float[Array, "*axes features"], apply: Callable[[str, Array], Array] | None = None
    ) -> Float[Array, "*axes features"]:
        """The output; `apply(name, what it reads)` takes the place of both matrices where it is given."""
        weights = self.weights()
        linear = apply or (lambda name, x: x @ weights[name])
        stream = x @ self.embed
        return (stream + linear(OUT, jax.nn.relu(linear(IN, stream)))) @ self.embed.T

    def reads(self, x: Float[Array, "*axes features"]) -> dict[str, Float[Array, "*axes _in"]]:
        """What each matrix reads in the unchanged model."""
        stream = x @ self.embed
        return {IN: stream, OUT: jax.nn.relu(stream @ self.weight_in)}


def draw_signed(key: PRNGKeyArray, samples: int, features: int, probability: float) -> Float[Array, "samples features"]:
    """Samples with at least one active feature each, of either sign."""
    size_key, sign_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (samples, features), jnp.float32)
    return draw_sparse(size_key, samples, features, probability) * signs


def wanted(x: Float[Array, "*axes features"]) -> Float[Array, "*axes features"]:
    """x + relu(x)."""
    return x + jax.nn.relu(x)


def train_residual_mlp(
    key: PRNGKeyArray,
    features: int = 20,
    d: int = 60,
    neurons: int = 10,
    *,
    probability: float = 0.05,
    steps: int = 3000,
    batch_size: int = 512,
    learning_rate: float = 3e-3,
) -> ResidualMLP:
    """The model after AdamW on |y - x - relu(x)|^2."""
    embed_key, in_key, out_key, data_key = jax.random.split(key, 4)
    embed = jax.random.normal(embed_key, (features, d), jnp.float32)
    embed = embed / jnp.linalg.norm(embed, axis=1, keepdims=True)
    start = (
        jax.random.normal(in_key, (d, neurons), jnp.float32) / d**0.5,
        jax.random.normal(out_key, (neurons, d), jnp.float32) / neurons**0.5,
    )
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=0.01)

    def loss(free: tuple[Array, Array], x: Array) -> Array:
        return jnp.mean((ResidualMLP(embed, *free)(x) - wanted(x)) ** 2)

    @jax.jit
    def run(free: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(carry: tuple[tuple[Array, Array], optax.OptState], at: Array) -> tuple[tuple, None]:
            free, state = carry
            x = draw_signed(jax.random.fold_in(data_key, at), batch_size, features, probability)
            updates, state = optimizer.update(jax.grad(loss)(free, x), state, free)
            return (optax.apply_updates(free, updates), state), None

        return jax.lax.scan(step, (free, optimizer.init(free)), jnp.arange(steps))[0][0]

    return ResidualMLP(embed, *run(start))


def mechanisms(model: ResidualMLP, parts: Parts) -> tuple[Float[Array, "features neurons"], Parts]:
    """E W_in, and the parts of W_in read feature by feature: what `mean_max_cosine` compares."""
    return model.embed @ model.weight_in, Parts(parts.read @ model.embed.T, parts.write)
