"""Safetensors files: a JSON header, then raw arrays. Opened by reading the header only, read by memory map.

The header is checked against the size of the file before anything is allocated: lengths, shapes, types, and that the
arrays follow each other without overlap or gap (https://github.com/huggingface/safetensors, "Format").
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.weights import Rows, StoredTensor

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types that hold weights as they are."""

PACKED = {"U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "U32": np.uint32}
PACKED |= {"I64": np.int64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
"""Types of quantised weights (`quantised.py`): they can be read, and are not weights as they are."""

ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}

LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, as in the reference implementation."""


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name; reads the header only.

    Raises:
      UserError: the file is not safetensors, truncated, or its header contradicts itself or the file's size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > min(size - 8, LARGEST_HEADER):
            raise UserError(
                f"{path}: the header would take {header_size} bytes of a file of {size}: it is truncated or no "
                "safetensors file; fetch it again."
            )
        header_bytes = file.read(header_size)
    try:
        header = json.loads(header_bytes)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: the safetensors header is not a JSON object ({error}); fetch the file again."
        ) from error

    spans = {name: _checked_span(path, name, entry) for name, entry in entries.items()}
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise UserError(f"{path}: tensor {name!r} {what} (data_offsets {begin}..{stop}); the file is damaged.")
        end = stop
        if 8 + header_size + end > size:
            raise UserError(
                f"{path}: tensor {name!r} ends at byte {8 + header_size + end}, but the file has {size}: it is "
                "truncated; fetch it again."
            )
    if 8 + header_size + end != size:
        raise UserError(f"{path}: {size - 8 - header_size - end} bytes after the last tensor; the file is damaged.")
    return {
        name: StoredTensor(
            name=name,
            file=path,
            shape=tuple(entry["shape"]),
            refusal=_refusal(entry["dtype"]),
            read=_reader(path, 8 + header_size + spans[name][0], tuple(entry["shape"]), entry["dtype"]),
            kind=entry["dtype"],
        )
        for name, entry in entries.items()
    }


def _checked_span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The data offsets of one header entry, once they agree with its shape and type."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if len(
            shape
        ) <= 8 and all(type(axis) is int and 0 <= axis < 2**63 for axis in shape):
            pass
        case _:
            raise UserError(f"{path}: tensor {name!r} has a malformed header entry; the file is damaged.")
    if dtype not in ITEM_BYTES:
        raise UserError(f"{path}: tensor {name!r} has unknown type {dtype!r}; supported: {', '.join(FLOATS)}.")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if not 0 <= begin <= end or end - begin != needed:
        raise UserError(
            f"{path}: tensor {name!r} of shape {shape} and type {dtype} needs {needed} bytes, but data_offsets "
            f"{begin}..{end} span {end - begin}; the file is damaged."
        )
    return begin, end


def _refusal(dtype: str) -> str | None:
    """Why arrays of this type cannot be weights, if they cannot."""
    return None if dtype in FLOATS else f"has type {dtype}; supported: {', '.join(FLOATS)} (dequantise it first)."


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> Callable[[Rows, slice | None], np.ndarray]:
    def read(rows: Rows, columns: slice | None) -> np.ndarray:
        number: Any = (FLOATS | PACKED)[dtype]
        if 0 in shape:
            return np.zeros(shape, number)
        whole = np.memmap(path, dtype=number, mode="r", offset=offset, shape=shape)
        part = whole[rows if shape else ()] if columns is None else whole[rows, columns]
        return np.array(part)  # a copy: nothing of the mapped file is kept

    return read


def open_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Raises:
      UserError: neither is there, or a file contradicts the index.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return open_safetensors(single)
    if not index.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickles:
            raise UserError(pickle_refusal(directory / pickles[0]))
        raise UserError(f"no weights in {directory}: neither model.safetensors nor model.safetensors.index.json.")
    try:
        files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} has no readable weight_map ({error!r}); fetch it again.") from error
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: weight_map sends tensor {name!r} to {file!r}, which is not a plain file name.")
    opened: dict[str, Mapping[str, StoredTensor]] = {}
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise UserError(f"{index} names {file!r}, which is not in {directory}; fetch the missing part.")
        opened[file] = open_safetensors(directory / file)
    for name, file in files.items():
        if name not in opened[file]:
            raise UserError(f"{index} says that {file!r} holds tensor {name!r}; it does not.")
    unlisted = [(file, name) for file, tensors in opened.items() for name in tensors if files.get(name) != file]
    if unlisted:
        raise UserError(f"{directory / unlisted[0][0]} holds tensor {unlisted[0][1]!r}, which {index} puts elsewhere.")
    return {name: opened[file][name] for name, file in files.items()}


def pickle_refusal(path: Path) -> str:
    """What to say where only a pickle checkpoint exists."""
    return (
        f"{path} is a pickle checkpoint, which can run code when it is read: convert it to safetensors, for example "
        "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(directory)."
    )
