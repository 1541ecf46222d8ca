"""What a run was made with, as plain JSON values: kept beside its checkpoints and compared when it is resumed."""

import functools
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def describe(value: object) -> PyTree:
    """A JSON value that is the same for the same hyperparameters.

    Dataclasses and modules by class name and fields; functions by name, by the numbers in their code and by what they
    close over (so that `total(scale(l1(), 1e-3))` differs from `total(scale(l1(), 1e-2))`); arrays by a hash.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [describe(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()[:16]]
    if isinstance(value, functools.partial):
        return ["partial", describe(value.func), describe(value.args), describe(value.keywords)]
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: describe(getattr(value, f.name)) for f in fields(value)}  # the fields that it declares
        return {"class": type(value).__qualname__} | own
    if inspect.isfunction(value):
        captured = inspect.getclosurevars(value).nonlocals
        constants = [constant for constant in value.__code__.co_consts if isinstance(constant, int | float)]
        return [f"{value.__module__}.{value.__qualname__}", constants, describe(captured)]
    return getattr(value, "__qualname__", type(value).__qualname__)  # a class, a built-in, or anything else


def brings_code(value: object) -> bool:
    """Whether a class or function among these hyperparameters is the user's own, and so may have mistakes in it."""
    if isinstance(value, Mapping):
        return any(map(brings_code, value.values()))
    if isinstance(value, list | tuple):
        return any(map(brings_code, value))
    if isinstance(value, functools.partial):
        return brings_code([value.func, value.args, value.keywords])
    if is_dataclass(value) and not isinstance(value, type):
        return not _ours(type(value)) or brings_code(
            [getattr(value, field.name) for field in fields(value)]  # the fields that it declares
        )
    value = inspect.unwrap(value) if callable(value) else value
    if inspect.isfunction(value):
        return not _ours(value) or brings_code(inspect.getclosurevars(value).nonlocals)
    return callable(value) and not _ours(type(value))


def _ours(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] == "jaxinterp"
