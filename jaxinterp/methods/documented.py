"""What the strings behind a method's fields say, for `help` and for the command line."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, fields, is_dataclass


def meanings(kind: type) -> dict[str, str]:
    """What the string behind each field of a class, and of the classes of this package that it extends, says."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not each.__module__.startswith("jaxinterp."):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def add_hyperparameters(kind: type) -> None:
    """Append the hyperparameters to a dataclass's docstring: `help` does not show the strings behind fields."""
    if not is_dataclass(kind) or "Hyperparameters:" in (kind.__doc__ or ""):
        return
    known = meanings(kind)
    lines = []
    for field in fields(kind):
        if field.name in known:
            default = "" if field.default is MISSING else f" (default {field.default!r})"
            lines += textwrap.wrap(
                f"{field.name}{default}: {known[field.name]}", 110, initial_indent="  ", subsequent_indent="    "
            )
    if lines:
        kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", "Hyperparameters:", *lines, ""])
