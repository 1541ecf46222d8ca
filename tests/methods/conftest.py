"""What tests of refused settings need."""

import jaxtyping
import pytest


@pytest.fixture
def without_annotations(monkeypatch):
    """Tests check every annotation of the package, users do not: this shows what their mistakes meet."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
