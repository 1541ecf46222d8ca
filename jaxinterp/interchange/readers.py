"""Formats by the names of their files: which one lies at a path, and what reads it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.interchange import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    saelens,
    sparsify,
    torch_dictionaries,
)
from jaxinterp.interchange.contents import Contents
from jaxinterp.interchange.saelens_fields import REFUSED

Format = Literal[
    "saelens",
    "sparsify",
    "circuit_tracer",
    "circuit_tracer_clt",
    "gemma_scope",
    "gemma_scope_2",
    "gemma_scope_2_clt",
    "llama_scope",
    "dictionary_learning",
    "qwen_scope",
    "hook_z",
    "goodfire",
    "openai",
]


@dataclass(frozen=True)
class Reader:
    """How a format is known: by the names of its files; whether the reader takes the folder; and the reader.

    `there`: whether a folder has it, where the names alone do not tell; `called`: the file's name for people.
    """

    file: str
    takes_folder: bool
    read: Callable[[Path], Contents]
    there: Callable[[Path], bool] | None = None
    called: str = ""

    def shown(self) -> str:
        """The file's name, for messages."""
        return self.called or self.file.replace("\\", "")

    def names(self, path: Path) -> bool:
        """Whether a file of this name is one of the format."""
        return re.fullmatch(self.file, path.name) is not None

    def found(self, folder: Path) -> list[Path]:
        """The files of the format in a folder, in order."""
        if self.there is not None and not self.there(folder):
            return []
        return sorted(path for path in folder.iterdir() if self.names(path))


def _exactly(name: str) -> str:
    return re.escape(name)


def _is_saelens(folder: Path) -> bool:
    return (folder / saelens.WEIGHTS).is_file() and not llama_scope.is_llama_scope(folder)


READERS: dict[str, Reader] = {
    "saelens": Reader(_exactly(saelens.WEIGHTS), True, saelens.read_saelens, _is_saelens),
    "sparsify": Reader(_exactly(sparsify.WEIGHTS), True, sparsify.read_sparsify),
    "circuit_tracer": Reader(
        circuit_tracer.FILE.pattern, False, circuit_tracer.read_layer, called="layer_<n>.safetensors"
    ),
    "circuit_tracer_clt": Reader(
        circuit_tracer.ENCODER.pattern, False, circuit_tracer.read_clt_layer, called="W_enc_<n>.safetensors"
    ),
    "gemma_scope": Reader(_exactly(gemma_scope.NAME), False, gemma_scope.read_gemma_scope),
    "gemma_scope_2": Reader(_exactly(gemma_scope_2.NAME), False, gemma_scope_2.read_gemma_scope_2),
    "gemma_scope_2_clt": Reader(
        gemma_scope_2.LAYER.pattern, False, gemma_scope_2.read_layer_alone, called="params_layer_<n>.safetensors"
    ),
    "llama_scope": Reader(
        rf"{_exactly(llama_scope.HYPERPARAMETERS)}|{_exactly(llama_scope.CONFIG)}",
        True,
        llama_scope.read_llama_scope,
        llama_scope.is_llama_scope,
        "hyperparams.json",
    ),
    "dictionary_learning": Reader(
        _exactly(dictionary_learning.NAME), False, dictionary_learning.read_dictionary_learning
    ),
    "qwen_scope": Reader(
        torch_dictionaries.QWEN_FILE.pattern, False, torch_dictionaries.read_qwen_scope, called="layer<n>.sae.pt"
    ),
    "hook_z": Reader(r".+_Hcat_z_.+\.pt", False, torch_dictionaries.read_hook_z, called="..._Hcat_z_....pt"),
    "goodfire": Reader(r".+-SAE-l\d+\.pth?", False, torch_dictionaries.read_goodfire, called="...-SAE-l<n>.pt"),
    "openai": Reader(r"autoencoder\.pt", False, torch_dictionaries.read_openai),
}

WHOLE: dict[str, Callable[[Path], Any]] = {
    "circuit_tracer": circuit_tracer.read_set,
    "circuit_tracer_clt": circuit_tracer.read_clt,
    "gemma_scope_2_clt": gemma_scope_2.read_gemma_scope_2_clt,
}
"""Formats whose folder holds all layers of a model: what reads all of them."""


def locate(path: Path, format: str | None) -> tuple[Path, str]:
    """What the reader of the format takes (a folder of all layers for those of WHOLE), and the format.

    Raises:
      UserError: nothing is there, no format fits, or several do.
    """
    if format is not None and format not in READERS:
        raise UserError(f"format={format!r} is unknown; known: {', '.join(READERS)}.{suggest(format, READERS)}")
    if not path.exists():
        raise UserError(f"nothing is at {path}.")
    if path.is_file():
        chosen = format or _by_file(path)
        if chosen is None:
            raise UserError(f"{path} has an unknown format; pass its folder, or format=.")
        reader = READERS[chosen]
        if reader.takes_folder and not reader.names(path):
            raise UserError(f"{path}: format={chosen!r} has its arrays in {reader.shown()}.")
        return (path.parent if reader.takes_folder else path), chosen
    found = {name: files for name, reader in READERS.items() if (files := reader.found(path))}
    if format is None and len(found) > 1:
        raise UserError(f"{path} has files of {' and '.join(found)}: pass format=.")
    if not found or (format is not None and format not in found):
        wanted = [READERS[format].shown()] if format else [reader.shown() for reader in READERS.values()]
        raise UserError(f"no {' or '.join(wanted)} in {path}.{_refused_folder(path)}")
    chosen = format or next(iter(found))
    alone = chosen == "circuit_tracer" and len(found[chosen]) == 1
    if READERS[chosen].takes_folder or (chosen in WHOLE and not alone):
        return path, chosen
    if len(found[chosen]) > 1:
        raise UserError(f"{path} has {len(found[chosen])} files of {chosen}: read one of them.")
    file = found[chosen][0]
    return file, (_by_file(file) or chosen) if format is None else chosen


def _by_file(path: Path) -> str | None:
    if path.suffix in (".pt", ".pth"):
        return torch_dictionaries.format_of(path)
    named = [name for name, reader in READERS.items() if reader.names(path)]
    if named:
        return named[0]
    return {".npz": "gemma_scope"}.get(path.suffix)


def _refused_folder(folder: Path) -> str:
    """Why a folder of a known kind is not read, where it is one."""
    if (folder / "conf.yaml").is_file():
        return f" It looks like a temporal autoencoder, which is not supported: {REFUSED['temporal']}."
    return ""
