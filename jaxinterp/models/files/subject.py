"""A subject: a model under study with its tokenizer; and our own form of it on disk.

Our own form is a directory:

    model.safetensors    every leaf under its own name (`blocks/0/mlp/up_proj/weight`), laid out as it is in memory
    jaxinterp.json       the configuration, field by field, and what begins and ends a document
    tokenizer.json       where the subject has a tokenizer

`jaxinterp.json` is written last: a directory without it was not finished.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.attention import Temperature
from jaxinterp.models.delta_net import DeltaConfig
from jaxinterp.models.files.safetensors_file import open_directory
from jaxinterp.models.files.tokenizer import Tokenizer, read_json, tokenizer_from_file
from jaxinterp.models.files.weights import Shardings, leaf_shapes, load_model
from jaxinterp.models.mixtures.config import MixtureConfig
from jaxinterp.models.mixtures.routed import RoutedConfig
from jaxinterp.models.per_layer import PerLayerConfig
from jaxinterp.models.rotary import RopeScaling
from jaxinterp.models.run import LanguageModel, Trace, run
from jaxinterp.models.transformer import Transformer, TransformerConfig, WholeConfig
from jaxinterp.storage.files import write_arrays, write_text

OWN_FORM = "jaxinterp.json"
PARTS = (RopeScaling, MixtureConfig, RoutedConfig, Temperature, DeltaConfig, WholeConfig, PerLayerConfig)
"""Classes of fields of the configuration."""

VERSION = 2
"""1: projections were called `mlp/up` and `attn/out`, now `mlp/up_proj` and `attn/o_proj`."""


@dataclass(frozen=True, repr=False)
class Subject:
    """A model under study.

    Attributes:
      tokenizer: None where none came with the weights.
      source: which checkpoint the weights are and what was done to them, in words; "" where that is not known.

    Example:
      >>> subject = load("tiny")
      >>> subject.tokenizer.decode(subject.tokenizer.encode("a cat"))
      'a cat'
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    name: str
    source: str = ""

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, after the token that the model expects first, where it expects one.

        Raises:
          UserError: the subject has no tokenizer.
        """
        tokenizer = self._own_tokenizer("a text")
        return ([] if tokenizer.begin is None else [tokenizer.begin]) + tokenizer.encode(text)

    def tokens(self, text: str | Sequence[str]) -> Int[Array, "batch seq"]:
        """Token ids of a text, or of texts of one length, as `run` takes them.

        Raises:
          UserError: the subject has no tokenizer, there is no text, or the texts have different numbers of tokens.
        """
        rows = [self.ids(each) for each in ([text] if isinstance(text, str) else text)]
        lengths = sorted({len(row) for row in rows})
        if not rows or lengths == [0]:
            raise UserError("there is no token: give a text that is not empty.")
        if len(lengths) > 1:
            raise UserError(
                f"the texts have from {lengths[0]} to {lengths[-1]} tokens: give texts of one length; or run ids that "
                "you padded, with mask=. generate(subject, texts) pads by itself."
            )
        return jnp.asarray(rows, jnp.int32)

    def words(self, ids: Any) -> list[str]:
        """The readable text of every token: `["The", " capital", ...]`; `ids` is a text, a list, or one row of ids.

        Raises:
          UserError: the subject has no tokenizer, there are several rows, or an id is unknown.
        """
        tokenizer = self._own_tokenizer("words")
        row = np.asarray(self.ids(ids) if isinstance(ids, str) else ids)
        if row.ndim == 2 and row.shape[0] == 1:
            row = row[0]
        if row.ndim != 1:
            raise UserError(f"ids has shape {row.shape}: give one row of token ids.")
        return [tokenizer.token_text(int(id)) for id in row]

    def run(self, prompt: Any, **how: Any) -> Trace:
        """`run` on a text, on texts of one length, on a list of ids, or on ids [batch, seq]; `how` as for `run`.

        Example:
          subject.run("The capital of France is")["blocks/3/mlp/out"]
        """
        return run(self.model, self._as_tokens(prompt), **how)

    def _as_tokens(self, prompt: Any) -> Any:
        texts = isinstance(prompt, Sequence) and all(isinstance(text, str) for text in prompt)
        if isinstance(prompt, str) or texts:
            return self.tokens(prompt)
        array = jnp.asarray(prompt) if isinstance(prompt, list | tuple) else prompt
        return array[None] if isinstance(array, jax.Array | np.ndarray) and array.ndim == 1 else array

    def _own_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"subject {self.name!r} has no tokenizer for {what}: give token ids, jnp.asarray([[...]]).")
        return self.tokenizer

    def __repr__(self) -> str:
        """One line: `Subject('tiny', Transformer of 4 blocks, 134,464 weights float32, 257 token ids)`."""
        arrays = [leaf for leaf in jax.tree.leaves(self.model) if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)]
        kinds = ", ".join(sorted({str(array.dtype) for array in arrays}))
        blocks = f" of {len(self.model.blocks)} blocks" if isinstance(self.model, Transformer) else ""
        ids = "no tokenizer" if self.tokenizer is None else f"{self.tokenizer.vocab_size:,} token ids"
        says = f", {self.source}" if self.source else ""
        return (
            f"Subject({self.name!r}, {type(self.model).__name__}{blocks}, "
            f"{sum(array.size for array in arrays):,} weights {kinds}, {ids}{says})"
        )


def save_subject(subject: Subject, directory: str | Path) -> None:
    """Write the subject in our own form; `load(directory)` gives it back, bit for bit where the dtype is the same.

    Raises:
      UserError: the directory has files in it, or a leaf of the model was replaced by another module.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not empty: nothing is overwritten; give a new directory.")
    if not isinstance(subject.model, Transformer):
        raise UserError(f"a {type(subject.model).__name__} cannot be saved in our own form, only a Transformer can.")
    leaves = named_leaves(subject.model)
    shapes = leaf_shapes(subject.model.config)
    for name in [*leaves, *shapes]:
        if name not in shapes or name not in leaves or leaves[name].shape != shapes[name]:
            raise UserError(
                f"leaf {name!r} is not what the model's configuration describes: a model with a replaced leaf cannot "
                "be saved as a subject; save what replaced it on its own."
            )
    write_arrays(
        directory / "model.safetensors", {name: np.asarray(jax.device_get(leaf)) for name, leaf in leaves.items()}
    )
    description: dict[str, Json] = {
        "version": VERSION,
        "name": subject.name,
        "source": subject.source,
        "config": dataclasses.asdict(subject.model.config),
    }
    if subject.tokenizer is not None:
        write_text(directory / "tokenizer.json", subject.tokenizer.backend.to_str(pretty=True))
        description["tokenizer"] = {"begin": subject.tokenizer.begin, "end": subject.tokenizer.end}
        if subject.tokenizer.chat_template is not None:
            write_text(directory / "chat_template.jinja", subject.tokenizer.chat_template)
    write_text(directory / OWN_FORM, json.dumps(description, indent=2) + "\n")


