"""The plants are what they say they are, a method trains on them, and stability tells one dictionary from another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.planted.laboratory import Plant, stability, train
from jaxinterp.evaluation.planted.recovery import mcc
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.models.tiny import unit_rows


def active(samples=20_000, **options):
    return np.asarray(Plant(**options).codes(jax.random.key(0), samples)) > 0


def test_exactly_so_many_are_active_and_all_alike():
    found = active()
    assert (found.sum(1) == 3).all()
    np.testing.assert_allclose(found.mean(0), 3 / 48, atol=0.01)


def test_frequencies_follow_the_power_law():
    frequency = active(exponent=1.0, active=1, features=20).mean(0)
    expected = 1 / np.arange(1, 21)
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.01)


def test_partners_occur_together():
    together, apart = active(correlation=0.5), active()
    joint = [(found[:, ::2] & found[:, 1::2]).mean() for found in (together, apart)]
    assert joint[0] > 5 * joint[1]


def test_children_occur_only_with_their_parent():
    found = active(children=2)
    parents, children = found[:, :16], found[:, 16:].reshape(len(found), 2, 16)
    assert children.any() and not (children & ~parents[:, None]).any()


def test_independent_features_vary_in_number():
    count = active(independent=True).sum(1)
    assert abs(count.mean() - 3) < 0.05 and count.std() > 1


def test_every_second_sample_has_another_number_of_features():
    found = active(also_active=20)
    assert (found[::2].sum(1) == 3).all() and (found[1::2].sum(1) == 20).all()
    np.testing.assert_array_equal(found[::2], active()[::2])


def test_unit_codes_have_length_one():
    lengths = jnp.linalg.norm(Plant(unit=True).codes(jax.random.key(0), 100), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_noise_is_added_to_the_samples():
    rows, key = Plant().rows(jax.random.key(1)), jax.random.key(2)
    clean, noisy = (Plant(noise=noise).draw(rows, key, 4000)["x"] for noise in (0.0, 0.1))
    assert float(jnp.std(noisy - clean)) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("active", 0),
        ("active", 49),
        ("correlation", 1.5),
        ("children", 4),
        ("also_active", 49),
        ("features", 0),
        ("width", 0),
        ("low", 2.0),
        ("low", -1.0),
        ("noise", -0.1),
    ],
)
def test_a_plant_that_cannot_be_is_refused(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        Plant(**{field: value})
    with pytest.raises(UserError, match=r"low=0.0 and high=0.0"):
        Plant(low=0.0, high=0.0)


def test_two_plants_are_found_by_one_program_and_only_the_right_one_matches():
    plant = Plant(features=12, width=16, active=2)
    planted = [plant.rows(jax.random.key(seed)) for seed in (0, 1)]
    method = SparseAutoencoder(features=16, k=2, learning_rate=1e-2, auxk=0.0)
    trained, metrics = train(method, plant.draw, planted, Sites("x", "x"), steps=1200, batch_size=128)
    own = [mcc(rows, dictionary.decoder) for rows, dictionary in zip(planted, trained, strict=True)]
    assert min(own) > 0.9 and mcc(planted[0], trained[1].decoder) < 0.7
    assert all(late["l0"] == pytest.approx(2, abs=0.1) for late in metrics)


def test_stability_is_one_for_the_same_rows_in_another_order():
    rows, other = np.asarray(unit_rows(jax.random.key(0), 20, 12)), np.asarray(unit_rows(jax.random.key(1), 20, 12))
    assert stability([rows, rows[::-1]]) == pytest.approx(1)
    assert stability([rows, other]) < 0.9
    with pytest.raises(UserError, match="at least 2 needed"):
        stability([rows])
