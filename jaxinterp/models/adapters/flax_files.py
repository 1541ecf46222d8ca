"""Checkpoints of Flax models, as nested dictionaries of arrays.

    arrays = read_flax("checkpoint_1000.msgpack")      what flax.serialization wrote
    arrays = read_flax("run/checkpoints/1000")         what Orbax wrote
    model = from_linen(module, {"params": arrays["params"]}, places)
    model = from_nnx(fill_nnx(nnx_model, arrays), places)

A msgpack file is a tree of maps. An array is an extension of type 1 (a NumPy scalar: type 3), again msgpack: (shape,
name of the dtype, bytes in row-major order); one of more than 1 GiB is a map of its shape and flat chunks. A list or
tuple is a map with the keys "0", "1", ...

Files are data: nothing is unpickled, only types of numbers are known, and every array's shape is compared with the
bytes that are there.

Facts: Flax 0.12.8, flax/serialization.py.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import fill_leaves
from jaxinterp.models.files.safetensors_file import pickle_refusal
from jaxinterp.storage.arrays import read_arrays

ARRAY, SCALAR = 1, 3
"""Flax's types of msgpack extensions; 2 is a single complex number, which no model's parameters hold."""

NUMBERS = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
DTYPES = {name: jnp.dtype(name) for name in (*NUMBERS, "float16", "float32", "float64", "bfloat16")}

CHUNKED = "__msgpack_chunked_array__"
LONGEST_LIST = 4096  # a list is allocated by the length that it claims


def read_flax(path: str | Path) -> dict[str, Any]:
    """The arrays of a Flax checkpoint: nested dictionaries with text keys, NumPy arrays at the ends.

    Numbers become arrays of no axes, lists dictionaries with the keys "0", "1", ...; what is empty is left out.

    Args:
      path: a msgpack file of `flax.serialization`, or the folder of an Orbax checkpoint.
    Raises:
      UserError: it is neither, it is damaged, or it holds something else than numbers.
    """
    path = Path(path)
    if path.is_dir():
        return _plain(read_arrays(path), str(path))
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: give a msgpack file or an Orbax folder.")
    if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle"):
        raise UserError(pickle_refusal(path))
    try:
        tree = msgpack.unpackb(
            path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False, max_array_len=LONGEST_LIST
        )
        return _plain(tree, str(path))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a msgpack file of Flax, or it is damaged: {error}") from error


def fill_nnx(model: nnx.Module, arrays: Mapping[str, Any]) -> nnx.Module:
    """A copy of the model with its variables taken from `arrays`, by their paths.

    Every parameter must be there. Other variables, such as the means of a BatchNorm, are taken where they are there and
    otherwise stay as they are; keys and counters of random numbers always stay.

    Args:
      arrays: as `read_flax` gives them, of a state (`nnx.state(model)`) or of its pure dictionary.
    Raises:
      UserError: a parameter is missing, an array is of another shape than its variable, or has no place in the model.
    """
    model = nnx.clone(model)
    state = nnx.state(model, nnx.Not(nnx.RngState))
    places = {"/".join(map(str, path)): path for path in flatten_dict(nnx.to_pure_dict(state))}
    parameters = _by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    random = {name.removesuffix("/value") for name in _by_name(nnx.to_pure_dict(nnx.state(model, nnx.RngState)))}
    given = {name.removesuffix("/value"): array for name, array in _by_name(arrays).items()}
    new = {name: array for name, array in given.items() if name in places or name not in random}
    wanted = {
        name: array for name, array in _by_name(nnx.to_pure_dict(state)).items() if name in parameters or name in new
    }
    fill_leaves(dict.fromkeys(wanted, 0), new)  # the same names, or an error
    for name, array in wanted.items():
        if new[name].shape != jnp.shape(array):
            kind = "parameter" if name in parameters else "variable"
            raise UserError(f"{kind} {name!r} has shape {new[name].shape}, but the model's has {jnp.shape(array)}.")
    filled = {places[name]: jnp.asarray(new[name], jnp.result_type(array)) for name, array in wanted.items()}
    nnx.replace_by_pure_dict(state, unflatten_dict(filled))
    nnx.update(model, state)
    return model


def _by_name(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def _extension(code: int, data: bytes) -> Any:
    if code not in (ARRAY, SCALAR):
        raise UserError(f"an entry is of the unknown kind {code}; arrays and numbers are read.")
    match msgpack.unpackb(data, raw=True, max_array_len=64):
        case [list(shape), bytes(name), bytes(buffer)] if all(isinstance(size, int) and size >= 0 for size in shape):
            pass
        case _:
            raise UserError("an array is not stored as (shape, dtype, bytes).")
    dtype = DTYPES.get(name.decode("ascii", "replace"))
    if dtype is None:
        raise UserError(f"an array has dtype {name!r}; read are {', '.join(DTYPES)}.")
    if math.prod(shape) * dtype.itemsize != len(buffer):
        raise UserError(f"an array of shape {shape} and dtype {dtype} has {len(buffer)} bytes.")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _plain(tree: Any, name: str) -> Any:
    """The tree with text keys, without what is empty, chunks put together."""
    if isinstance(tree, Mapping) and CHUNKED in tree:
        return _unchunked(tree, name)
    if isinstance(tree, list | tuple):
        tree = {str(index): entry for index, entry in enumerate(tree)}
    if isinstance(tree, Mapping):
        if len({str(key) for key in tree}) < len(tree):
            raise UserError(f"{name} holds a number and the same number as text as names of two entries.")
        entries = {str(key): _plain(entry, f"{name}/{key}") for key, entry in tree.items()}
        return {key: entry for key, entry in entries.items() if not (isinstance(entry, dict) and not entry)}
    if tree is None:
        return {}
    if isinstance(tree, np.ndarray | np.generic | bool | int | float):
        return np.asarray(tree)
    raise UserError(f"{name} is a {type(tree).__name__}; arrays and numbers are read.")


def _unchunked(tree: Mapping[Any, Any], name: str) -> np.ndarray:
    """A large array from the flat pieces that it was cut into."""
    shapes, chunks = tree.get("shape"), tree.get("chunks")
    if not isinstance(shapes, dict) or not isinstance(chunks, dict):
        raise UserError(f"{name}: a large array is not stored as shape and chunks.")
    shape: list[Any] = [shapes.get(str(index)) for index in range(len(shapes))]
    pieces: list[Any] = [chunks.get(str(index)) for index in range(len(chunks))]
    whole = all(isinstance(size, int) and size >= 0 for size in shape) and all(
        isinstance(piece, np.ndarray) and piece.ndim == 1 for piece in pieces
    )
    if not whole or not pieces or sum(piece.size for piece in pieces) != math.prod(shape):
        raise UserError(f"{name}: the pieces of a large array do not make up its shape {shape}.")
    return np.concatenate(pieces).reshape(shape)
