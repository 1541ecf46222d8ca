"""A small subject and windows of random bytes, shared by the tests of training."""

import grain
import numpy as np
import pytest

from jaxinterp.models.load import load


@pytest.fixture(scope="session")
def subject():
    return load("tiny")


@pytest.fixture(scope="session")
def text():
    """512 windows of 32 random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (512, 32), np.int32)
    weight = np.ones((512, 32), np.float32)
    weight[:, 0] = 0
    rows = [
        {"tokens": t, "weight": w, "document": np.full(32, i, np.int32)}
        for i, (t, w) in enumerate(zip(tokens, weight, strict=True))
    ]
    return grain.MapDataset.source(rows)
