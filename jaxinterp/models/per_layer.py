"""Per-layer embeddings (Gemma 4): every layer reads vectors of the token that are its own.

    p = (RMSNorm(e W / sqrt(d)) + T[token] sqrt(size)) / sqrt(2)          [batch, seq, layers, size], e the embedding
    layer n, at its end:  x <- x + RMSNorm((f(x G_n) * p_n) P_n)

`blocks/3/per_layer/in` is p_3, `blocks/3/per_layer/added` what layer 3 adds of it.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.models.layers import Linear, Norm, Tap, no_tap, random_linear, rows_of_ids
from jaxinterp.models.rules import EXACT, Activation, Rules, activate, gate_product


@dataclass(frozen=True)
class PerLayerConfig:
    """Rows of the table, and the size of one layer's vector."""

    vocab_size: int
    size: int


class PerLayerInputs(eqx.Module):
    """The vectors of all layers; see the module's equations."""

    token: Float[Array, "vocab layers_size"]
    projection: Linear
    norm: Norm
    size: int = eqx.field(static=True)

    def cuts(self) -> dict[str, int | None]:
        """Tokens are cut, as those of the embedding."""
        return {"token": 0, "projection/weight": 1}

    def __call__(
        self, tokens: Int[Array, "batch seq"], embedded: Float[Array, "batch seq d_model"], rules: Rules = EXACT
    ) -> Float[Array, "batch seq layers size"]:
        scale = jnp.asarray(embedded.shape[-1] ** -0.5, embedded.dtype)
        context = (self.projection(embedded) * scale).reshape(*tokens.shape, -1, self.size)
        own = rows_of_ids(self.token, tokens) * jnp.asarray(self.size**0.5, self.token.dtype)
        return (self.norm(context, rules) + own.reshape(context.shape)) * jnp.asarray(2**-0.5, context.dtype)


class PerLayer(eqx.Module):
    """What one layer makes of its vectors."""

    gate_proj: Linear
    out_proj: Linear
    norm: Norm
    activation: Activation = eqx.field(static=True)

    def cuts(self) -> dict[str, int | None]:
        """One sum at the end."""
        return {"gate_proj/weight": 1, "out_proj/weight": 0}

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        vectors: Float[Array, "batch seq size"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
    ) -> Float[Array, "batch seq d_model"]:
        vectors = tap("in", vectors)
        mixed = gate_product(activate(self.activation, self.gate_proj(x), rules), vectors, rules)
        return tap("added", self.norm(self.out_proj(mixed), rules))


def random_inputs(
    key: PRNGKeyArray, config: PerLayerConfig, d_model: int, layers: int, epsilon: float
) -> PerLayerInputs:
    """Random weights."""
    first, second = jax.random.split(key)
    width = layers * config.size
    norm = Norm(jnp.ones(config.size, jnp.float32), None, "rms", epsilon, 0.0)
    token = jax.random.normal(first, (config.vocab_size, width), jnp.float32)
    return PerLayerInputs(token, random_linear(second, d_model, width, False, cut="out"), norm, config.size)


def random_per_layer(
    key: PRNGKeyArray, config: PerLayerConfig, d_model: int, activation: Activation, epsilon: float
) -> PerLayer:
    """Random weights."""
    first, second = jax.random.split(key)
    norm = Norm(jnp.ones(d_model, jnp.float32), None, "rms", epsilon, 0.0)
    gate = random_linear(first, d_model, config.size, False, cut="out")
    return PerLayer(gate, random_linear(second, config.size, d_model, False, cut="in"), norm, activation)
