"""How much of a planted dictionary was found.

With planted rows V [n, d] and learned rows D [m, d], all made unit vectors, and C = V D^T:

    mcc   the mean of C over the one-to-one matching of planted to learned rows that maximises it (Hungarian method)
    frr   the fraction of planted rows with some learned row at cosine above a threshold (many-to-one)

Cosines are signed: codes are non-negative, and an absolute value would hide a flipped feature. A random dictionary does
not score 0: always report its score beside.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

Matrix = np.ndarray | Array


class Matching(NamedTuple):
    """Planted row `planted[i]` is matched to learned row `learned[i]` at cosine `cosine[i]`."""

    planted: Int[np.ndarray, " pairs"]
    learned: Int[np.ndarray, " pairs"]
    cosine: Float[np.ndarray, " pairs"]


def cosines(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"]) -> Float[np.ndarray, "n m"]:
    """Cosines between all rows; rows of zeros have cosine 0 with everything."""

    def unit(rows: Matrix) -> np.ndarray:
        wide = np.asarray(rows, np.float64)
        return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)

    return unit(planted) @ unit(learned).T


def match(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"]) -> Matching:
    """The one-to-one matching with the largest sum of cosines."""
    similarity = cosines(planted, learned)
    rows, columns = linear_sum_assignment(-similarity)
    return Matching(rows, columns, similarity[rows, columns])


def mcc(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"]) -> float:
    """Mean cosine under the best one-to-one matching (mean correlation coefficient of dictionary rows)."""
    return float(match(planted, learned).cosine.mean())


def frr(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"], threshold: float = 0.9) -> float:
    """Feature recovery rate: the fraction of planted rows with a learned row above the threshold."""
    return float((cosines(planted, learned).max(axis=1) > threshold).mean())
