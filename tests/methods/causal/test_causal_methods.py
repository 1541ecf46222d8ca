"""LinEAS, DAS and trained vectors, each through `fit`, on problems whose answer is planted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.causal.das import DAS
from jaxinterp.methods.causal.lineas import LinEAS, gaussian_map, prox, sorted_map, transport_cost
from jaxinterp.methods.causal.trained_vector import TrainedVector
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.rules import EXACT
from jaxinterp.models.run import run
from jaxinterp.training.fit import fit


class Table(eqx.Module):
    """A vector for every token at `a`; logits x R of the last."""

    vectors: jax.Array
    readout: jax.Array

    def __call__(self, tokens, *, tap, rules=EXACT):
        return tap("a", self.vectors[tokens]) @ self.readout


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def table(vectors, readout=None):
    vectors = jnp.asarray(vectors)
    readout = jnp.zeros((vectors.shape[1], vectors.shape[0])) if readout is None else jnp.asarray(readout)
    return Subject(Table(vectors, readout), None, "table")


def planted_transport(n=512, d=20):
    """Three channels of the target differ: scaled and shifted."""
    source, target = draw(0, n, d), draw(1, n, d)
    target[:, :3] = 2 * target[:, :3] + 1.5
    prompts = [tuple((0, int(i)) for i in range(start, start + n)) for start in (0, n)]
    return table(np.concatenate([source, target])), prompts, (source, target)


@pytest.mark.parametrize(("gamma", "support"), [(0.3, {0, 1, 2}), (0.0, set(range(20)))])
def test_lineas_finds_the_planted_channels(gamma, support):
    """Exactly the planted ones with the penalty (tau = rate * gamma), all of them without."""
    subject, (source, target), (x, y) = planted_transport()
    maps = fit(LinEAS(source, target, ("a",), gamma=gamma), subject, steps=150).decomposition
    moved = np.abs(np.asarray(maps.scale[0]) - 1) + np.abs(np.asarray(maps.shift[0])) > 0
    assert set(np.flatnonzero(moved)) == support and maps.support() >= len(support)
    if not gamma:
        omega, shift = sorted_map(jnp.asarray(x), jnp.asarray(y))
        np.testing.assert_allclose(maps.scale[0], omega, atol=0.02)
        np.testing.assert_allclose(maps.shift[0], shift, atol=0.02)
    before, after = (run(subject.model, jnp.asarray(source[:4]), edits=maps.edits(s))["a"] for s in (0.0, 1.0))
    np.testing.assert_array_equal(before, subject.model.vectors[jnp.asarray(source[:4])])
    assert float(jnp.abs(after - before).max()) > 0.5


def test_a_threshold_of_gamma_alone_leaves_nothing():
    """The printed algorithm's tau = gamma, against tau = rate * gamma: a decaying rate then loses every entry."""
    step, gamma, shift = 0.01, 0.3, jnp.asarray([1.5, 0.0])
    assert not prox(shift * step, gamma, gamma).any()
    assert prox(shift * step, step * gamma, step * gamma).tolist()[0] > 0


def test_closed_forms_of_one_layer():
    with jax.enable_x64(True):
        x, y = (jnp.asarray(draw(seed, 64, 3), jnp.float64) for seed in (0, 1))
        omega, shift = sorted_map(x, y)
        slope = jax.grad(lambda maps: transport_cost(maps[0] * x + maps[1], y))((omega, shift))
        assert max(float(jnp.abs(part).max()) for part in slope) < 1e-12
        gauss = gaussian_map(x, y)
        costs = [float(transport_cost(a * x + b, y)) for a, b in ((omega, shift), gauss, (1.0, 0.0))]
        assert costs[0] <= costs[1] < costs[2]
        np.testing.assert_allclose((gauss[0] * x + gauss[1]).std(0, ddof=1), y.std(0, ddof=1), rtol=1e-12)
        flat = gaussian_map(x.at[:, 0].set(3.0), y)
        assert (float(flat[0][0]), float(flat[1][0])) == (1.0, 0.0)
        v = jnp.asarray([3.0, -0.2, 1.0])
        by_grid = [abs(float(t)) for t in prox(v, 0.5, 0.0)]
        np.testing.assert_allclose(by_grid, [2.5, 0.0, 0.5])
        np.testing.assert_allclose(jnp.linalg.norm(prox(v, 0.0, 1.0)), jnp.linalg.norm(v) - 1)


def one_direction(tokens=40, d=6):
    """Whether token 0 or 1 follows is the sign of x . v."""
    vectors = draw(3, tokens, d)
    v = draw(4, d)
    v /= np.linalg.norm(v)
    readout = np.zeros((d, tokens), np.float32)
    readout[:, 0], readout[:, 1] = 6 * v, -6 * v
    return table(vectors, readout), v, vectors @ v


def test_das_finds_the_direction_that_decides():
    subject, v, side = one_direction()
    positive, negative = (np.flatnonzero(sign * side > 0.2) for sign in (1, -1))
    pairs = [(int(a), int(b)) for a, b in zip(positive, negative, strict=False)]
    base = tuple((place[0],) for place in pairs) + tuple((place[1],) for place in pairs)
    source = tuple((place[1],) for place in pairs) + tuple((place[0],) for place in pairs)
    answer = (1,) * len(pairs) + (0,) * len(pairs)
    result = fit(DAS(base, source, answer, "a", rate=0.05), subject, steps=150, log_every=150)
    basis = np.asarray(result.decomposition.basis())
    np.testing.assert_allclose(basis @ basis.T, np.eye(1), atol=1e-5)
    assert abs(float(basis[0] @ v)) > 0.97
    assert result.history[-1]["accuracy"] > 0.9
    before = fit(DAS(base, source, answer, "a"), subject, steps=1, log_every=1)
    assert before.history[-1]["accuracy"] < 0.8, "a random direction does not do it"


def test_a_trained_vector_points_to_the_answer():
    subject, v, _ = one_direction()
    method = TrainedVector(tuple((i,) for i in range(20)), (1,) * 20, "a", decay=0.01)
    result = fit(method, subject, steps=80, log_every=80)
    delta = np.asarray(result.decomposition.delta)
    assert float(delta @ v) / np.linalg.norm(delta) < -0.8
    tokens, readout = jnp.arange(20), subject.model.readout
    before, after = (
        -jax.nn.log_softmax((subject.model.vectors[tokens] + add) @ readout)[:, 1].mean() for add in (0.0, delta)
    )
    assert float(after) < 0.25 * float(before)


def test_bad_settings_are_refused():
    subject, *_ = one_direction()
    with pytest.raises(UserError, match="give equally many"):
        fit(LinEAS(((0, 1),), ((0, 1), (0, 2)), ("a",)), subject, steps=1)
    with pytest.raises(UserError, match="one of each for every pair"):
        fit(DAS(((0,),), ((1,),), (), "a"), subject, steps=1)
    with pytest.raises(UserError, match="give one for each"):
        fit(TrainedVector(((0,),), (), "a"), subject, steps=1)
