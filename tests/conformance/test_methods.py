"""Every method, every property, from one training each. Invariants 5, 7, 9 and 19; a broken variant for each check."""

import gc
from dataclasses import fields
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxinterp.methods.listed import METHODS
from tests.conformance import broken, checks
from tests.conformance.cases import CASES, LISTED, names

kept, stepped, replaces, scored = (
    lambda case: case.kept,
    lambda case: case.stepped,
    lambda case: case.place in ("leaf", "array"),
    lambda case: case.place == "leaf",
)


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    """The one training of a method, by name."""
    return cache(lambda name: checks.Trained(CASES[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def _few_programs():
    """Programs of eight devices lie in many pieces of memory, of which Linux gives a process 65,530."""
    yield
    pieces = Path("/proc/self/maps")
    if pieces.exists() and pieces.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


def test_the_list_is_that_of_the_package():
    assert list(LISTED) == list(METHODS)
    assert all(type(LISTED[name].method) is METHODS[name].method for name in METHODS)


@pytest.mark.parametrize("name", names(alone=False))
def test_a_mesh_changes_nothing(of, name):
    checks.same_on_a_mesh(of(name))


@pytest.mark.parametrize("name", names(stepped, alone=False))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(of, name):
    checks.learns(of(name))
    checks.resumes_bit_for_bit(of(name))


@pytest.mark.parametrize("name", names(kept))
def test_it_comes_back_from_disk(of, name, tmp_path):
    checks.comes_back_from_disk(of(name).one.decomposition, tmp_path / "d", CASES[name].kinds)


@pytest.mark.parametrize("name", names(replaces))
def test_it_replaces_what_it_was_trained_for(of, name):
    checks.replaces_its_leaf(of(name).one.decomposition, CASES[name].place)


@pytest.mark.parametrize("name", names(scored))
def test_it_has_a_row_of_the_scoreboard(of, name):
    checks.has_a_row(of(name).one.decomposition)


PARTICULARS = {
    "gated": lambda one: (
        one.activation.gate_bias.any() and one.activation.log_scale.any() and not one.encoder_bias.any()
    ),
    "jumprelu": lambda one: abs(one.activation.threshold_parameter - 1).max() > 1e-3,
    "group_bias": lambda one: one.activation.adapted_bias.min() < -0.01,
    "ghosts": lambda one: abs(one.encoder_bias[:12] + 10).min() > 1e-3,
    "resampling": lambda one: one.encoder_bias.min() > -1,
    "of_ones_own": lambda one: one.encode(jax.random.normal(jax.random.key(0), (8, 8))).values.min() < 0,
}
"""What only one method changes: gates and thresholds learn, biases adapt, the silenced half is moved or resampled."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTICULARS)
def test_what_is_particular_about_it_has_happened(of, name):
    assert PARTICULARS[name](of(name).one.decomposition)


@pytest.mark.slow
def test_dead_features_of_several_layers_are_trained_by_auxk(of):
    assert max(row["auxk"] for row in of("cross_layer").one.history) > 0, "no feature died"


@pytest.mark.parametrize("name", names())
def test_numbers_that_are_none_are_refused(name):
    checks.refuses_nan(CASES[name])


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize("name", LISTED)
def test_what_is_not_positive_is_refused(name):
    asked = checks.refuses_what_is_not_positive(CASES[name].method)
    assert asked or not fields(CASES[name].method), "no field of this method is asked about"


@pytest.mark.slow
def test_an_impure_objective_is_found(tmp_path):
    """It is another one on a mesh, and after a stop."""
    impure = checks.Trained(broken.IMPURE, tmp_path / "run")
    for check in (checks.same_on_a_mesh, checks.resumes_bit_for_bit):
        with pytest.raises(AssertionError):
            check(impure)


def test_files_leaves_numbers_and_fields_that_lie_are_found(of, tmp_path):
    with pytest.raises(AssertionError):
        checks.comes_back_from_disk(broken.Drifting(jnp.ones((3, 4))), tmp_path / "d", (broken.Drifting,))
    good = of("hidden_experts").one.decomposition
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        checks.replaces_its_leaf(broken.Twofold(good, good.sites), "leaf")
    with pytest.raises(pytest.fail.Exception):
        checks.refuses_nan(broken.BLIND)
    with pytest.raises(pytest.fail.Exception):
        checks.refuses_what_is_not_positive(broken.Careless())
