"""Mistakes in an objective or a term of one's own, found while it is traced and told in one line.

    checked(objective)      the same objective; what it returns is looked at, and what it raises is explained
    check_term(term)        likewise for a term of `total(...)`, and apply_term(term, ...) where it is traced

Nothing here costs anything in the compiled program: shapes and types are known when a function is traced. `fit` traces
the step with shapes alone before it harvests or compiles, so that a mistake costs a second.
"""

import inspect
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError, first_line
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import Forward, Objective, Term

RETURN = 'return loss, {"name": ratio(values, batch.weight)}'
BRANCHES = (
    "Python's if, while, and, or, not and bool() need a number, and an array under jit has none yet: use "
    "jnp.where(condition, a, b) or jax.lax.cond"
)
NUMBERS = (
    "float(), int(), .item() and NumPy need a number, and an array under jit has none yet: use jax.numpy, and return a "
    "metric as it is"
)


def checked(objective: object) -> Objective:
    """The objective, refused in one line where it makes one of the usual mistakes.

    Raises:
      UserError: at once where it is a term, a list or no function; when it is traced where it does not return (loss,
        metrics) with one loss and metrics that are sums and counts, or uses an array as a Python number.
    """
    name, function = _check_function(objective, "objective", ("decomposition", "batch", "key"), keyword="model")

    def call(decomposition: PyTree, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None) -> tuple[PyTree, Metrics]:
        result = _explained(name, lambda: function(decomposition, batch, key, model=model))
        return _check_result(name, result, "loss")

    return call


def check_term(term: object) -> str:
    """What messages call a term.

    Raises:
      UserError: it is an objective, a list or no function of (decomposition, batch, forward).
    """
    return _check_function(term, "term", ("decomposition", "batch", "forward"))[0]


def apply_term(term: Term, decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[PyTree, Metrics]:
    """(value, metrics) of a term.

    Raises:
      UserError: as `checked`, with "value" for the loss.
    """
    name = check_term(term)
    return _check_result(name, _explained(name, lambda: term(decomposition, batch, forward)), "value")


def _check_function(
    function: object, what: str, names: tuple[str, ...], keyword: str | None = None
) -> tuple[str, Callable[..., object]]:
    """Its name for messages, and the function, once it is seen to take these arguments."""
    plain = getattr(function, "__qualname__", type(function).__name__)  # a callable object has no name of its own
    name = f"{what} {plain.replace('.<locals>', '')!r}"
    if isinstance(function, list | tuple):
        how = "total(*terms)" if what == "objective" else "total(a, b), not total([a, b])"
        raise UserError(f"{what}={function!r} is a {type(function).__name__} of terms: write {how}.")
    if not callable(function):
        raise UserError(f"{what}={function!r} is not a function of ({', '.join(names)}).")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is not written in Python
        return name, function
    if what == "term" and {"key", "model"} <= set(signature.parameters):
        raise UserError(f"{name} is an objective already: pass it as objective=, not inside total(...).")
    if _binds(signature, len(names), keyword):
        return name, function
    if not signature.parameters:
        raise UserError(f"{name} takes no arguments: call it, {plain.rpartition('.')[2]}(), and pass what it returns.")
    if keyword and _binds(signature, 3, None) and "key" not in signature.parameters:
        raise UserError(f"{name} is a term: write objective=total({plain.split('.')[0]}(...)).")
    wanted = ", ".join([*names, *([f"*, {keyword}=None"] if keyword else [])])
    raise UserError(f"{name} takes {signature}: it must take ({wanted}).")


def _binds(signature: inspect.Signature, positional: int, keyword: str | None) -> bool:
    try:
        signature.bind(*[None] * positional, **({} if keyword is None else {keyword: None}))
    except TypeError:
        return False
    return True


def _explained(name: str, call: Callable[[], object]) -> object:
    """What `call` returns; an error that JAX raises for a usual mistake is raised with the line that makes it."""
    try:
        return call()
    except UserError:
        raise
    except jax.errors.TracerBoolConversionError as error:
        raise UserError(f"{name}{_line(error)}: {BRANCHES}.") from error
    except (
        jax.errors.TracerIntegerConversionError,
        jax.errors.TracerArrayConversionError,
        jax.errors.ConcretizationTypeError,
    ) as error:
        raise UserError(f"{name}{_line(error)}: {NUMBERS}.") from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{name}{_line(error)}: {first_line(error)}") from error


def _line(error: Exception) -> str:
    """Where it was raised: the last line of the traceback that is neither the framework's nor a library's."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and "/jaxinterp/" not in frame.filename.replace("\\", "/")
    ]
    if not own:
        return ""
    last = own[-1]
    return f" ({last.filename.rpartition('/')[2]}, line {last.lineno}: `{last.line}`)"


def _check_result(name: str, result: object, value_name: str) -> tuple[PyTree, Metrics]:
    """(value, metrics), if that is what was returned."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(f"{name} returned {_described(result)} instead of two things: {RETURN}.")
    value, metrics = result
    if not isinstance(metrics, dict):
        also = " (the two are the wrong way round)" if isinstance(value, dict) else ""
        raise UserError(f"{name}: the metrics are {_described(metrics)} instead of a dict{also}: {RETURN}.")
    if not isinstance(value, jax.Array | int | float):
        raise UserError(f"{name}: the {value_name} is {_described(value)} instead of one number: {RETURN}.")
    if jnp.shape(value) != ():
        raise UserError(
            f"{name}: the {value_name} has shape {list(jnp.shape(value))} instead of []: take a mean over the tokens, "
            "ratio(values, batch.weight).value()."
        )
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise UserError(f"{name}: the {value_name} is {jnp.result_type(value)}: it must be a float to have a gradient.")
    for key, metric in metrics.items():
        _check_metric(name, key, metric)
    return value, metrics


def _check_metric(name: str, key: object, metric: object) -> None:
    if not isinstance(key, str):
        raise UserError(f"{name}: metric {key!r} must have a string for a name.")
    if not isinstance(metric, Ratio):
        raise UserError(
            f"{name}: metric {key!r} is {_described(metric)} instead of a sum and a count: give ratio(values, "
            "batch.weight) of one value a token, or Ratio(value, jnp.ones(())) of one number."
        )
    for part, array in (("total", metric.total), ("count", metric.count)):
        if not isinstance(array, jax.Array):
            raise UserError(
                f"{name}: {part} of metric {key!r} is {_described(array)}: give an array, jnp.asarray(...)."
            )
    if metric.count.shape not in ((), metric.total.shape):
        raise UserError(
            f"{name}: metric {key!r} has a total of shape {list(metric.total.shape)} and a count of shape "
            f"{list(metric.count.shape)}: they must agree, or the count be one number."
        )


def _described(value: object) -> str:
    if isinstance(value, jax.Array):
        return f"an array of shape {list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
