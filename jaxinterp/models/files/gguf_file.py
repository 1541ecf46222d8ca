"""GGUF files: metadata to configuration, quantised arrays to leaves; architectures: `gguf_architectures.py`.

A model may be split into files `name-00001-of-00003.gguf`, as llama.cpp's gguf-split does; any of them is given, all of
them are read. The `gguf` package reads and dequantises, a few rows at a time. llama.cpp's converter stores query and
key weights of Llama for a rotation of neighbouring dimensions; ours rotates dimensions half a head apart, so these rows
are put back (layout "rotary_pairs"). A file loads without that just as well, and is wrong.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, no_type_check

import gguf
import numpy as np
from gguf.quants import dequantize
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.gguf_architectures import ARCHITECTURES, FACTORS, FIELDS, PATTERN, factors_of, scaling_of
from jaxinterp.models.files.tokenizer import read_metadata
from jaxinterp.models.files.weights import LeafTable, Rows, StoredTensor
from jaxinterp.models.transformer import TransformerConfig

CHECKED = ("attention.value_length", "vocab_size", "rope.scaling.type", "rope.scaling.factor")
"""Metadata below the architecture's name that must agree with what is supported, or with the arrays."""

REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")


def gguf_tensors(reader: gguf.GGUFReader, where: Path) -> LeafTable:
    """Where the leaves of a file's architecture are.

    Raises:
      UserError: another architecture.
    """
    return ARCHITECTURES[_architecture(reader, where)].tensors


def gguf_config(reader: gguf.GGUFReader, tensors: Mapping[str, StoredTensor], where: Path) -> TransformerConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
      UserError: another architecture, a field that is unknown or not supported, or one that is missing.
    """
    name = _architecture(reader, where)
    kind, metadata = ARCHITECTURES[name], read_metadata(reader, f"{name}.")
    copied = FIELDS | dict(kind.fields)
    _check_metadata(metadata, {*copied, *CHECKED, *kind.reads}, name, where)
    if "token_embd.weight" not in tensors:
        raise UserError(f"{where}: missing tensor 'token_embd.weight'.")
    heads = metadata["attention.head_count"]
    head_dim = metadata.get("attention.key_length", metadata["embedding_length"] // heads)
    whole = ("rope.dimension_count",) if name == "llama" else ()  # the converter permutes whole heads
    for field in ("attention.value_length", *whole):
        if metadata.get(field, head_dim) != head_dim:
            raise UserError(
                f"{where}: metadata {name}.{field}={metadata[field]} differs from the head size {head_dim}."
            )
    fields: dict[str, PyTree] = {"kv_heads": heads, "head_dim": head_dim, "rotary_dimensions": head_dim}
    fields |= {ours: metadata[theirs] for theirs, ours in copied.items() if theirs in metadata}
    given = factors_of(metadata, {each: tensors[each] for each in FACTORS if each in tensors}, fields, where)
    fields |= {"rotary_scaling": given or scaling_of(metadata, name)} | dict(kind.constants)
    return TransformerConfig(
        **fields | kind.more(metadata, fields),
        vocab_size=tensors["token_embd.weight"].shape[0],
        tied="output.weight" not in tensors,
    )


def _architecture(reader: gguf.GGUFReader, where: Path) -> str:
    name = read_metadata(reader, "general.").get("architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{where}: general.architecture={name!r} is not supported in GGUF files (supported: "
            f"{', '.join(ARCHITECTURES)}); load the model's Hugging Face directory instead."
        )
    return name


def _check_metadata(metadata: Mapping[str, PyTree], known: Collection[str], name: str, where: Path) -> None:
    for field, value in metadata.items():
        if field not in known:
            raise UserError(
                f"{where}: unknown metadata {name}.{field}={value!r}: a field that changes the computation must not be "
                f"ignored (known: {', '.join(sorted(known))})."
            )
        if field not in ("rope.scaling.type", PATTERN) and (
            isinstance(value, bool) or not isinstance(value, int | float)
        ):
            raise UserError(f"{where}: metadata {name}.{field}={value!r} should be one number.")
    for field in REQUIRED:
        if not metadata.get(field):
            raise UserError(f"{where}: metadata {name}.{field} is {'0' if field in metadata else 'missing'}.")


class _BoundedReader(gguf.GGUFReader):
    """The package's reader, but no count or length in the file may point past its end."""

    @no_type_check  # called for every piece of metadata
    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > self.data.size:
            raise ValueError(f"something ends at byte {end} of {self.data.size}")
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: Any, fields: list[Any]) -> None:
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
            elements = math.prod(int(axis) for axis in dims)
            end = int(start_offs) + int(offset[0]) + elements // block * block_bytes
            if end > self.data.size:
                raise ValueError(f"tensor {bytes(name).decode()!r} ends at byte {end} of {self.data.size}")
        super()._build_tensors(start_offs, fields)


PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""The name of one file of several: of which model, which one (from 1), of how many."""


def open_gguf(path: Path) -> tuple[gguf.GGUFReader, dict[str, StoredTensor]]:
    """A GGUF file, or all files of a split one: the first one's reader (for its metadata) and every tensor by name.

    Raises:
      UserError: a file is not GGUF, truncated, or absent, or one is of another model.
    """
    readers = [(part, _opened(part)) for part in parts_of(path)]
    for number, (part, reader) in enumerate(readers):
        split = read_metadata(reader, "split.")
        if split.get("count", 1) != len(readers) or split.get("no", number) != number:
            raise UserError(
                f"{part} says that it is file {split.get('no', 0) + 1} of {split.get('count', 1)}, but its name says "
                f"{number + 1} of {len(readers)}: give it the name that it was fetched under."
            )
    tensors = {tensor.name: _stored(part, tensor) for part, reader in readers for tensor in reader.tensors}
    wanted = read_metadata(readers[0][1], "split.").get("tensors.count", len(tensors))
    if wanted != len(tensors):
        raise UserError(
            f"{path}: its {len(readers)} files hold {len(tensors)} tensors, not {wanted}: fetch them again."
        )
    return readers[0][1], tensors


def parts_of(path: Path) -> list[Path]:
    """The files of a model, in order: the file itself, or all of a split one.

    Raises:
      UserError: one of several is absent.
    """
    name = PART.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name[3])
    parts = [path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(
            f"{path} is one of {count} files, and beside it {', '.join(missing[:3])} is missing: fetch all."
        )
    return parts


def described(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Which checkpoint a file holds, in words: `SmolLM2-135M-Instruct.Q4_1.gguf: Q4_1, dequantised`."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.kind] += math.prod(tensor.shape)
    kind = sizes.most_common(1)[0][0] if sizes else "empty"
    return f"{path.name}: {kind}" + ("" if kind in ("F32", "F16", "BF16", "empty") else ", dequantised")


def _opened(path: Path) -> gguf.GGUFReader:
    try:
        return _BoundedReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as GGUF ({error}): truncated or damaged; fetch it again.") from error


def _stored(path: Path, tensor: Any) -> StoredTensor:
    shape = tuple(int(axis) for axis in reversed(tensor.shape))

    def read(rows: Rows, columns: slice | None) -> np.ndarray:
        part = dequantize(np.array(tensor.data[rows]), tensor.tensor_type)
        return part if columns is None else part[:, columns]

    try:
        dequantize(np.array(tensor.data.reshape(-1, tensor.data.shape[-1])[:1]), tensor.tensor_type)
        refusal = None
    except (NotImplementedError, ValueError, IndexError, KeyError, TypeError) as error:
        refusal = f"has type {tensor.tensor_type.name}, which the gguf package cannot dequantise ({error})."
    return StoredTensor(tensor.name, path, shape, read, refusal, tensor.tensor_type.name)
