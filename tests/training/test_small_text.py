"""A text that is shorter than a batch: told, since its rows are then seen more than once in a step."""

import warnings

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods import Transcoder
from jaxinterp.training.fit import check_text, fit


def test_a_batch_larger_than_the_text_is_told(subject, text):
    """Kind K. The objective is refused behind it, so that nothing is compiled."""
    method = Transcoder(features=8, k=2, objective=lambda decomposition, batch, key, *, model=None: 0.0)
    few = text[:3]
    told = r"batch_size=128 tokens are more than the text has \(3 windows of 32: 96 tokens\)"
    with pytest.warns(UserWarning, match=told), pytest.raises(UserError):
        fit(method, subject, few, site="blocks/1/mlp", steps=1, batch_size=128)


@pytest.mark.parametrize(("windows", "told"), [(4, False), (3, True), (1, True), (100, False)])
def test_a_text_of_one_batch_is_enough(windows, told):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_text(windows, 128, 32)
    assert bool(said) == told
