"""A text in which a token says which comes next."""

import grain
import numpy as np


def counting_text():
    """64 windows of 12 tokens of 16."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(64):  # a token says which comes next
        tokens = (rng.integers(0, 16) + 3 * np.arange(12)) % 16
        rows.append({"tokens": tokens.astype(np.int32), "weight": np.ones(12, np.float32)})
        rows[-1]["document"] = np.full(12, index, np.int32)
    return grain.MapDataset.source(rows)
