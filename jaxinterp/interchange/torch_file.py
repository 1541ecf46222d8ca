"""PyTorch's `.pt` files, read without PyTorch and without unpickling: a state dict of tensors, and nothing else.

The file is a zip archive: `data.pkl`, a pickle that describes the tensors, and `data/<key>`, the numbers of a storage.
A pickle is a program for a small stack machine, whose GLOBAL and REDUCE name and call anything. The machine here has
no such power: it knows the few opcodes that a state dict needs, three names that it never looks up

    collections.OrderedDict                  an empty dictionary
    torch._utils._rebuild_tensor_v2          (storage, offset, size, stride, ...): noted, not called
    torch.<Kind>Storage                      the type of a storage's numbers

and refuses the file at the first other one. Sizes and strides are checked against the storage, and the storage against
its member of the archive, before anything is allocated.

Sources: PyTorch's torch/serialization.py and docs/source/notes/serialization.rst; the standard library's pickletools.
"""

import math
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.interchange.zip_file import members, read_member
from jaxinterp.models.files.weights import Rows, StoredTensor

STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.IntStorage": np.int32,
    "torch.LongStorage": np.int64,
}
"""Types of numbers by the name of their storage."""

EMPTY, REBUILD = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
NAMES = {EMPTY, REBUILD, *STORAGES}

LARGEST_PICKLE = 2**20
"""Bytes of `data.pkl`: a state dict takes about a hundred a tensor."""


@dataclass(frozen=True)
class _Name:
    """One of NAMES; never looked up."""

    full: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a state dict that `torch.save` wrote; reads no numbers.

    Raises:
      UserError: the file is damaged, of the format before PyTorch 1.6, holds anything but named tensors, or a tensor
        that does not lie within its storage.
    """
    tensors, settings = _opened(path)
    for name in settings:
        raise UserError(f"{path}: entry {name[:80]!r} is not a tensor.")
    return tensors


def open_torch_with_settings(path: Path) -> tuple[dict[str, StoredTensor], dict[str, PyTree]]:
    """Every tensor of a state dict, and its entries that are text, numbers, truth values, null or dictionaries of such.

    Raises:
      UserError: as `open_torch`.
    """
    return _opened(path)


def _opened(path: Path) -> tuple[dict[str, StoredTensor], dict[str, PyTree]]:
    archive = members(path, compressed=False)
    pickles = [name for name in archive if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UserError(f"{path} has {len(pickles)} members data.pkl, where torch.save writes one.")
    root = pickles[0].removesuffix("data.pkl")
    order = archive.get(f"{root}byteorder")
    if order is not None and (order.file_size > 16 or read_member(path, order) != b"little"):
        raise UserError(f"{path}: byteorder is not little-endian: save the file anew on another machine.")
    if archive[pickles[0]].file_size > LARGEST_PICKLE:
        raise UserError(f"{path}: data.pkl has {archive[pickles[0]].file_size} bytes, more than any state dict needs.")
    entries = _run(read_member(path, archive[pickles[0]]), path)
    tensors = {
        name: _stored(name, value, archive, root, path) for name, value in entries.items() if isinstance(value, _Tensor)
    }
    settings = {name: _setting(name, value, path) for name, value in entries.items() if name not in tensors}
    return tensors, settings


def _setting(name: str, value: Any, path: Path) -> Any:
    """A plain value, or a small dictionary of such."""
    plain = (str, int, float, bool, type(None))
    if type(value) in plain:
        return value
    # A small one: a large one that many entries share would take for ever.
    if isinstance(value, dict) and len(value) <= 32 and all(type(each) in plain for each in value.values()):
        return value
    raise UserError(f"{path}: entry {name[:80]!r} is not a tensor.")


def _run(program: bytes, path: Path) -> dict[str, PyTree]:
    """What the pickle describes, by the machine of the module's docstring."""
    try:
        result = _machine(program, path)
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: data.pkl is not a readable pickle ({type(error).__name__}: {error}).") from error
    if not isinstance(result, dict):
        raise UserError(f"{path} holds no state dict, but a {type(result).__name__.lstrip('_')}.")
    return result


