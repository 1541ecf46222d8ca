"""Two small transformers, and random transcoders of theirs, for the tests of graphs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.models.transformer import TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=12, d_model=8, layers=3, heads=4, kv_heads=2, head_dim=4, d_mlp=10, context=16, rotary_dimensions=4,
)  # fmt: skip


GPT2 = TransformerConfig(
    vocab_size=12, d_model=8, layers=2, heads=2, kv_heads=2, head_dim=4, d_mlp=10, context=16, activation="gelu",
    gated=False, norm="layer", norm_bias=True, learned_positions=True, qkv_bias=True, attention_out_bias=True,
    mlp_bias=True,
)  # fmt: skip
FEATURES = 5
PROMPT = np.array([3, 7, 1, 0])


def wide(model):
    """Weights are float32 under x64, too: here they are float64."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)


def with_random_biases(model, seed=0):
    """Biases start at zero, where a forgotten one would not show."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype) if name.endswith("bias") else leaf

    return jax.tree_util.tree_map_with_path(fill, model)


def weights(config, *, cross=False, skip=False, seed=0):
    """Random transcoder weights, lists by layer."""
    rng, d, layers = np.random.default_rng(seed), config.d_model, config.layers
    return {
        "encoders": [rng.normal(size=(FEATURES, d)) for _ in range(layers)],
        "encoder_biases": [rng.normal(size=FEATURES) * 0.3 for _ in range(layers)],
        "decoders": [rng.normal(size=(FEATURES, layers - n if cross else 1, d)) * 0.3 for n in range(layers)],
        "decoder_biases": [rng.normal(size=d) * 0.2 for _ in range(layers)],
        "skips": [rng.normal(size=(d, d)) * 0.2 if skip else None for _ in range(layers)],
    }
