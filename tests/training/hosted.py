"""The run that one process and several must train alike."""

import grain
import numpy as np

from jaxinterp.methods import SkipTranscoder

METHOD = SkipTranscoder(features=64, k=4, dead_after=500, learning_rate=3e-3)
QUICK = "--xla_backend_optimization_level=0"
"""Processes of tests compile for themselves, and programs are small: the compiler need not optimise for them."""

SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 5}


def text():
    """512 windows of 32 random tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, (512, 32)).astype(np.int32)
    weight = np.ones((512, 32), np.float32)
    weight[:, 0] = 0
    columns = zip(tokens, weight, np.arange(512, dtype=np.int32), strict=True)
    return grain.MapDataset.source([{"tokens": t, "weight": w, "document": np.full(32, i)} for t, w, i in columns])
