"""A model, a text and sizes for which a step is traced under x64 and strict promotion."""

from contextlib import contextmanager

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.models.files.subject import Subject
from jaxinterp.models.transformer import TransformerConfig, initialise

CONFIG = TransformerConfig(
    vocab_size=16, d_model=8, layers=2, heads=2, kv_heads=2, head_dim=4, d_mlp=16, context=16, rotary_dimensions=4,
    norm="layer", norm_bias=True, mlp_bias=True,
)  # fmt: skip
TEXT = grain.MapDataset.source(
    [
        {"tokens": row, "weight": np.r_[0, np.ones(7)].astype(np.float32), "document": np.full(8, i, np.int32)}
        for i, row in enumerate(np.random.default_rng(0).integers(0, 16, (12, 8), np.int32))
    ]
)
SIZES = {"steps": 1, "batch_size": 16, "buffer_batches": 2, "log_every": 1}
ONE = "blocks/1/mlp"
FLOATS = {jnp.dtype("float32")}


@contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def subject():
    return Subject(initialise(CONFIG, jax.random.key(0)), None, "small")


def floats(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}
