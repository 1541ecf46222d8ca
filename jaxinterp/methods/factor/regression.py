"""Factual recall by regression: what an MLP makes of each head's output, of the residual stream, and of the task.

    m ≈ sum_h beta_h a_h + t         m, a_h, t [d];   beta shared by all samples

m = the MLP's output at the last position of a prompt; a_h = the regressors there: the outputs of the heads of its layer
and the residual stream that comes in; t = the task vector. With scalar beta_h: below 0 the MLP erases what the head
wrote, about 0 it lets it pass, above 0 it amplifies it. t is read with the unembedding.

Ordinary least squares from moments that add: t is eliminated by means, and beta solves

    scalar   (R x R)        S_hk = sum_i Cov(a_h,i, a_k,i)
    diag     d times R x R  S_hk,i = Cov(a_h,i, a_k,i)
    matrix   (R d) x (R d)  the full covariance: a linear map for each regressor

Source: Lv et al. 2024 (arXiv 2403.19521). The form with scalar coefficients is our reading of it.
"""

import warnings
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.errors import UserError

Coefficients = Literal["scalar", "diag", "matrix"]
Sum = Float[Array | np.ndarray, "..."]


class Moments(NamedTuple):
    """Sums over samples; those of batches add. `cross` and `square` hold what the kind of coefficients needs.

    scalar: products summed over coordinates [R, R], [R]; diag: [d, R, R], [d, R]; matrix: [R d, R d], [R d, d].
    float32 sums of activations with large means lose digits: `fit_regression` centres first.
    """

    samples: Sum
    regressors: Sum
    target: Sum
    square: Sum
    cross: Sum
    energy: Sum


class Regression(NamedTuple):
    """beta ([R], [R, d] or [R, d, d] as y_i = sum_j x_j beta[h, j, i]), t, R^2 in sample, and the condition number of
    what was solved (the worst, where several were)."""

    beta: Float[np.ndarray, " regressors *kind"]
    task: Float[np.ndarray, " d"]
    r_squared: float
    condition: float
    kind: str


def moments(
    regressors: Float[Array, "samples regressors d"],
    target: Float[Array, "samples d"],
    kind: Coefficients = "scalar",
) -> Moments:
    """The sums of one batch.

    Raises:
      UserError: kind is unknown.
    """
    if kind not in ("scalar", "diag", "matrix"):
        raise UserError(f"kind={kind!r} must be 'scalar', 'diag' or 'matrix'.")
    return _sums(jnp.asarray(regressors), jnp.asarray(target), kind, jnp)


def solve(sums: Moments, *, kind: Coefficients = "scalar", intercept: bool = True, ridge: float = 0.0) -> Regression:
    """beta, t and R^2 from sums, in float64.

    Where the sums leave beta open (collinear regressors, fewer samples than unknowns), it is the shortest of the best
    ones, as `numpy.linalg.lstsq` of the centred samples has it, with a warning; the prediction is determined. The
    condition number is that of what was to be solved, infinite where it is singular to rounding.

    Args:
      intercept: whether there is a task vector t; without it R^2 is about 0, not about the mean.
      ridge: added to the diagonal, in units of the mean diagonal entry (collinear regressors need it).
    Raises:
      UserError: ridge is negative, or nothing was summed.
    """
    if ridge < 0 or float(sums.samples) < 1:
        raise UserError(f"ridge={ridge} must not be negative, and samples={float(sums.samples):g} at least 1.")
    n = float(sums.samples)
    a, m = np.asarray(sums.regressors, np.float64) / n, np.asarray(sums.target, np.float64) / n
    square, cross = np.asarray(sums.square, np.float64) / n, np.asarray(sums.cross, np.float64) / n
    energy = np.asarray(sums.energy, np.float64) / n
    if intercept:
        square, cross, energy = square - _square(a, kind), cross - _cross(a, m, kind), energy - m**2
    size = square.shape[-1]
    scale = np.trace(square, axis1=-2, axis2=-1) / size
    damped = square + ridge * np.multiply.outer(scale, np.eye(size))
    inverse, condition = _inverse(damped)
    if kind == "diag":
        flat = (inverse @ cross[..., None])[..., 0]  # [d, R]
        explained = 2 * np.sum(flat * cross) - np.einsum("dh,dhk,dk->", flat, square, flat)
        beta = flat.T
    else:
        flat = inverse @ cross
        explained = 2 * np.sum(flat * cross) - np.sum(flat * (square @ flat))
        beta = flat if kind == "scalar" else flat.reshape(len(a), a.shape[1], -1)
    task = m - _apply(a, beta, kind) if intercept else np.zeros_like(m)
    return Regression(beta, task, float(explained / max(energy.sum(), 1e-300)), condition, kind)


