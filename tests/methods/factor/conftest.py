"""What tests of identities need."""

import jax
import pytest


@pytest.fixture
def float64():
    """Arrays are float64 within the test."""
    with jax.enable_x64(True):
        yield
