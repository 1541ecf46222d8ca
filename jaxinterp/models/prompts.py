"""What people give as a prompt, as rows of token ids; and generated ids as text."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.models.files.chat import render_chat
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import Tokenizer


def as_prompts(subject: Subject, prompt: PyTree, chat: bool = False) -> list[list[int]]:
    """Rows of token ids from a text, texts, ids, or conversations; see `generate`.

    Raises:
      UserError: nothing of these, an empty prompt, or text where there is no tokenizer.
    """
    rows = _rows(subject, prompt, chat)
    if not rows:
        raise UserError("there is no prompt: give a text, or a list of texts.")
    for number, row in enumerate(rows):
        if not row:
            raise UserError(f"prompt {number} is empty: give at least one token.")
    return rows


def _rows(subject: Subject, prompt: PyTree, chat: bool) -> list[list[int]]:
    if chat:
        return [_conversation(subject, messages) for messages in _conversations(prompt)]
    if isinstance(prompt, str):
        return [subject.ids(prompt)]
    if isinstance(prompt, Sequence) and prompt and all(isinstance(text, str) for text in prompt):
        return [subject.ids(text) for text in prompt]
    if isinstance(prompt, Sequence) and prompt and all(isinstance(row, Sequence | np.ndarray) for row in prompt):
        return [_ids(np.asarray(row)) for row in prompt]
    array = np.asarray(prompt)
    if array.ndim == 1:
        return [_ids(array)]
    if array.ndim == 2:
        return [_ids(row) for row in array]
    raise UserError(f"prompt is a {type(prompt).__name__}: give a text, a list of texts, or token ids [batch, seq].")


def _ids(row: np.ndarray) -> list[int]:
    if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
        raise UserError(f"prompt has a row of {row.dtype}{row.shape}: token ids are whole numbers, one row a prompt.")
    return [int(id) for id in row]


def _conversations(prompt: PyTree) -> list[list[Mapping[str, Json]]]:
    if isinstance(prompt, str):
        return [[{"role": "user", "content": prompt}]]
    if isinstance(prompt, Sequence) and prompt:
        if all(isinstance(message, Mapping) for message in prompt):
            return [list(prompt)]
        return [conversation for each in prompt for conversation in _conversations(each)]
    raise UserError(f"chat=True: prompt is a {type(prompt).__name__}: give a text or a list of messages.")


def _conversation(subject: Subject, messages: Sequence[Mapping[str, Json]]) -> list[int]:
    tokenizer = _tokenizer(subject)
    return tokenizer.encode(render_chat(tokenizer, messages))


def _tokenizer(subject: Subject) -> Tokenizer:
    if subject.tokenizer is None:
        raise UserError(f"subject {subject.name!r} has no tokenizer: give token ids, jnp.asarray([[...]]).")
    return subject.tokenizer


def readable(subject: Subject, ids: Sequence[int], *, whole: bool = False) -> str:
    """The text of generated ids; without `whole`, up to a character whose bytes have not all come yet."""
    tokenizer = _tokenizer(subject)
    text = tokenizer.decode([id for id in ids if id not in tokenizer.special])
    return text if whole else text.rstrip("\ufffd")


def end_at(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins; None where there is none."""
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(found, default=None)
