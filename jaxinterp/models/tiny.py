"""Small models with known ground truth: nothing to download, every answer known.

`tiny_subject()` is a four-layer byte-level transformer whose MLPs are planted: each hidden neuron reads one unit
direction against a high threshold, so that few fire at a time, and writes one unit direction. The neurons of such an
MLP *are* the features that a sparse decomposition of it should find.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.layers import Linear
from jaxinterp.models.mlp import MLP
from jaxinterp.models.transformer import Transformer, TransformerConfig, initialise

TINY = TransformerConfig(
    vocab_size=257,
    d_model=64,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    d_mlp=128,
    context=512,
    activation="relu",
    gated=False,
    mlp_bias=True,
    rotary_dimensions=16,
    tied=False,
)


def unit_rows(key: PRNGKeyArray, rows: int, d: int) -> Float[Array, "rows d"]:
    """Random directions of length 1."""
    directions = jax.random.normal(key, (rows, d), dtype=jnp.float32)
    return directions / jnp.linalg.norm(directions, axis=1, keepdims=True)


def planted_mlp(
    key: PRNGKeyArray, features: int, d_in: int, d_out: int, threshold: float = 1.5, scale: float = 1.0
) -> MLP:
    """out = scale * relu(x E^T - threshold) D, with E [features, d_in] and D [features, d_out] random unit rows.

    For x ~ N(0, I) a feature fires with probability 1 - Phi(threshold), 6.7 percent at 1.5.
    """
    read_key, write_key = jax.random.split(key)
    up = Linear(unit_rows(read_key, features, d_in).T, jnp.full(features, -threshold, jnp.float32), cut="out")
    down = Linear(scale * unit_rows(write_key, features, d_out), jnp.zeros(d_out, jnp.float32), cut="in")
    return MLP(None, up, down, "relu")


def planted_transformer(key: PRNGKeyArray, config: TransformerConfig = TINY) -> Transformer:
    """A random transformer whose every MLP is `planted_mlp`; the rest is random."""
    model_key, *mlp_keys = jax.random.split(key, 1 + config.layers)
    model = initialise(config, model_key)
    mlps = [planted_mlp(mlp_key, config.d_mlp, config.d_model, config.d_model) for mlp_key in mlp_keys]
    return eqx.tree_at(lambda model: [block.mlp for block in model.blocks], model, mlps)


def tiny_subject() -> Subject:
    """The planted transformer of fixed weights, reading bytes: what `load("tiny")` gives."""
    return Subject(planted_transformer(jax.random.key(0)), byte_tokenizer(), "tiny")
