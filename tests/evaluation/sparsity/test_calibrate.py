"""Streaming statistics against NumPy on the whole array; sums that add over parts and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.calibrate import calibrate, quantile, summarise
from jaxinterp.models.leave_out import BySize
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.mesh import make_mesh

SIZES = {"vocab_size": 20, "d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "d_mlp": 12}
HIDDEN, PRE = "blocks/0/mlp/hidden", "blocks/0/mlp/pre"


@pytest.fixture(scope="module")
def model():
    return initialise(TransformerConfig(**SIZES, context=8, rotary_dimensions=8), jax.random.key(0))


def windows(seed):
    rng = np.random.default_rng(seed)
    weight = np.ones((8, 6), np.float32)
    weight[:, 0] = 0
    return {"tokens": rng.integers(0, 20, (8, 6)).astype(np.int32), "weight": weight}


WANTED = {"hidden": (HIDDEN, BySize()), "gate": (PRE, BySize(activation="silu"))}


def test_streaming_sums_are_those_of_the_whole_text(model):
    batches = [windows(0), windows(1)]
    found = calibrate(model, batches, WANTED)
    hidden = np.concatenate([np.asarray(run(model, batch["tokens"])[HIDDEN])[:, 1:] for batch in batches])
    rows = hidden.reshape(-1, 12).astype(np.float64)
    assert float(found["hidden"].tokens) == len(rows) == 80
    np.testing.assert_allclose(found["hidden"].mean(), rows.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["hidden"].mean_size(), np.abs(rows).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["hidden"].mean_square(), (rows**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["hidden"].norms(), np.linalg.norm(rows, axis=0), rtol=1e-5)
    for sparsity in (0.25, 0.5, 0.9):
        threshold = quantile(found["hidden"], sparsity)
        assert threshold == pytest.approx(np.quantile(np.abs(rows), sparsity), rel=2**-6)
        assert (np.abs(rows) <= threshold).mean() == pytest.approx(sparsity, abs=0.01)
    s = np.asarray(jax.nn.silu(run(model, batches[0]["tokens"])[PRE]))
    assert quantile(found["gate"], 1.0) > np.abs(s[:, 1:]).max() * 0.99
    with_sink = calibrate(model, [batch | {"weight": np.ones((8, 6), np.float32)} for batch in batches], WANTED)
    assert not np.allclose(with_sink["hidden"].mean(), rows.mean(0), rtol=1e-3)  # broken: no weights


def test_statistics_are_the_same_on_eight_devices_and_in_two_halves(model):
    whole = calibrate(model, [windows(0)], WANTED)
    spread = calibrate(model, [windows(0)], WANTED, mesh=make_mesh(8))
    halves = [{name: array[part] for name, array in windows(0).items()} for part in (slice(0, 4), slice(4, 8))]
    parts = [calibrate(model, [half], WANTED) for half in halves]
    for name in WANTED:
        for other in (spread[name], parts[0][name] + parts[1][name]):
            np.testing.assert_array_equal(other.histogram, whole[name].histogram)
            np.testing.assert_allclose(other.square, whole[name].square, rtol=1e-6)
            assert other.tokens == whole[name].tokens
        assert (parts[0][name].histogram != whole[name].histogram).any()  # broken: half the text


def test_quantiles_of_a_known_distribution():
    """Scores k / 1000 for k = 1..1000: the quantile is the share, whatever the scale."""
    for scale in (1e-20, 1.0, 1e6):
        a = jnp.asarray(scale * np.arange(1, 1001, dtype=np.float32).reshape(10, 100) / 1000)
        summary = summarise(a, jnp.ones(10))
        for sparsity in (0.1, 0.65, 0.9):
            assert quantile(summary, sparsity) == pytest.approx(scale * sparsity, rel=2**-7)
    linear = np.histogram(np.asarray(a), bins=100, range=(0, 1e9))[0]  # broken: equal bins lose the scale
    assert linear[0] == 1000


def test_bad_calibration_is_refused(model):
    with pytest.raises(UserError, match="no token of the calibration text"):
        calibrate(model, [windows(0) | {"weight": np.zeros((8, 6), np.float32)}], WANTED)
    with pytest.raises(UserError, match=r"sparsity=1\.2 must"):
        quantile(summarise(jnp.ones((2, 3)), jnp.ones(2)), 1.2)
