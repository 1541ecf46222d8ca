"""Fields of a foreign configuration, checked: what is known and understood passes, the rest is refused by name."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.models.files.tokenizer import read_json

LARGEST_SIZE = 2**40


def read_config(path: Path) -> dict[str, Json]:
    """The object in a JSON file.

    Raises:
      UserError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: it says how the arrays beside it are to be used; fetch it.")
    return read_json(path)


def shown(value: Any) -> str:
    """A value of a configuration for a message; of lists and objects the kind only, as they may be long and deep."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value)[:60]


def size(fields: Mapping[str, Json], name: str, where: Path) -> int:
    """The value of a field that must be a positive whole number.

    Raises:
      UserError: it is missing or something else.
    """
    value = fields.get(name)
    if type(value) is not int or not 0 < value < LARGEST_SIZE:
        raise UserError(f"{where}: config field {name}={shown(value)} should be a positive whole number.")
    return value


def flag(fields: Mapping[str, Json], name: str, where: Path, *, default: bool | None = None) -> bool:
    """The value of a field that must be true or false.

    Raises:
      UserError: it is something else, or missing where there is no default.
    """
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"{where}: config field {name}={shown(value)} should be true or false.")
    return value


def one_of(fields: Mapping[str, Json], name: str, where: Path, allowed: Collection[Any], *, why: str = "") -> Any:
    """The value of a field, null where it is missing, if it is among those allowed.

    Raises:
      UserError: it is not.
    """
    value = fields.get(name)
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise UserError(f"{where}: config field {name}={shown(value)} is not supported{why}; supported: {choices}.")
    return value


def check_known(fields: Mapping[str, Json], known: Collection[str], where: Path, *, hint: str = "") -> None:
    """Raises UserError if a field is unknown: one that changes the computation must not be ignored."""
    for name, value in fields.items():
        if name not in known:
            raise UserError(
                f"{where}: unknown config field {name}={shown(value)}: a field that may change the computation must "
                f"not be ignored.{hint or suggest(name, known)}"
            )
