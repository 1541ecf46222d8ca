"""The row-space test's pattern on a built case; faithfulness and completeness on an additive and an OR toy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.circuits import (
    circuit_metric,
    circuit_size,
    complement,
    faithfulness,
    node_effects,
    overlap,
    random_circuit,
    select_nodes,
    stability,
)
from jaxinterp.causal.patch import patch_effects
from jaxinterp.causal.subspace import Swap, direction_report, orthonormal, read_space, retention, split
from jaxinterp.core.errors import UserError
from tests.causal.toys import Nodes, normal

TOKENS = jnp.zeros((2, 1), jnp.int32)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def illusion(m=12, d=4, rows=400):
    """A feature z stored only in what W cannot read (along e); and a direction that W reads and the data never uses."""
    weight = normal(0, m, d)
    space = read_space(weight)
    e = split(normal(1, m), space)[1]
    dormant = split(normal(2, m), space)[0]
    e, dormant = e / jnp.linalg.norm(e), dormant / jnp.linalg.norm(dormant)
    label = jnp.arange(rows) % 2 == 0
    z = jnp.where(label, 3.0, -3.0)
    noise = normal(4, rows, m)
    noise = noise - (noise @ dormant)[:, None] * dormant
    hidden = noise + z[:, None] * e
    return weight, e, dormant, hidden, label


def report_on(v, weight, hidden, label, dormant):
    source = jnp.roll(hidden, 1, axis=0)
    readout = weight.T @ dormant  # what follows reads the dormant direction's image, once it is there
    change = lambda x: (x @ weight) @ readout

    def effect(edit):
        return jnp.abs(change(edit(hidden)) - change(hidden))

    return direction_report(effect, v, weight, source, hidden, label)


def test_the_pattern_of_an_illusion_and_of_a_cause():
    weight, e, dormant, hidden, label = illusion()
    found = report_on((e + dormant) / 2**0.5, weight, hidden, label, dormant)
    assert found.effect > 1.0 and found.effect_row < 1e-9 and found.effect_null < 1e-9
    assert abs(found.separation_row) < 1e-6 < 1.0 < abs(found.separation_null)
    np.testing.assert_allclose([found.row_norm, found.null_norm], 0.5**0.5)
    assert found.effect_row_as_is > 1.0, "the data's part outside drives the part that is read"
    # A direction that the data uses and W reads keeps its effect in the row space.
    honest, _ = split(normal(5, 12), read_space(weight))
    honest = honest / jnp.linalg.norm(honest)
    used = hidden + jnp.where(label, 2.0, -2.0)[:, None] * honest
    true = report_on(honest, weight, used, label, dormant)
    assert true.effect_row > 0.99 * true.effect > 0 and true.effect_null == 0


def test_a_qr_basis_would_be_too_large_where_w_lacks_rank():
    weight = jnp.concatenate([normal(0, 8, 2), jnp.zeros((8, 2)), normal(1, 8, 1)], axis=1)
    v = normal(2, 8)
    row, null = split(v, read_space(weight))
    np.testing.assert_allclose(null @ weight, 0, atol=1e-9)
    np.testing.assert_allclose(retention(v, weight), jnp.linalg.norm(row) / jnp.linalg.norm(v))
    q, _ = jnp.linalg.qr(weight)
    assert float(jnp.linalg.norm(q @ (q.T @ v))) > 1.05 * float(jnp.linalg.norm(row))


def test_swapping_a_subspace():
    basis = orthonormal(normal(0, 2, 6))
    x, source = normal(1, 3, 6), normal(2, 3, 6)
    swapped = Swap(basis, source, jnp.ones((), bool))(x)
    np.testing.assert_allclose(swapped @ basis.T, source @ basis.T, atol=1e-12)
    np.testing.assert_allclose(swapped - x - ((source - x) @ basis.T) @ basis, 0, atol=1e-12)
    assert orthonormal(jnp.stack([basis[0], 2 * basis[0]])).shape == (1, 6)
    with pytest.raises(UserError, match="direction is zero"):
        orthonormal(jnp.zeros((1, 3)))


def metric(trace):
    return trace.logits[:, -1, 0]


def circuit(*nodes):
    return {"nodes": jnp.asarray([node in nodes for node in range(3)])}


FILLS = {"nodes": jnp.zeros(())}


def test_faithfulness_of_an_additive_model():
    model = Nodes("additive")
    both = faithfulness(model, TOKENS, metric, circuit(0, 1), FILLS)
    assert (both.faithfulness, both.completeness, both.model, both.empty) == (1, 0, 3, 0)
    one = faithfulness(model, TOKENS, metric, circuit(0), FILLS)
    np.testing.assert_allclose([one.faithfulness, one.completeness], [2 / 3, 1 / 3])
    effects = node_effects(patch_effects(model, TOKENS, metric, FILLS, each=(1, 2)))
    np.testing.assert_allclose(effects["nodes"], [[-2, -1, 0]] * 2)
    assert select_nodes(effects, threshold=1.5)["nodes"].tolist() == [True, False, False]
    assert select_nodes(effects, top=2)["nodes"].tolist() == [True, True, False]


def test_completeness_finds_the_backup_that_faithfulness_misses():
    model = Nodes("or")
    one = faithfulness(model, TOKENS, metric, circuit(0), FILLS)
    assert (one.faithfulness, one.completeness) == (1, 1)
    both = faithfulness(model, TOKENS, metric, circuit(0, 1), FILLS)
    assert (both.faithfulness, both.completeness) == (1, 0)
    with pytest.raises(UserError, match="do not carry it"):
        faithfulness(model, TOKENS, lambda trace: 0 * metric(trace) + 1.0, circuit(0), FILLS)


def test_controls_and_stability():
    some = {"a": jnp.arange(40) < 7, "b": jnp.zeros((3, 5), bool).at[1, 2].set(True)}
    random = random_circuit(some, 0)
    assert {name: int(mask.sum()) for name, mask in random.items()} == {"a": 7, "b": 1}
    assert circuit_size(some) == 8 and overlap(some, random)["jaccard"] < 1
    assert overlap(some, some) == {"jaccard": 1.0, "share": 1.0} and overlap(some, complement(some))["jaccard"] == 0
    clear = {"a": np.tile(np.arange(10.0), (6, 1)) + 0.01 * normal(0, 6, 10)}
    noise = {"a": normal(1, 6, 10)}
    assert stability(clear, top=3, resamples=20).mean() == 1 > 0.8 > stability(noise, top=3, resamples=20).mean()


def test_bad_circuits_are_refused():
    with pytest.raises(UserError, match="no ablation value"):
        circuit_metric(Nodes("or"), TOKENS, metric, circuit(0), {})
    with pytest.raises(UserError, match="needs \\[3\\]"):
        circuit_metric(Nodes("or"), TOKENS, metric, {"nodes": jnp.ones(4, bool)}, FILLS)
    with pytest.raises(UserError, match="give one of the two"):
        select_nodes({"a": jnp.zeros((2, 3))})