def load_own(directory: Path, dtype: DTypeLike, sharding: Shardings = None) -> Subject:
    """Read a subject that `save_subject` wrote.

    Raises:
      UserError: a file is missing or damaged, or the configuration has an unknown, missing or malformed field.
    """
    description = _read_description(directory)
    config = read_own_config(directory)
    model = load_model(config, open_directory(directory), None, where=directory, dtype=dtype, sharding=sharding)
    tokenizer = None
    if isinstance(ends := description.get("tokenizer"), dict):
        tokenizer = dataclasses.replace(
            tokenizer_from_file(directory / "tokenizer.json"), begin=ends.get("begin"), end=ends.get("end")
        )
    return Subject(model, tokenizer, description["name"], str(description.get("source", "")))


def read_own_config(directory: Path) -> TransformerConfig:
    """The configuration of a subject that `save_subject` wrote.

    Raises:
      UserError: as `load_own`.
    """
    fields = _read_description(directory)["config"]
    return _read_dataclass(TransformerConfig, fields, f"{directory / OWN_FORM}: config")


def _read_description(directory: Path) -> dict[str, Json]:
    where = directory / OWN_FORM
    description: dict[str, Json] = read_json(where)
    for name in ("version", "name", "config"):
        if name not in description:
            raise UserError(f"{where}: field {name!r} is missing.")
    if description["version"] == 1:
        raise UserError(
            f"{where}: version=1 names projections 'mlp/up' and 'attn/out', this version 'mlp/up_proj' and "
            "'attn/o_proj': train the model again, or read it with the version that wrote it."
        )
    if description["version"] != VERSION:
        raise UserError(f"{where}: version={description['version']!r} is not supported; supported: {VERSION}.")
    if not isinstance(description["config"], dict) or not isinstance(description["name"], str):
        raise UserError(f"{where}: config should be an object and name a string.")
    return description


def _read_dataclass(kind: type, fields: dict[str, Json], where: str) -> Any:
    """An instance of `kind` from JSON, every field checked against its type."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in fields.items():
        if name not in hints:
            raise UserError(f"{where} has an unknown field {name}={value!r}.{suggest(name, hints)}")
        values[name] = _read_value(hints[name], value, f"{where} field {name}")
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise UserError(f"{where} field {field.name} is missing.")
    return kind(**values)


def _read_value(hint: Any, value: Any, where: str) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _read_value(next(choice for choice in choices if choice is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read_value(choices[0], item, where) for item in value)
    if hint in PARTS and isinstance(value, dict):
        return _read_dataclass(hint, value, where)
    if origin is typing.Literal and value in choices:
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    expected = ", ".join(map(repr, choices)) if origin is typing.Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}={value!r} is not supported; expected: {expected}.")
