"""Short trainings give what they gave before: every loss of every step, and every array at the end."""

import jax
import numpy as np
import pytest

from tests.goldens.trainings import FOLDER, OTHERS, TRAININGS, numbers

SAME = 1e-6
"""Relative to the largest number of an array, with the jax that made the goldens."""

OTHER_JAX = 5e-3
"""With another jax, which fuses otherwise: Adam's first steps make of a last bit what they make of a gradient."""


def worst(found, kept):
    """The largest difference, relative to the largest number of its array, and its name."""
    assert found.keys() == kept.keys()
    gaps = {name: np.abs(found[name].astype(float) - kept[name]).max(initial=0) for name in kept}
    return max((gap / max(np.abs(kept[name]).max(initial=0), 1e-30), name) for name, gap in gaps.items())


FAST = ("exact",)
"""What every run of the suite looks at: it is solved. Trained ones need the compiler's usual optimisation."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in (*TRAININGS, *OTHERS)],
)
def test_a_short_training_gives_what_it_gave(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        kept = dict(file)
    limit = SAME if str(kept.pop("jax")) == jax.__version__ else OTHER_JAX
    gap, where = worst(numbers(name), kept)
    assert gap <= limit, f"{where} differs by {gap:.2g}"


def test_another_number_would_be_found():
    kept = {"a": np.ones(3), "b": np.arange(4.0)}
    assert worst(kept | {"b": np.array([0, 1, 2, 3.001])}, kept)[0] > SAME
    assert worst(kept, kept)[0] == 0
