"""Each lifter's worked example against an independent computation, on one device, on a mesh, and resumed."""

from itertools import pairwise

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Needs
from jaxinterp.data.activations import harvest_jit
from jaxinterp.data.windows import batches
from jaxinterp.methods import SparseAutoencoder, Together
from jaxinterp.methods.recipes import Sums
from jaxinterp.models.tiny import planted_transformer
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from tests.extending.closed_form import WriteDirections
from tests.extending.multiplicative import MultiplicativeUpdates
from tests.extending.streaming import StreamingPCA
from tests.goldens.trainings import MLP, SMALL, subject, text

SIZES = {"site": MLP, "batch_size": 64, "buffer_batches": 2, "log_every": 2}
KEPT = {**SIZES, "steps": 8, "rows": 100}


def rows_of(name, count):
    """The first rows that `fit` reads with seed 0, and their weights."""
    model, read = subject().model, iter(batches(text(), 4, seed=0, shuffle_within=None))
    taken = [harvest_jit(model, next(read), (name,)) for _ in range(count)]
    return np.concatenate([rows.arrays[name] for rows in taken], axis=1), np.concatenate(
        [rows.weight for rows in taken], axis=1
    )


def factorised(features=8, sweeps=8):
    """Lee and Seung's updates in float64, from the start values that the seed gives."""
    x, weight = rows_of(f"{MLP}/hidden", 2)
    x = (x * weight[..., None]).reshape(-1, x.shape[-1]).astype(np.float64)
    code_key, part_key = jax.random.split(jax.random.split(jax.random.key(0))[0])
    f = np.asarray(jax.random.uniform(part_key, (features, x.shape[1]), minval=0.1), np.float64)
    z = np.asarray(jax.random.uniform(code_key, (len(x), features), minval=0.1), np.float64)
    for _ in range(sweeps):
        z *= (x @ f.T) / (z @ f @ f.T + 1e-9)
        f *= (z.T @ x) / (z.T @ z @ f + 1e-9)
    return z, f


@pytest.fixture(scope="module")
def swept():
    return fit(MultiplicativeUpdates(), subject(), text(), **KEPT)


