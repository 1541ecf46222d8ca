"""The sparse passes in numpy and float64, and what it means to agree with them."""

import numpy as np


def wide(array):
    """A jax or numpy array, bfloat16 too, as float64."""
    return np.asarray(array).astype(np.float64)


def pre_activations(x, rows, bias):
    return wide(x) @ wide(rows).T + wide(bias)


def topk(pre, k):
    """Greatest first, ties to the lowest index, NaN before everything."""
    order = np.argsort(np.where(np.isnan(pre), -np.inf, -pre), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(pre, order, axis=1), order


def rounding(x, rows, bias):
    """How far a float32 sum may lie from the exact one, per token and feature."""
    finite = np.where(np.isfinite(wide(bias)), np.abs(wide(bias)), 0)
    return 2.0**-23 * 8 * (np.abs(wide(x)) @ np.abs(wide(rows)).T + finite)


def check_selection(values, indices, x, rows, bias):
    """The selection is that of float64, but for features within rounding of the k-th; values agree within rounding."""
    values, indices = wide(values), np.asarray(indices)
    pre, gap = pre_activations(x, rows, bias), rounding(x, rows, bias)
    features = pre.shape[1]
    assert indices.min() >= 0 and indices.max() < features
    assert all(len(set(row)) == len(row) for row in indices), "a feature is chosen twice"
    chosen, slack = (np.take_along_axis(array, indices, axis=1) for array in (pre, gap))
    finite = np.isfinite(chosen)
    assert (np.isneginf(values) == np.isneginf(chosen)).all()
    assert (np.abs(values - chosen)[finite] <= slack[finite]).all()
    assert (np.diff(np.where(finite, values, -1e300), axis=1) <= 0).all(), "values are not in falling order"
    worst = np.min(np.where(finite, chosen + slack, chosen), axis=1, keepdims=True)
    left_out = pre.copy()
    np.put_along_axis(left_out, indices, -np.inf, axis=1)
    assert (left_out - np.where(np.isfinite(left_out), gap, 0) <= worst).all(), "a greater feature is left out"


def gather_sum(values, indices, rows):
    padded = np.concatenate([wide(rows), np.zeros((1, rows.shape[1]))])
    return np.einsum("nk,nkd->nd", wide(values), padded[np.asarray(indices)])


def sampled_dot(g, rows, indices):
    padded = np.concatenate([wide(rows), np.zeros((1, rows.shape[1]))])
    return np.einsum("nd,nkd->nk", wide(g), padded[np.asarray(indices)])


def outer_sum(values, indices, g, features):
    total = np.zeros((features + 1, g.shape[1]))
    for v, i, row in zip(wide(values), np.asarray(indices), wide(g), strict=True):
        np.add.at(total, i, v[:, None] * row)
    return total[:features]


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(wide(got), expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max()))
