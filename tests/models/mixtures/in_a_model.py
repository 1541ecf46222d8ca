"""A small language model with each kind of MLP, of random weights."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.models.transformer import TransformerConfig, initialise
from tests.models.mixtures.kinds import KINDS

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 8)))


def model_of(kind):
    shape = TransformerConfig(
        vocab_size=11, d_model=8, layers=1, heads=2, kv_heads=2, head_dim=4, d_mlp=16, context=8,
        rotary_dimensions=4, tied=False, mixture=KINDS[kind],
    )  # fmt: skip
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: initialise(shape, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) / 3, leaf.dtype), shapes)