def _machine(program: bytes, path: Path) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def popped_to_mark() -> list[Any]:
        place = len(stack) - 1
        while stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        items = stack[place + 1 :]
        del stack[place:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(popped_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [_without_marks(stack[-length:], length)]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(argument.replace(" ", "."), path))
            case "STACK_GLOBAL":
                module, attribute = stack.pop(-2), stack.pop()
                # The text of a deeply shared tuple would take for ever.
                if type(module) is not str or type(attribute) is not str:
                    raise _refused("a global whose name is not text", path)
                stack.append(_name(f"{module[:60]}.{attribute[:60]}", path))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), path))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_built(called, arguments, path))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            case "SETITEMS":
                items = popped_to_mark()
                _fill(stack[-1], items)
            case "BUILD":
                # OrderedDict's attributes: the versions of the modules that the tensors came from.
                state, target = stack.pop(), stack[-1]
                if not isinstance(state, dict) or set(state) != {"_metadata"} or not isinstance(target, dict):
                    raise _refused("BUILD of an object", path)
            case "STOP":
                (result,) = stack
                return result
            case other:
                shown = f" {argument[:60]!r}" if isinstance(argument, str) else ""
                raise _refused(f"opcode {other}{shown}", path)
    raise ValueError("no STOP")


def _without_marks(items: list[Any], length: int) -> tuple[Any, ...]:
    if len(items) != length or any(item is _MARK for item in items):
        raise ValueError("too little on the stack")
    return tuple(items)


def _refused(what: str, path: Path) -> UserError:
    return UserError(
        f"{path}: its pickle asks for {what}, which no state dict of tensors needs and which could run code: nothing "
        "was run. Ask its author for a safetensors file."
    )


def _name(full: str, path: Path) -> _Name:
    if full not in NAMES:
        raise _refused(f"{full[:120]!r}", path)
    return _Name(full)


def _storage(identity: Any, path: Path) -> _Storage:
    match identity:
        case ("storage", _Name(full=kind), str(key), str(), int(count)) if kind in STORAGES and type(count) is int:
            return _Storage(kind, key, count)
        case _:
            raise _refused("a persistent object that is not a storage", path)


def _built(called: Any, arguments: Any, path: Path) -> Any:
    match called, arguments:
        case _Name(full=full), () if full == EMPTY:
            return {}
        case _Name(full=full), (_Storage() as storage, offset, tuple(size), tuple(stride), *_) if full == REBUILD:
            numbers = (offset, *size, *stride)
            if len(size) != len(stride) or len(size) > 8 or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError("malformed tensor")
            return _Tensor(storage, offset, size, stride)
        case _Name(full=full), _:
            raise _refused(f"a call of {full!r} as torch.save does not write it", path)
        case _:
            raise _refused("a call of something without a name", path)


def _fill(target: Any, items: list[Any]) -> None:
    # Keys are text only: the hash of a deeply shared tuple would take for ever.
    if not isinstance(target, dict) or len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError("a dictionary with other keys than text")
    target.update(zip(items[::2], items[1::2], strict=True))


def _stored(name: str, tensor: _Tensor, archive: Mapping[str, zipfile.ZipInfo], root: str, path: Path) -> StoredTensor:
    """The tensor, once it lies within its storage and the storage is all there."""
    dtype = np.dtype(STORAGES[tensor.storage.kind])
    info = archive.get(f"{root}data/{tensor.storage.key}")
    if info is None or info.file_size != tensor.storage.count * dtype.itemsize:
        there = "is missing" if info is None else f"has {info.file_size} bytes"
        raise UserError(
            f"{path}: tensor {name!r} needs storage {tensor.storage.key[:20]!r} of {tensor.storage.count} numbers of "
            f"{dtype.itemsize} bytes, but it {there}; the file is truncated or damaged."
        )
    count = math.prod(tensor.size)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.size, tensor.stride, strict=True))
    if count > tensor.storage.count or (count and last >= tensor.storage.count):
        raise UserError(
            f"{path}: tensor {name!r} claims size {list(tensor.size)} within a storage of {tensor.storage.count} "
            "numbers; the file is damaged."
        )

    def read(rows: Rows, columns: slice | None) -> np.ndarray:
        flat = np.frombuffer(read_member(path, info), dtype)
        strides = [stride * dtype.itemsize for stride in tensor.stride]
        whole = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.size, strides, writeable=False)
        return np.array(whole[rows if whole.ndim else ()] if columns is None else whole[rows, columns])

    return StoredTensor(name, path, tensor.size, read)
