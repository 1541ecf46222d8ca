"""A refusal that allocates nothing."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from jaxinterp.core.errors import UserError

MEGABYTE = 2**20


def refused(call: Callable[[], Any], message: str) -> None:
    """Fails unless the call is refused in these words and allocates less than a megabyte."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTE
