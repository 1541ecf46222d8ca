"""Streaming statistics against NumPy on the whole array; sums that add over parts and devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.calibrate import calibrate, quantile, summarise
from jaxinterp.models.leave_out import BySize
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.mesh import make_mesh
from tests.evaluation.sparsity import calibrate_worker

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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,model=4"])
def test_two_processes_sum_what_one_does(tmp_path, mesh):
    """Every process gets the sums over the whole text, not those over its own windows."""
    command = [sys.executable, "-m", "experiments.launch", "2", "tests.evaluation.sparsity.calibrate_worker"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, str(tmp_path), mesh], env=os.environ | flags, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes, 8 devices" in done.stdout
    alone = calibrate_worker.sums()
    assert float(alone["hidden.tokens"]) == 80 and len(alone) == 10
    for process in range(2):
        found = np.load(tmp_path / f"{process}.npz")
        assert set(found) == set(alone)
        for name, value in alone.items():
            if "histogram" in name:  # a score at a bucket's edge may fall on its other side: programs round differently
                assert found[name].sum() == value.sum() and np.abs(found[name] - value).sum() < 0.02 * value.sum()
            else:
                np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    half = calibrate(load("tiny").model, [{k: v[:4] for k, v in calibrate_worker.windows(0).items()}],
                     {"hidden": (calibrate_worker.HIDDEN, BySize())})["hidden"]  # fmt: skip
    assert not np.allclose(half.square, alone["hidden.square"], rtol=0.1)  # broken: its own windows alone


def test_windows_that_cannot_be_spread_are_refused(model):
    batch = {name: array[:6] for name, array in windows(0).items()}
    with pytest.raises(UserError, match=r"windows of a batch=6"):
        calibrate(model, [batch], WANTED, mesh=make_mesh(8))


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
