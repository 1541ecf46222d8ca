"""Numbers as JSON: what is undefined or infinite becomes null, as JSON has neither NaN nor infinity.

json_text({"fvu": math.nan}) -> '{"fvu": null}'
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def json_text(value: object, *, indent: int | None = None) -> str:
    """A value as JSON that every reader takes; numbers of NumPy are numbers."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