def test_kept_rows_are_swept_as_numpy_does(swept):
    z, f = factorised()
    np.testing.assert_allclose(swept.decomposition.parts, f, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(swept.state.method.aux.array, z, rtol=1e-4, atol=1e-6)
    assert np.abs(factorised(sweeps=7)[1] - f).max() > 1e-3, "one sweep fewer would be seen"
    errors = [row["error"] for row in swept.history]
    assert all(after < before for before, after in pairwise(errors)) and "loss" not in swept.history[0]
    assert swept.history[-1]["tokens"] == 8 * 128, "100 rows are two batches"


def test_kept_rows_are_the_same_on_a_mesh_and_lie_beside_their_codes(swept):
    many = fit(MultiplicativeUpdates(), subject(), text(), **KEPT, mesh=make_mesh(2, 4))
    np.testing.assert_allclose(many.decomposition.parts, swept.decomposition.parts, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(many.state.method.aux.array, swept.state.method.aux.array, rtol=1e-4, atol=1e-6)
    assert many.state.method.aux.array.sharding.spec == P("data")
    assert many.decomposition.parts.sharding.spec == P("feature")


def test_a_resumed_sweep_is_the_uninterrupted_one(swept, tmp_path):
    options = {**KEPT, "checkpoint": tmp_path / "c", "save_every": 2}
    fit(MultiplicativeUpdates(), subject(), text(), **options, stop_after=4)
    again = fit(MultiplicativeUpdates(), subject(), text(), **options, resume=True)
    np.testing.assert_array_equal(again.decomposition.parts, swept.decomposition.parts)
    np.testing.assert_array_equal(again.state.method.aux.array, swept.state.method.aux.array)
    with pytest.raises(UserError, match="was made with rows=100, not 128"):
        fit(MultiplicativeUpdates(), subject(), text(), **options | {"rows": 128}, resume=True)


def test_a_method_that_has_converged_ends_and_stays_ended(tmp_path):
    easy = MultiplicativeUpdates(tolerance=1e9)
    options = {**KEPT, "checkpoint": tmp_path / "c"}
    first = fit(easy, subject(), text(), **options)
    assert int(first.state.step) == 2, "the first logged step"
    again = fit(easy, subject(), text(), **options, resume=True)
    assert int(again.state.step) == 2 and [row["step"] for row in again.history] == [2]
    np.testing.assert_array_equal(again.decomposition.parts, first.decomposition.parts)


STREAM = {**SIZES, "steps": 4}


@pytest.fixture(scope="module")
def principal():
    """Mean and leading eigenvectors in float64 of the rows that left the buffer: those read, less those still in it."""
    result = fit(StreamingPCA(), subject(), text(), **STREAM)
    y, w = rows_of(f"{MLP}/out", 2 + 4)
    left, left_w = (
        np.asarray(result.state.buffer.arrays[f"{MLP}/out"], np.float64),
        np.asarray(result.state.buffer.weight),
    )

    def moment(power, about):
        each = [(np.asarray(a, np.float64) - about, np.asarray(b)) for a, b in ((y, w), (left, left_w))]
        sums = [np.einsum("ls,lsd,lse->de", b, a, a) if power == 2 else np.einsum("ls,lsd->d", b, a) for a, b in each]
        return (sums[0] - sums[1]) / (w.sum() - left_w.sum())

    mean = moment(1, 0.0)
    _, vectors = np.linalg.eigh(moment(2, mean))
    return result, mean, vectors[:, ::-1][:, :4].T


def test_moments_of_a_stream_are_solved_as_numpy_does(principal):
    result, mean, vectors = principal
    np.testing.assert_allclose(result.decomposition.mean, mean, rtol=0, atol=1e-6)
    cosines = np.abs(np.sum(np.asarray(result.decomposition.directions) * vectors, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    assert np.abs(vectors[0] @ vectors[1]) < 1e-9, "any two others would give 0"


def test_moments_of_a_stream_are_the_same_on_a_mesh(principal):
    _, _, vectors = principal
    many = fit(StreamingPCA(), subject(), text(), **STREAM, mesh=make_mesh(2, 4))
    cosines = np.abs(np.sum(np.asarray(many.decomposition.directions) * vectors, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


def test_a_run_that_was_stopped_in_its_second_pass_is_the_uninterrupted_one(principal, tmp_path):
    options = {**STREAM, "checkpoint": tmp_path / "c", "save_every": 2}
    fit(StreamingPCA(), subject(), text(), **options, stop_after=6)
    again = fit(StreamingPCA(), subject(), text(), **options, resume=True)
    np.testing.assert_array_equal(again.decomposition.directions, principal[0].decomposition.directions)
    assert [row["step"] for row in again.history] == [2, 4, 6, 8], "each once"


def test_the_weights_alone_need_no_text():
    result = fit(WriteDirections(1), subject())
    weight = np.asarray(planted_transformer(jax.random.key(0), SMALL).blocks[1].mlp.down_proj.weight)
    rows = np.asarray(result.decomposition.rows)
    np.testing.assert_allclose(rows.T @ rows, weight.T @ weight, atol=1e-5)
    assert np.abs(rows.T @ rows - np.eye(8)).max() > 0.1
    many = fit(WriteDirections(1), subject(), mesh=make_mesh(2, 4))
    np.testing.assert_array_equal(many.decomposition.rows, rows)


def test_long_sums_lose_nothing_to_rounding():
    """A thousand times 0.1 + 2^20: float32 alone would be off by thousands of its last places."""
    sums, plain = Sums(np.float32(2**20), np.float32(0)), np.float32(2**20)
    add = jax.jit(Sums.add)
    for _ in range(1000):
        sums, plain = add(sums, np.float32(0.1)), plain + np.float32(0.1)
    truth = 2**20 + 1000 * float(np.float32(0.1))
    assert abs(float(sums.wide()) - truth) < 1e-4 < 1 < abs(float(plain) - truth)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        (MultiplicativeUpdates(), {"steps": 2}, "rows=None: this method sweeps over kept rows"),
        (MultiplicativeUpdates(), {"rows": 64}, "steps=None: MultiplicativeUpdates is trained step by step"),
        (SparseAutoencoder(features=8, k=2), {"steps": 2, "rows": 64}, "rows=64: this method keeps no rows"),
        (SparseAutoencoder(features=8, k=2), {"steps": 2, "tokens": None}, "tokens=None: this method reads text"),
        (
            Together({"a": SparseAutoencoder(features=8, k=2), "b": MultiplicativeUpdates()}),
            {"steps": 2},
            r"take their rows in different ways \(a: stream, b: kept\)",
        ),
    ],
)
def test_rows_and_text_that_do_not_fit_the_method_are_refused(method, change, words):
    options = {"tokens": text(), "site": MLP, "batch_size": 64} | change
    with pytest.raises(UserError, match=words):
        fit(method, subject(), **options)


def test_needs_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"rows='none' harvests nothing, but the method names"):
        Needs("x", "x", rows="none")
