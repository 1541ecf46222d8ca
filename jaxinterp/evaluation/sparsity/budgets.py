"""How much of each part may be left out, for one number over all; and how much costs p percent of perplexity.

`greedy_levels` is TEAL's allocation: all parts begin at 0; at each step every part is tried at its next level, and the
one with the least error keeps it, until the weighted mean level reaches the target. A step of part i is
`step / weights_i` with weights of mean 1, so that every step raises the mean level by the same amount.

`ppl_percent` is PPL-p %: the largest CETT c, one for all layers, found by bisection, with exp(loss(c) - loss(0)) <= 1 +
p/100. Perplexity is not monotone in c: the result is a crossing, with what it achieved.

Sources: TEAL 2408.14690, algorithm 1; PPL-p %: Sparsing Law 2411.02335, section 3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxinterp.core.errors import UserError

Levels = dict[str, float]


def greedy_levels(
    error: Callable[[Mapping[str, float]], float],
    names: Sequence[str],
    target: float,
    *,
    weights: Mapping[str, int | float] | None = None,
    step: float = 0.05,
    most: float = 0.95,
) -> list[Levels]:
    """Levels of sparsity after every step, from all 0 to the first with a weighted mean of at least the target.

    Args:
      error: of a choice of levels by name; the less the better. Of equal errors the first name wins.
      weights: sizes of the parts, such as numbers of weights; default: all equal.
      step: how much a part of mean size is raised at a time.
      most: no level exceeds it.
    Raises:
      UserError: target, step or a weight is out of range.
    """
    if not 0 <= target <= most <= 1:
        raise UserError(f"target={target} must lie in 0 to most={most}, which is at most 1.")
    if not 0 < step <= 1:
        raise UserError(f"step={step} must be positive and at most 1.")
    sizes = dict.fromkeys(names, 1.0) if weights is None else {name: float(weights[name]) for name in names}
    if not sizes or min(sizes.values()) <= 0:
        raise UserError("weights must be positive, one for each of at least one name.")
    mean_size = sum(sizes.values()) / len(sizes)
    levels = dict.fromkeys(names, 0.0)
    path = [dict(levels)]
    while sum(sizes[name] * level for name, level in levels.items()) < (target - 1e-9) * sum(sizes.values()):
        raised = {
            name: min(most, levels[name] + step * mean_size / sizes[name])
            for name in names
            if levels[name] < most - 1e-12
        }
        best = min(raised, key=lambda name: error(levels | {name: raised[name]}))
        levels[best] = raised[best]
        path.append(dict(levels))
    return path


class PPLPercent(NamedTuple):
    """CETT, the share of neurons kept, and by how many percent perplexity really rose."""

    cett: float
    ratio: float
    percent: float


def ppl_percent(
    measure: Callable[[float], tuple[float, float]], dense_loss: float, percent: float, *, tolerance: float = 1e-6
) -> PPLPercent:
    """The largest CETT found whose perplexity rises by at most `percent`.

    Args:
      measure: CETT -> (loss in nats, share of neurons kept).
      tolerance: of the CETT.
    Raises:
      UserError: percent or tolerance is not positive.
    """
    for name, value in (("percent", percent), ("tolerance", tolerance)):
        if not value > 0:
            raise UserError(f"{name}={value} must be positive.")
    low, high, best = 0.0, 1.0, PPLPercent(0.0, 1.0, 0.0)
    while high - low > tolerance:
        middle = (low + high) / 2
        loss, ratio = measure(middle)
        rise = 100 * math.expm1(loss - dense_loss)
        if rise <= percent:
            low, best = middle, PPLPercent(middle, ratio, rise)
        else:
            high = middle
    return best
