"""How much of a dictionary another seed finds again.

With rows D^a, D^b of two seeds, matched one to one so that the sum of cosines is largest (`recovery.match`):

    cosine   the mean of the matched cosines, mean over pairs of seeds
    share    the fraction of matched rows above a threshold (0.9), mean over pairs of seeds

1 where every seed finds the same. Two random dictionaries do not score 0 (0.41 at 48 rows in 32 dimensions), and rows
that are never active stay as random as they started: pass the rows of live features where they are to be left out.
Where a row is not finite, or a seed has no row, both numbers are NaN.

Sources: Chen et al. 2025, arXiv 2506.14002 (share above 0.9, there without the one-to-one matching); arXiv 2505.20254
(mean matched cosine), as reported.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.planted.recovery import finite, match

Rows = Float[Array | np.ndarray, "_features d"]


class Stability(NamedTuple):
    """Mean matched cosine, and the share of matched rows above the threshold."""

    cosine: float
    share: float


def compare_seeds(dictionaries: Sequence[Rows], *, threshold: float = 0.9) -> Stability:
    """The module's numbers; `dictionaries` hold one row a feature, one array a seed.

    Raises:
      UserError: there are fewer than two.
    """
    if len(dictionaries) < 2:
        raise UserError(f"stability compares seeds: {len(dictionaries)} dictionary given, at least 2 needed.")
    if not finite(*dictionaries) or not all(len(rows) for rows in dictionaries):
        return Stability(float("nan"), float("nan"))
    matched = [match(one, other).cosine for one, other in combinations(dictionaries, 2)]
    return Stability(
        float(np.mean([cosine.mean() for cosine in matched])),
        float(np.mean([(cosine > threshold).mean() for cosine in matched])),
    )