def fit_regression(
    regressors: Float[Array, "samples regressors d"],
    target: Float[Array, "samples d"],
    *,
    kind: Coefficients = "scalar",
    intercept: bool = True,
    ridge: float = 0.0,
) -> Regression:
    """`solve(moments(...))` for samples that are there at once, in float64 and about their means throughout."""
    x, y = np.asarray(regressors, np.float64), np.asarray(target, np.float64)
    x_mean, y_mean = (x.mean(axis=0), y.mean(axis=0)) if intercept else (np.zeros_like(x[0]), np.zeros_like(y[0]))
    centred = solve(_sums(x - x_mean, y - y_mean, kind, np), kind=kind, intercept=intercept, ridge=ridge)
    task = centred.task + y_mean - _apply(x_mean, centred.beta, kind)
    return centred._replace(task=task if intercept else centred.task)


def predict(
    regression: Regression, regressors: Float[Array | np.ndarray, "samples regressors d"]
) -> Float[np.ndarray, "samples d"]:
    """sum_h beta_h a_h + t, for every sample."""
    rows = np.asarray(regressors, np.float64)
    return np.stack([_apply(one, regression.beta, regression.kind) for one in rows]) + regression.task


def r_squared(
    prediction: Float[Array | np.ndarray, "samples d"],
    target: Float[Array | np.ndarray, "samples d"],
    mean: Float[Array | np.ndarray, " d"] | None = None,
) -> float:
    """1 - |m - m̂|^2 / |m - mean|^2: below 0 is worse than the mean.

    Args:
      mean: what the prediction is compared with. Held out: the mean of the training samples. None: the mean of these
        samples, which a prediction does not know: from 30 training samples, the mean alone scores -.15 on 10 others.
    """
    y = np.asarray(target, np.float64)
    compared = y.mean(axis=0) if mean is None else np.asarray(mean, np.float64)
    return float(1 - np.sum((y - np.asarray(prediction)) ** 2) / np.sum((y - compared) ** 2))


def lens(
    task: Float[Array | np.ndarray, " d"], unembedding: Float[Array | np.ndarray, "d vocab"]
) -> Float[np.ndarray, " vocab"]:
    """What a task vector says about each token: t W_U minus its mean over tokens."""
    logits = np.asarray(task, np.float64) @ np.asarray(unembedding, np.float64)
    return logits - logits.mean()


def less_suppression(
    added: Float[Array, "*axes d"], direction: Float[Array, " d"], scale: float
) -> Float[Array, "*axes d"]:
    """What a layer adds, with its part along a direction multiplied by `scale`: anti-overconfidence undone by scale 0.

    added + (scale - 1) (added . u) u,  u = direction / |direction|
    """
    unit = direction / jnp.maximum(jnp.linalg.norm(direction), 1e-12)
    return added + (scale - 1) * (added @ unit)[..., None] * unit


def _inverse(square: np.ndarray) -> tuple[np.ndarray, float]:
    """The (pseudo-)inverse of symmetric matrices without negative eigenvalues, and the worst condition number.

    Eigenvalues below 10 eps R of the largest are rounding of 0: a sum of products has no more digits.
    """
    values, vectors = np.linalg.eigh(square)
    least = 10 * np.finfo(np.float64).eps * square.shape[-1] * values[..., -1:]
    kept = values > least
    condition = float(np.max(values[..., -1] / values[..., 0])) if kept.all() else float("inf")
    if not kept.all():
        warnings.warn(
            f"{int(np.sum(~kept))} of {kept.size} directions of the regressors do not vary on their own: the shortest "
            "coefficients are taken. Leave regressors out, take more samples, or give a ridge.",
            stacklevel=4,
        )
    turned = vectors * np.where(kept, 1 / np.where(kept, values, 1), 0)[..., None, :]
    return turned @ np.swapaxes(vectors, -1, -2), condition


def _sums(x: Any, y: Any, kind: str, xp: Any) -> Moments:
    """The sums of `Moments`, with numpy or jax.numpy as `xp`."""
    if kind == "scalar":
        square, cross = xp.einsum("nhd,nkd->hk", x, x), xp.einsum("nhd,nd->h", x, y)
    elif kind == "diag":
        square, cross = xp.einsum("nhd,nkd->dhk", x, x), xp.einsum("nhd,nd->dh", x, y)
    else:
        flat = x.reshape(x.shape[0], -1)
        square, cross = flat.T @ flat, flat.T @ y
    return Moments(xp.asarray(float(len(x))), x.sum(axis=0), y.sum(axis=0), square, cross, xp.sum(y**2, axis=0))


def _square(a: np.ndarray, kind: str) -> np.ndarray:
    if kind == "scalar":
        return a @ a.T
    if kind == "diag":
        return np.einsum("hd,kd->dhk", a, a)
    return np.outer(a.ravel(), a.ravel())


def _cross(a: np.ndarray, m: np.ndarray, kind: str) -> np.ndarray:
    if kind == "scalar":
        return a @ m
    return (a * m).T if kind == "diag" else np.outer(a.ravel(), m)


def _apply(a: np.ndarray, beta: np.ndarray, kind: str) -> np.ndarray:
    if kind == "scalar":
        return beta @ a
    return np.sum(beta * a, axis=0) if kind == "diag" else np.einsum("hj,hji->i", a, beta)
