"""The summary of what attention features read, by hand."""

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.attention.features import summarise


def test_the_summary_by_hand():
    """Three live features: two of head 0 that read the token before, one of head 1 that reads far back; one is dead."""
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    table = {"fired": np.array([2.0, 5, 1, 0]), "distance": np.array([1.0, 1, 40, 0]), "error": np.array(1e-6)}
    table |= {
        "itself": np.zeros(4),
        "window start": np.zeros(4),
        "heads": np.array([[0.9, 0.1], [0.3, 0.7], [0, 1], [1, 0]]),
    }
    table |= {"token before": np.array([1.0, 0.9, 0, 0]), "far": np.array([0, 0, 1.0, 0])}
    found = summarise(table, shares, np.full((4, 2), 0.5))
    assert found["live"] == 3 and found["features_by_dominant_head"] == [2, 1] and found["of_one_head"] == 1
    assert found["heads_agree"] == pytest.approx(2 / 3) and found["mean_distance"] == pytest.approx(14)
    assert found["mostly"] == pytest.approx({"itself": 0, "token before": 2 / 3, "far": 1 / 3, "window start": 0})
    assert found["heads"][1]["distance"] == 40 and found["dominant_share"] == pytest.approx((0.9 + 0.6 + 0.8) / 3)
    with pytest.raises(UserError, match="no feature fires on the attributed tokens"):
        summarise(table | {"fired": np.zeros(4)}, shares, shares)
