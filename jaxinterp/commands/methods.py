"""The methods that the command line trains, by name, and their hyperparameters as words of a command line.

`jaxinterp METHOD`, `jaxinterp train --method METHOD` and `jaxinterp sweep --method METHOD` use the same names. What all
share has an option of its own (`--features`, `--k` ...); `--set NAME=VALUE` sets any other hyperparameter.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.methods import Method, PerLayerTranscoders, Transcoder
from jaxinterp.methods.documented import meanings
from jaxinterp.methods.listed import METHODS

PER_LAYER = "per_layer"
CLASSES: Mapping[str, type] = {name: listed.method for name, listed in METHODS.items() if listed.family == "sparse"} | {
    PER_LAYER: Transcoder
}
"""Name -> the class whose fields are its hyperparameters; `per_layer` is a transcoder at every leaf."""

SEVERAL = (PER_LAYER, *(name for name, listed in METHODS.items() if name in CLASSES and "*" in listed.site))
"""Methods of several layers at once: their site is a glob."""

BOOLEANS = {"True": True, "False": False, "true": True, "false": False}


@dataclass(frozen=True)
class Hyper:
    """One hyperparameter that a command line can set: its type, its default, what it means."""

    kind: type
    default: Any
    meaning: str
    words: tuple[str, ...] = ()

    def read(self, name: str, text: str) -> PyTree:
        """A value of it.

        Raises:
          UserError: the text is of another type.
        """
        text = text.strip()
        if text == "None" and self.default is None:
            return None
        if self.words and text not in self.words:
            raise UserError(f"{name}={text} must be one of {', '.join(self.words)}.{suggest(text, self.words)}")
        try:
            return BOOLEANS[text] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError) as error:
            raise UserError(f"{name}={text} must be of type {self.kind.__name__}.") from error


def hyperparameters(method: str) -> dict[str, Hyper]:
    """The hyperparameters of a method that are numbers or words, by name.

    Raises:
      UserError: there is no such method.
    """
    kind = class_of(method)
    hints, said = get_type_hints(kind), meanings(kind)
    found: dict[str, Hyper] = {}
    for field in fields(kind):
        plain, words = _plain(hints[field.name])
        if plain is not None and field.default is not MISSING:
            found[field.name] = Hyper(plain, field.default, said.get(field.name, ""), words)
    return found


def class_of(method: str) -> type:
    """The class with the method's hyperparameters.

    Raises:
      UserError: there is no such method.
    """
    if method not in CLASSES:
        also = " (topk is called sparse_autoencoder)" if method == "topk" else ""
        raise UserError(f"method={method!r} must be one of {', '.join(CLASSES)}{also}.{suggest(method, CLASSES)}")
    return CLASSES[method]


def make_method(method: str, usual: Mapping[str, PyTree], asked: Mapping[str, PyTree]) -> Method:
    """The method with these hyperparameters.

    Args:
      usual: values that a method takes where it has such a hyperparameter.
      asked: values that the user asked for; a method without such a hyperparameter is refused.
    Raises:
      UserError: the method has no such hyperparameter, or refuses the value.
    """
    known = hyperparameters(method)
    for name in asked:
        if name not in known:
            raise UserError(f"{method} has no {name!r} to set: it has {', '.join(known)}.{suggest(name, known)}")
        if isinstance(asked[name], str):
            known[name].read(name, asked[name])
    values = {name: value for name, value in usual.items() if name in known} | dict(asked)
    kind: Callable[..., Method] = class_of(method)
    return PerLayerTranscoders(kind(**values)) if method == PER_LAYER else kind(**values)


def read_settings(method: str, settings: tuple[str, ...]) -> dict[str, PyTree]:
    """The hyperparameters that `--set NAME=VALUE` names.

    Raises:
      UserError: one is not of this form, not known, of another type, or there twice.
    """
    known, found = hyperparameters(method), dict[str, Any]()
    for text in settings:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"set={text!r}: write it as NAME=VALUE, such as l1=0.01.")
        if name not in known:
            raise UserError(f"{method} has no {name!r} to set: it has {', '.join(known)}.{suggest(name, known)}")
        if name in found:
            raise UserError(f"set: {name} is there twice.")
        found[name] = known[name].read(name, value)
    return found


def described(method: str) -> str:
    """A line for every hyperparameter: name, default, meaning."""
    return "\n".join(f"  {name} ({hyper.default}): {hyper.meaning}" for name, hyper in hyperparameters(method).items())


def _plain(hint: Any) -> tuple[type | None, tuple[str, ...]]:
    """The type that a command line reads for an annotation, and the words that it allows; None for all others."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        if get_origin(choice) is Literal and all(isinstance(word, str) for word in get_args(choice)):
            return str, get_args(choice)
    for choice in choices:
        if choice in (bool, int, float, str):
            return choice, ()
    return None, ()
