"""Conversations as text, by the template that came with a tokenizer.

A chat template is a Jinja program from outside, so it is treated as data: it runs in Jinja's immutable sandbox, with a
short list of filters, and with bounds on its own size, on the lines it executes, on the texts it builds and on what it
writes. It sees the messages and nothing else: no files, no imports, no clock.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from jaxinterp.core.errors import UserError, first_line
from jaxinterp.core.json_value import Json
from jaxinterp.models.files.tokenizer import Tokenizer

LONGEST_TEMPLATE = 65_536
"""Characters of a template."""
LONGEST_TEXT = 1_000_000
"""Characters of a text that a template builds or writes."""
MOST_LINES = 50_000
"""Lines of a compiled template that may run."""

FILTERS = tuple(
    [
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "first",
        "float",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "sum",
        "title",
        "trim",
        "unique",
        "upper",
    ]
)
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "</s>", "<|return|>")
"""Tokens that end a turn."""


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that end a turn in this vocabulary."""
    ids = (tokenizer.backend.token_to_id(token) for token in TURN_ENDS)
    return [id for id in ids if id is not None and id in tokenizer.special]


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Json]], *, answer: bool = True) -> str:
    """The conversation as one text.

    Args:
      messages: {"role": "user", "content": "..."}, in order.
      answer: end with what begins the assistant's answer.
    Raises:
      UserError: the tokenizer has no template, a message lacks role or content, or the template refuses or fails.
    """
    if tokenizer.chat_template is None:
        raise UserError("chat=True: this tokenizer has no chat template; write the conversation as plain text.")
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise UserError(f'message {number} needs a text "role" and a text "content"; it has {sorted(message)}.')
    texts = {
        name: "" if id is None else tokenizer.token_text(id)
        for name, id in (("bos_token", tokenizer.begin), ("eos_token", tokenizer.end))
    }
    return render_template(
        tokenizer.chat_template, messages=[dict(one) for one in messages], add_generation_prompt=answer, **texts
    )


def render_template(template: str, **values: Any) -> str:
    """What a template writes for these values, in the sandbox and within the module's bounds.

    Raises:
      UserError: it is too long, is not Jinja, reaches for something it may not, or runs too long.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise UserError(f"the chat template has {len(template)} characters, more than {LONGEST_TEMPLATE}: not run.")
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters = {name: environment.filters[name] for name in FILTERS} | {"tojson": _to_json}
    allowed = {"namespace", "dict"}
    environment.globals = {name: value for name, value in environment.globals.items() if name in allowed}
    environment.globals |= {"raise_exception": _refuse, "range": _short_range}
    environment.intercepted_binops = frozenset({"*", "**", "%"})
    environment.binop_table = {**environment.binop_table, "*": _times, "**": _power, "%": _modulo}
    bounds = _Bounds(4 * sum(len(str(value)) for value in values.values()) + LONGEST_TEXT)
    pieces, size = [], 0
    before = sys.gettrace()
    try:
        compiled = environment.from_string(template)
        sys.settrace(bounds.trace)
        for piece in compiled.generate(**values):
            pieces.append(piece)
            size += len(piece)
            if size > bounds.longest:
                raise _OutOfBounds(f"it writes more than {bounds.longest} characters")
    except _OutOfBounds as error:
        raise UserError(f"the chat template was stopped: {error}.") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the chat template cannot be used: {first_line(error)}") from error
    finally:
        sys.settrace(before)
    return "".join(pieces)


class _OutOfBounds(Exception):
    """Not an Exception that a template could catch: templates catch none."""


class _Bounds:
    """Counts the lines that a compiled template executes, and looks at the texts that it holds."""

    def __init__(self, longest: int) -> None:
        self.longest, self.lines = longest, 0

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        if event == "line":
            self.lines += 1
            if self.lines > MOST_LINES:
                raise _OutOfBounds(f"it runs more than {MOST_LINES} lines")
            if self.lines % 4 == 0:  # texts can double from line to line: none grows far in so few
                for value in frame.f_locals.values():
                    self.look(value)
        return self.trace

    def look(self, value: Any) -> None:
        if isinstance(value, str | list | tuple | dict):
            if len(value) > self.longest:
                raise _OutOfBounds(f"it builds more than {self.longest} characters")
        elif type(value).__name__ == "Namespace":
            for inner in value._Namespace__attrs.values():
                self.look(inner)


def _refuse(message: Any = "") -> None:
    raise UserError(f"the chat template refuses these messages: {str(message)[:200]}")


def _short_range(*arguments: int) -> range:
    found = range(*arguments)
    if len(found) > MOST_LINES:
        raise _OutOfBounds(f"it counts to more than {MOST_LINES}")
    return found


def _times(a: Any, b: Any) -> Any:
    sizes = [len(x) if isinstance(x, str | list | tuple) else abs(int(x)) for x in (a, b)]
    if any(isinstance(x, str | list | tuple) for x in (a, b)) and sizes[0] * sizes[1] > LONGEST_TEXT:
        raise _OutOfBounds(f"it builds more than {LONGEST_TEXT} characters")
    return a * b


def _power(a: Any, b: Any) -> Any:
    if abs(b) > 64:
        raise _OutOfBounds(f"it takes the power {b}")
    return a**b


def _modulo(a: Any, b: Any) -> Any:
    if isinstance(a, str):
        raise _OutOfBounds("it formats text with %")
    return a % b


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(int(indent), 8))
