"""Text to token ids and back, without any model library: a thin frozen wrapper around `tokenizers.Tokenizer`.

Where a tokenizer comes from: a `tokenizer.json` (Hugging Face and our own form), the metadata of a GGUF file, or
`byte_tokenizer()`, which needs no file at all. Encoding adds no special tokens: who packs documents decides where
`begin` and `end` go.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers
from jaxtyping import PyTree
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json

Pieces = Literal["bytes", "spaces", "words", "plain"]
"""How the vocabulary writes a piece: GPT-2's byte alphabet, SentencePiece's `▁` for a space, WordPiece's `##` where a
word goes on, or as it is."""

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""What pretraining put between documents. Chat models name the end of a turn as their `eos`; these go first."""

PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
"""`tokenizer.ggml.pre` of a GGUF file: how text is cut before byte-pair merging."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what is known about its special tokens.

    Attributes:
      end: the token between documents (end of text), if there is one.
      begin: the token that the model expects before every sequence, if there is one.
      special: ids without text (control tokens); their positions are masked out of statistics.
      pieces: how the vocabulary writes a piece.
      chat_template: a Jinja program that writes a conversation, as it came with the tokenizer; see `chat.py`.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    end: int | None
    begin: int | None
    special: frozenset[int]
    pieces: Pieces
    chat_template: str | None = field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id; above `vocab_size` - 1 where ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def largest_text_id(self) -> int:
        """The largest id that ordinary text, or the packing of documents, can yield: added tokens are left out."""
        added = set(self.backend.get_added_tokens_decoder())
        ordinary = set(self.backend.get_vocab(with_added_tokens=False).values()) - added - self.special
        packed = {id for id in (self.begin, self.end) if id is not None}
        return max(ordinary | packed, default=-1)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the vocabulary, the merges and all else that decides on ids."""
        content = [self.backend.to_str(), self.end, self.begin, sorted(self.special)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added before or after."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, encoded in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a sequence of ids, special tokens written out."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def token_text(self, id: int) -> str:
        r"""Readable text of one token: `" the"`, `"\n"`; bytes that are no whole character as `\xe2\x80`.

        Raises:
          UserError: the vocabulary has no such id.
        """
        piece = self.backend.id_to_token(int(id))
        if piece is None:
            raise UserError(f"no token has id={id}: the vocabulary has {self.vocab_size} ids.")
        if id in self.special or self.pieces == "plain":
            return piece
        if self.pieces == "words":
            return piece.removeprefix("##") if piece.startswith("##") else f" {piece}"
        if self.pieces == "spaces":
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return _readable(bytes([int(piece[3:5], 16)]))
            return piece.replace("▁", " ")
        if any(character not in BYTE_OF for character in piece):  # an added token, written as it is
            return piece
        return _readable(bytes(BYTE_OF[character] for character in piece))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _readable(raw: bytes) -> str:
    return raw.decode("utf-8", errors="backslashreplace")


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes of UTF-8 as ids 0..255 and one end token, id 256: 257 ids, no file needed."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return Tokenizer(backend, end=256, begin=None, special=frozenset([256]), pieces="bytes")


def tokenizer_from_file(path: str | Path) -> Tokenizer:
    """A Hugging Face `tokenizer.json`, with what the files beside it say about begin and end.

    Read beside it where present: tokenizer_config.json and special_tokens_map.json (`bos_token`, `eos_token`),
    generation_config.json and config.json (`bos_token_id`, `eos_token_id`).

    An encoder's files have neither bos nor eos: there `cls_token` begins and `sep_token` ends.

    Raises:
      UserError: the file is missing or no tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer file {path}: a subject needs tokenizer.json beside its weights.")
    try:
        text = path.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        decoder = json.dumps(json.loads(text).get("decoder"), ensure_ascii=False)
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise UserError(f"{path} is not a readable tokenizer.json: {error}") from error
    backend.no_padding()
    backend.no_truncation()

    settings: dict[str, Json] = {}
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        beside = path.with_name(name)
        if beside.is_file():
            settings |= {key: value for key, value in read_json(beside).items() if value is not None}
    asked = read_json(beside) if (beside := path.with_name("tokenizer_config.json")).is_file() else {}
    if asked.get("add_bos_token") and asked.get("bos_token", "") is None:
        warnings.warn(
            f"{beside}: add_bos_token is true, but bos_token is null: no begin token is added, as in transformers.",
            stacklevel=2,
        )
        settings = {key: value for key, value in settings.items() if key not in ("bos_token_id", "add_bos_token")}
    begin, end = (_first_id(backend, settings, names) for names in (("bos", "cls"), ("eos", "sep")))
    added = backend.encode("", add_special_tokens=True).ids  # what the file's own post-processor adds
    prepends = (begin is not None and begin in added[:1]) or bool(settings.get("add_bos_token"))
    kinds: dict[str, Pieces] = {"ByteLevel": "bytes", "▁": "spaces", '"prefix": "##"': "words"}
    pieces: Pieces = next((kind for mark, kind in kinds.items() if mark in decoder), "plain")
    special = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
    template = _chat_template(path.with_name("chat_template.jinja"), settings)
    return Tokenizer(
        backend, _document_end(backend, special, end), begin if prepends else None, special, pieces, template
    )


def _chat_template(file: Path, settings: Mapping[str, Json]) -> str | None:
    """The text of a chat template: in a file of its own, or in tokenizer_config.json, where several have names."""
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def tokenizer_from_gguf(reader: Any) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata (`tokenizer.ggml.*`), rebuilt: byte-level BPE, model name `gpt2`.

    Args:
      reader: a `gguf.GGUFReader`.
    Raises:
      UserError: the file has no tokenizer, or one of a kind that is not supported.
    """
    metadata = read_metadata(reader, "tokenizer.ggml.")
    _require(metadata, "model", ["gpt2"], "load the model's Hugging Face directory instead")
    _require(metadata, "pre", list(PRE_TOKENIZERS), "load the model's Hugging Face directory instead")
    tokens, kinds = metadata.get("tokens", []), metadata.get("token_type", [])
    if not tokens or len(kinds) not in (0, len(tokens)):
        raise UserError(f"tokenizer.ggml.tokens has {len(tokens)} entries, tokenizer.ggml.token_type {len(kinds)}.")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("merges", [])]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.ggml.tokens and tokenizer.ggml.merges make no tokenizer: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[metadata["pre"]])
    backend.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4  # gguf.TokenType
    backend.add_tokens(
        [
            AddedToken(token, special=kind == control, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (control, user_defined)
        ]
    )
    special = frozenset(id for id, kind in enumerate(kinds) if kind == control)
    end = _document_end(backend, special, metadata.get("eos_token_id"))
    begin = metadata.get("bos_token_id") if metadata.get("add_bos_token") else None
    template = metadata.get("chat_template")
    return Tokenizer(backend, end, begin, special, "bytes", template if isinstance(template, str) else None)


def read_metadata(reader: Any, prefix: str) -> dict[str, PyTree]:
    """The metadata of a GGUF file below `prefix`.

    Raises:
      UserError: a text in it is not UTF-8.
    """
    metadata = {}
    for name, value in reader.fields.items():
        if name.startswith(prefix):
            try:
                metadata[name.removeprefix(prefix)] = value.contents()
            except ValueError as error:
                raise UserError(f"GGUF metadata {name} is damaged: {error}") from error
    return metadata


def _require(metadata: Mapping[str, PyTree], name: str, supported: list[str], way_out: str) -> None:
    if metadata.get(name) not in supported:
        raise UserError(
            f"tokenizer.ggml.{name}={metadata.get(name)!r} is not supported (supported: {', '.join(supported)}); "
            f"{way_out}."
        )


def read_json(path: Path) -> dict[str, Json]:
    """The object in a JSON file.

    Raises:
      UserError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, where a JSON object is expected.")
    return value


def _named_id(backend: tokenizers.Tokenizer, settings: Mapping[str, Json], name: str) -> int | None:
    """The id of the bos or eos token, by its text where a file gives one, else by its number."""
    token = settings.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and backend.token_to_id(token) is not None:
        return backend.token_to_id(token)
    number = settings.get(f"{name}_token_id")
    if isinstance(number, list):
        number = number[0] if number else None
    known = isinstance(number, int) and backend.id_to_token(number) is not None
    return number if known else None


def _first_id(backend: tokenizers.Tokenizer, settings: Mapping[str, Json], names: tuple[str, ...]) -> int | None:
    """The id of the first of these tokens that there is."""
    ids = (_named_id(backend, settings, name) for name in names)
    return next((id for id in ids if id is not None), None)


def _document_end(backend: tokenizers.Tokenizer, special: frozenset[int], end: int | None) -> int | None:
    for token in DOCUMENT_ENDS:
        id = backend.token_to_id(token)
        if id is not None and id in special:
            return id
    return end
