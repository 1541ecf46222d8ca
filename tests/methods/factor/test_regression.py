"""Regression of an MLP's output: planted coefficients, all kinds against lstsq, collinearity, held-out R^2."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.factor import regression as reg


def planted(seed, samples=400, d=32):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(samples, 3, d)) + rng.normal(size=(3, d))
    task = rng.normal(size=d)
    target = np.einsum("h,nhd->nd", [-1, 0.5, 0], a) + task + 0.1 * rng.normal(size=(samples, d))
    return a, target, task


def test_planted_coefficients_are_recovered():
    """|delta beta| < .02, cos(t, t̂) > .99, three seeds; held-out R^2 near 1, and about 0 without the regressors."""
    for seed in range(3):
        a, target, task = planted(seed)
        found = reg.fit_regression(jnp.asarray(a[:300], jnp.float32), jnp.asarray(target[:300], jnp.float32))
        assert np.abs(found.beta - [-1, 0.5, 0]).max() < 0.02
        assert found.task @ task / np.linalg.norm(found.task) / np.linalg.norm(task) > 0.99
        held_out = reg.r_squared(reg.predict(found, a[300:]), target[300:])
        assert held_out > 0.98 and found.r_squared > 0.98 and found.condition < 2
        shuffled = reg.fit_regression(jnp.asarray(a[:300]), jnp.asarray(target[:300][::-1]))
        assert reg.r_squared(reg.predict(shuffled, a[300:]), target[300:]) < 0.3
        train_mean = target[:300].mean(axis=0)
        by_mean = np.broadcast_to(train_mean, target[300:].shape)
        assert reg.r_squared(by_mean, target[300:], train_mean) == 0 > reg.r_squared(by_mean, target[300:])
    without = reg.fit_regression(jnp.asarray(a), jnp.asarray(target), intercept=False)
    assert np.abs(without.beta - [-1, 0.5, 0]).max() > 0.02, "the task vector leaks into beta"


@pytest.mark.parametrize("kind", ["scalar", "diag", "matrix"])
def test_every_kind_is_least_squares(float64, kind):
    a, target, _ = planted(0, 60, 4)
    a_mean, m_mean = a.mean(axis=0), target.mean(axis=0)
    found = reg.fit_regression(jnp.asarray(a), jnp.asarray(target), kind=kind)
    x, y = a - a_mean, target - m_mean
    if kind == "scalar":
        wanted = np.linalg.lstsq(x.transpose(0, 2, 1).reshape(-1, 3), y.reshape(-1), rcond=None)[0]
    elif kind == "diag":
        wanted = np.stack([np.linalg.lstsq(x[:, :, i], y[:, i], rcond=None)[0] for i in range(4)], axis=1)
    else:
        wanted = np.linalg.lstsq(x.reshape(60, -1), y, rcond=None)[0].reshape(3, 4, 4)
    np.testing.assert_allclose(found.beta, wanted, atol=1e-9)
    assert found.r_squared == pytest.approx(reg.r_squared(reg.predict(found, a), target), abs=1e-9)
    sums = [reg.moments(jnp.asarray(a[part]), jnp.asarray(target[part]), kind) for part in (slice(20), slice(20, 60))]
    added = reg.Moments(*(one + other for one, other in zip(*sums, strict=True)))
    streamed = reg.solve(added, kind=kind)
    np.testing.assert_allclose(streamed.beta, wanted, atol=1e-9)
    np.testing.assert_allclose(streamed.task, found.task, atol=1e-9)


def test_collinear_regressors_show_in_the_condition_and_a_ridge_mends_them(without_annotations, float64):
    a, target, _ = planted(0)
    nearly = np.concatenate([a, a[:, :1] + 1e-5 * np.random.default_rng(1).normal(size=a[:, :1].shape)], axis=1)
    found = reg.fit_regression(jnp.asarray(nearly), jnp.asarray(target))
    assert 1e6 < found.condition < np.inf
    damped = reg.fit_regression(jnp.asarray(nearly), jnp.asarray(target), ridge=1e-4)
    assert damped.condition < 1e6
    np.testing.assert_allclose(damped.beta[[0, 3]], -0.5, atol=0.02)
    with pytest.raises(UserError, match="ridge=-1"):
        reg.fit_regression(jnp.asarray(a), jnp.asarray(target), ridge=-1.0)
    with pytest.raises(UserError, match="kind='full'"):
        reg.moments(jnp.asarray(a), jnp.asarray(target), "full")


@pytest.mark.parametrize("kind", ["scalar", "diag", "matrix"])
@pytest.mark.parametrize("fault", ["twice", "zero", "few"])
def test_open_coefficients_are_the_shortest_and_say_so(float64, kind, fault):
    """A regressor that is there twice or is 0, or fewer samples than unknowns: NumPy's lstsq, and a warning.

    Before, a zero was NumPy's LinAlgError, and a regressor that is there twice gave coefficients of rounding errors.
    """
    a, target, _ = planted(2, 40, 5)
    if fault == "few" and kind != "scalar":
        a, target = a[: 3 if kind == "diag" else 6], target[: 3 if kind == "diag" else 6]
    elif fault == "few":
        a, target = a[:1], target[:1]
    else:
        a[:, 2] = a[:, 0] if fault == "twice" else 0
    with pytest.warns(UserWarning, match="do not vary on their own"):
        found = reg.fit_regression(jnp.asarray(a), jnp.asarray(target), kind=kind)
    x, y = a - a.mean(axis=0), target - target.mean(axis=0)
    if kind == "scalar":
        wanted = np.linalg.lstsq(x.transpose(0, 2, 1).reshape(-1, 3), y.reshape(-1), rcond=1e-6)[0]
    elif kind == "diag":
        wanted = np.stack([np.linalg.lstsq(x[:, :, i], y[:, i], rcond=1e-6)[0] for i in range(5)], axis=1)
    else:
        wanted = np.linalg.lstsq(x.reshape(len(x), -1), y, rcond=1e-6)[0].reshape(3, 5, 5)
    np.testing.assert_allclose(found.beta, wanted, atol=1e-7)
    assert found.condition == np.inf
    if fault == "twice" and kind != "matrix":
        np.testing.assert_allclose(found.beta[0], found.beta[2], atol=1e-9)


def test_large_means_do_not_cost_digits():
    """Means of 25,000, as in a massive activation, float32 samples: centring first keeps beta."""
    a, target, _ = planted(0)
    a[:, 0] += 25_000
    target = target - 25_000
    found = reg.fit_regression(jnp.asarray(a, jnp.float32), jnp.asarray(target, jnp.float32))
    assert np.abs(found.beta - [-1, 0.5, 0]).max() < 0.02
    streamed = reg.solve(reg.moments(jnp.asarray(a, jnp.float32), jnp.asarray(target, jnp.float32)))
    assert np.abs(streamed.beta - [-1, 0.5, 0]).max() > 0.02, "this is what sums in float32 lose"


def test_the_lens_and_the_scaled_component():
    unembedding = np.eye(4, 6)
    np.testing.assert_allclose(reg.lens(np.array([3.0, 0, 0, 0]), unembedding), [2.5, *[-0.5] * 5])
    added, direction = jnp.array([[3.0, 1.0]]), jnp.array([2.0, 0.0])
    np.testing.assert_allclose(reg.less_suppression(added, direction, 0.0), [[0, 1]])
    np.testing.assert_allclose(reg.less_suppression(added, direction, 1.0), added)
