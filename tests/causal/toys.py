"""Models of a few lines whose causes are known."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.models.layers import Linear, Norm
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import EXACT
from jaxinterp.models.transformer import TransformerConfig, initialise

TOKENS = jnp.asarray([[0, 1, 2], [3, 1, 4]])


class Stack(eqx.Module):
    """Token vectors through a list of maps [batch, seq, d], each offered as `maps/i/out`; logits of the last."""

    embedding: jax.Array
    maps: tuple
    readout: jax.Array
    residual: bool = eqx.field(static=True, default=True)

    def __call__(self, tokens, *, tap, rules=EXACT):
        x = tap("embed", self.embedding[tokens])
        for index, function in enumerate(self.maps):
            y = tap(f"maps/{index}/out", function(x, rules))
            x = x + y if self.residual else y
        return tap("final", x) @ self.readout


class Affine(eqx.Module):
    """Mixes positions and channels: y = M x W + b."""

    mix: jax.Array
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x, rules):
        return jnp.einsum("st,btd,de->bse", self.mix, x, self.weight) + self.bias


class Gated(eqx.Module):
    """RMSNorm and a bias-free SwiGLU MLP."""

    norm: Norm
    mlp: MLP

    def __call__(self, x, rules):
        return self.mlp(self.norm(x, rules), rules=rules)


class Curved(eqx.Module):
    """tanh(x W) + (x W)^3 / 20."""

    weight: jax.Array

    def __call__(self, x, rules):
        z = x @ self.weight
        return jnp.tanh(z) + z**3 / 20


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def affine_stack(d=4, depth=3, seq=3, vocab=6):
    maps = tuple(
        Affine(normal(i, seq, seq) / seq, normal(10 + i, d, d) / d**0.5, normal(20 + i, d)) for i in range(depth)
    )
    return Stack(normal(30, vocab, d), maps, normal(31, d, vocab))


def gated_stack(d=12, m=20, depth=3, vocab=6):
    maps = tuple(
        Gated(
            Norm(jnp.ones(d), None, "rms", 0.0, 0.0),
            MLP(
                Linear(normal(3 * i, d, m), None),
                Linear(normal(3 * i + 1, d, m), None),
                Linear(normal(3 * i + 2, m, d), None),
                "silu",
            ),
        )
        for i in range(depth)
    )
    return Stack(normal(30, vocab, d), maps, normal(31, d, vocab))


def curved_stack(d=4, depth=2, vocab=6):
    return Stack(
        normal(30, vocab, d), tuple(Curved(normal(40 + i, d, d) / 2) for i in range(depth)), normal(31, d, vocab)
    )


SMALL = TransformerConfig(
    vocab_size=257, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=4, d_mlp=24, context=64, rotary_dimensions=4
)


@functools.cache
def small_transformer():
    return initialise(SMALL, jax.random.key(0))


class Nodes(eqx.Module):
    """Three nodes at `nodes` [batch, seq, 3] that equal 1; one logit of their combination."""

    combine: str = eqx.field(static=True)

    def __call__(self, tokens, *, tap, rules=EXACT):
        nodes = tap("nodes", jnp.ones((*tokens.shape, 3)))
        if self.combine == "additive":
            value = 2 * nodes[..., 0] + nodes[..., 1]
        else:
            value = jnp.maximum(nodes[..., 0], nodes[..., 1])
        return jnp.stack([value, jnp.zeros_like(value)], axis=-1)
