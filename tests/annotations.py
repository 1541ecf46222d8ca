"""Annotations are checked at run time; those of functions inside functions the first three times that one is made.

A check is written and compiled anew for every function object: some 3 ms. A loader makes a function a tensor, an
objective some at every trace: a third of the time of tests that compile nothing.
"""

from collections import Counter
from types import CodeType, FunctionType

import jaxtyping

TIMES = 3
"""How often the check of one function inside a function is made in a process."""

_original = jaxtyping.jaxtyped
made: Counter[CodeType] = Counter()


def seldom(function):
    """Whether this is a function inside a function that was checked often enough."""
    if not isinstance(function, FunctionType) or "<locals>" not in function.__qualname__:
        return False
    made[function.__code__] += 1
    return made[function.__code__] > TIMES


def jaxtyped(*given, **options):
    """`jaxtyping.jaxtyped`, as the import hook writes it above every function; any other use of it is left alone."""
    made_by = _original(*given, **options)
    if given or "typechecker" not in options:
        return made_by
    return lambda function: function if seldom(function) else made_by(function)


def check_closures_at_first() -> None:
    """To be called before the import hook is installed."""
    jaxtyping.jaxtyped = jaxtyped
