"""Massive activations: a few entries of the residual stream that are thousands of times the median.

An entry of a layer's array `[batch, seq, d]` is massive where |x| > least and |x| >= ratio * median |x|, the median
being the lower one over all entries of its sequence.

    f(t) = A exp(-λ x) log(x) + K,  x = γ t + t_0         how they grow over training: five parameters

Sources: Sun et al. 2024, arXiv 2402.17762 (least 100, ratio 1,000; their code compares with the median of the layer);
the curve: arXiv 2508.03616, as recalled.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import least_squares

from jaxinterp.core.errors import UserError


class Massive(NamedTuple):
    """One entry: where it is, its value, and its size in medians."""

    row: int
    position: int
    dimension: int
    value: float
    ratio: float


def massive(
    x: Float[Array | np.ndarray, "batch seq d"], *, least: float = 100.0, ratio: float = 1000.0, most: int = 20
) -> list[Massive]:
    """The massive entries, the largest first, at most `most`.

    Raises:
      UserError: least or ratio is negative.
    """
    for name, value in (("least", least), ("ratio", ratio)):
        if not value >= 0:
            raise UserError(f"{name}={value} must be at least 0.")
    wide = np.asarray(x, np.float64)
    sizes = np.abs(wide)
    flat = np.sort(sizes.reshape(len(sizes), -1), axis=-1)
    median = np.maximum(flat[:, (flat.shape[1] - 1) // 2], 1e-30)
    found = np.argwhere((sizes > least) & (sizes >= ratio * median[:, None, None]))
    entries = [
        Massive(int(b), int(t), int(j), float(wide[b, t, j]), float(sizes[b, t, j] / median[b])) for b, t, j in found
    ]
    return sorted(entries, key=lambda entry: -abs(entry.value))[:most]


class Top(NamedTuple):
    """The largest sizes of a layer and its lower median, means over rows."""

    top: tuple[float, ...]
    median: float


def top_and_median(x: Float[Array | np.ndarray, "batch seq d"], count: int = 3) -> Top:
    """The `count` largest |x| of each row and the lower median, averaged over rows."""
    flat = np.sort(np.abs(np.asarray(x, np.float64)).reshape(len(x), -1), axis=-1)
    return Top(tuple(flat[:, ::-1][:, :count].mean(0).tolist()), float(flat[:, (flat.shape[1] - 1) // 2].mean()))


class Curve(NamedTuple):
    """The five parameters."""

    amplitude: float
    decay: float
    rate: float
    offset: float
    level: float

    def __call__(self, t: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
        """f(t)."""
        x = self.rate * np.asarray(t, np.float64) + self.offset
        return self.amplitude * np.exp(-self.decay * x) * np.log(x) + self.level


def fit_curve(
    t: Float[np.ndarray, " steps"], y: Float[np.ndarray, " steps"], start: Curve | None = None
) -> tuple[Curve, float]:
    """The curve of least squares and its R^2; t must not be negative, γ and t_0 stay positive.

    A and K are those of least squares at every λ, γ, t_0 (variable projection, Golub and Pereyra 1973): only the three
    are searched, in logarithms.

    Args:
      start: where the search for λ, γ and t_0 begins; default: three starts, the best of which counts.
    Raises:
      UserError: fewer than five points, or a negative t.
    """
    t, y = np.asarray(t, np.float64), np.asarray(y, np.float64)
    if len(t) < 5 or np.min(t, initial=0) < 0:
        raise UserError(f"t has {len(t)} steps from {np.min(t, initial=0)}: give at least 5, none negative.")
    scale, span = max(float(t.max()), 1e-12), max(float(np.ptp(y)), 1e-12)
    unit, centred = t / scale, (y - y.mean()) / span

    def solved(p: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """A / span, the curve with A = 1 and K = 0, and what is left of y."""
        decay, rate, offset = np.exp(p)
        x = rate * unit + offset
        shape = np.nan_to_num(np.exp(-decay * x) * np.log(x))
        moves = shape - shape.mean()
        size = float(moves @ moves)
        amplitude = float(moves @ centred) / size if size > 1e-300 else 0.0
        return amplitude, shape, amplitude * moves - centred

    bounds = ([-14, -14, -14], [6, 12, 6])
    if start is not None:
        begins = [np.clip(np.log(np.maximum([start.decay, start.rate * scale, start.offset], 1e-12)), *bounds)]
    else:
        begins = [np.log([decay, rate, 1.0]) for decay, rate in ((0.1, 10.0), (1.0, 3.0), (0.01, 100.0))]
    fits = [least_squares(lambda p: solved(p)[2], begin, bounds=bounds, max_nfev=2000) for begin in begins]
    p = min(fits, key=lambda fit: fit.cost).x
    amplitude, shape, _ = solved(p)
    decay, rate, offset = np.exp(p)
    level = float(y.mean()) - amplitude * span * float(shape.mean())
    best = Curve(amplitude * span, float(decay), float(rate) / scale, float(offset), level)
    return best, r_squared(y, best(t))


class PowerLaw(NamedTuple):
    """limit - scale / D^exponent: how SiLU models' activation ratio grows with data."""

    limit: float
    scale: float
    exponent: float

    def __call__(self, data: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """The ratio at D."""
        return self.limit - self.scale / np.asarray(data, np.float64) ** self.exponent


class LogPowerLaw(NamedTuple):
    """exp(-scale D^exponent + shift) + limit: how ReLU models' activation ratio falls with data."""

    limit: float
    scale: float
    exponent: float
    shift: float

    def __call__(self, data: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """The ratio at D."""
        return np.exp(-self.scale * np.asarray(data, np.float64) ** self.exponent + self.shift) + self.limit


def fit_power_law(data: Float[np.ndarray, " points"], ratio: Float[np.ndarray, " points"]) -> tuple[PowerLaw, float]:
    """The increasing law of Sparsing Law (2411.02335; its form as recalled), by least squares, and R^2.

    Raises:
      UserError: fewer than three points, or data that is not positive.
    """
    data, ratio = _points(data, ratio, 3)
    unit = float(data.max())
    fits = [
        least_squares(
            lambda p: PowerLaw(p[0], np.exp(p[1]), np.exp(p[2]))(data / unit) - ratio,
            [ratio.max(), -2.0, np.log(power)],
        )
        for power in (0.3, 1.0, 2.0)
    ]
    p = min(fits, key=lambda fit: fit.cost).x
    exponent = float(np.exp(p[2]))
    law = PowerLaw(float(p[0]), float(np.exp(p[1])) * unit**exponent, exponent)
    return law, r_squared(ratio, law(data))


def fit_log_power_law(
    data: Float[np.ndarray, " points"], ratio: Float[np.ndarray, " points"]
) -> tuple[LogPowerLaw, float]:
    """The decreasing law of Sparsing Law (form as recalled), by least squares, and R^2.

    Raises:
      UserError: fewer than four points, or data that is not positive.
    """
    data, ratio = _points(data, ratio, 4)
    unit = float(data.max())
    fits = [
        least_squares(
            lambda p: LogPowerLaw(p[0], np.exp(p[1]), np.exp(p[2]), p[3])(data / unit) - ratio,
            [ratio.min(), np.log(scale), np.log(power), np.log(max(np.ptp(ratio), 1e-9)) + scale],
            max_nfev=4000,
        )
        for scale, power in ((1.0, 0.5), (3.0, 0.3), (2.0, 1.0))
    ]
    p = min(fits, key=lambda fit: fit.cost).x
    exponent = float(np.exp(p[2]))
    law = LogPowerLaw(float(p[0]), float(np.exp(p[1])) / unit**exponent, exponent, float(p[3]))
    return law, r_squared(ratio, law(data))


def _points(data: np.ndarray, ratio: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    data, ratio = np.asarray(data, np.float64), np.asarray(ratio, np.float64)
    if len(data) < least or not (data > 0).all():
        raise UserError(f"data has {len(data)} points from {np.min(data, initial=0)}: give at least {least}, positive.")
    return data, ratio


def r_squared(y: Float[np.ndarray, " points"], fitted: Float[np.ndarray, " points"]) -> float:
    """1 - sum of squared residuals / spread; NaN for constant y."""
    spread = float(np.sum((y - y.mean()) ** 2))
    return 1 - float(np.sum((y - fitted) ** 2)) / spread if spread else float("nan")
