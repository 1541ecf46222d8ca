"""What a callable takes: extension points ask for a keyword by its name instead of for a class."""

import inspect
from collections.abc import Callable


def takes(function: Callable[..., object], name: str) -> bool:
    """Whether the callable has a parameter of this name that can be given by keyword.

    An edit that takes `positions` gets them from `run`, a leaf that takes `tap` offers arrays of its own:

        takes(lambda x, *, positions: x, "positions")    True
        takes(lambda x: x, "positions")                  False
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY
