"""A dictionary on disk: `dictionary.json` (what is static) beside `dictionary.safetensors` (every leaf by its name).

Activation, k and sites are saved with the arrays, because a dictionary loaded with another activation or at another
site gives wrong numbers without an error.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxinterp.data.batch import Sites
from jaxinterp.decompositions.dictionary import Activation, BatchTopK, Dictionary, ReLU, TopK
from jaxinterp.errors import UserError, suggest
from jaxinterp.trees import named_leaves

ACTIVATIONS: dict[str, type[Activation]] = {"ReLU": ReLU, "TopK": TopK, "BatchTopK": BatchTopK}


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary into a folder, which is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    static = {
        "format": 1,
        "activation": {"kind": type(dictionary.activation).__name__, **asdict(dictionary.activation)},
        "sites": asdict(dictionary.sites),
    }
    save_file(
        {name: np.asarray(leaf) for name, leaf in named_leaves(dictionary).items()}, folder / "dictionary.safetensors"
    )
    (folder / "dictionary.json").write_text(json.dumps(static, indent=2) + "\n")
    return folder


def load_dictionary(folder: str | Path) -> Dictionary:
    """Read a dictionary back.

    Raises:
      UserError: a file is missing or damaged, an array is missing or left over, or the activation is unknown.
    """
    folder = Path(folder)
    for name in ("dictionary.json", "dictionary.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {folder}: give the folder that save_dictionary wrote.")
    try:
        static = json.loads((folder / "dictionary.json").read_text())
        arrays = load_file(folder / "dictionary.safetensors")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"the dictionary in {folder} is damaged: {error}") from error
    activation = dict(static["activation"])
    kind = activation.pop("kind")
    if kind not in ACTIVATIONS:
        raise UserError(f"activation {kind!r} in {folder} is unknown.{suggest(kind, ACTIVATIONS)}")
    known = {field.name for field in fields(Dictionary)} - {"activation", "sites", "skip"}
    if set(arrays) - {"skip"} != known:
        raise UserError(
            f"arrays of the dictionary in {folder}: {sorted(set(arrays) ^ known - {'skip'})} missing or unknown."
        )
    leaves: dict[str, Any] = {name: jnp.asarray(array) for name, array in arrays.items()}
    return Dictionary(
        **{"skip": None, **leaves}, activation=ACTIVATIONS[kind](**activation), sites=Sites(**static["sites"])
    )
