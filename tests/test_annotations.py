"""What is checked at run time: every function, and functions inside functions the first times that they are made."""

import jaxtyping
import numpy as np
import pytest
from beartype import beartype
from jaxtyping import Float, TypeCheckError

from jaxinterp.evaluation.sparsity.massive import top_and_median
from tests.annotations import TIMES

hooked = jaxtyping.jaxtyped(typechecker=beartype)


def inner():
    @hooked
    def mean(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        return x.mean(-1)

    return mean


def test_functions_of_the_package_are_always_checked():
    for _ in range(TIMES + 2):
        with pytest.raises(TypeCheckError):
            top_and_median(np.ones((2, 2)))


def test_functions_inside_functions_are_checked_at_first():
    for _ in range(TIMES):
        with pytest.raises(TypeCheckError):
            inner()(np.ones(3))
    assert inner()(np.ones(3)) == 1
    assert list(inner()(np.ones((3, 2)))) == [1, 1, 1]


def test_the_context_of_sizes_is_left_alone():
    with jaxtyping.jaxtyped("context"):
        assert isinstance(np.ones((2, 3)), Float[np.ndarray, "n d"])
        assert not isinstance(np.ones((3, 3)), Float[np.ndarray, "n d"])
