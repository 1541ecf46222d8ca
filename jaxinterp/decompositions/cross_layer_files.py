"""A cross-layer transcoder on disk: `cross_layer.json` (what is static) beside `cross_layer.safetensors` (the arrays).

As with dictionaries: every array by its leaf name, no code loaded by name. A `PerLayer` is saved part by part, each
with `save_dictionary`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxinterp.data.batch import Sites
from jaxinterp.decompositions.activations import Activation, BatchTopK, ReLU, TopK
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.errors import UserError, suggest
from jaxinterp.trees import named_leaves

JSON, ARRAYS = "cross_layer.json", "cross_layer.safetensors"


def save_cross_layer(cross: CrossLayer, folder: str | Path) -> Path:
    """Write a cross-layer transcoder into a folder, which is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    static = {
        "format": 1,
        "sites": asdict(cross.sites),
        "activations": [_describe(layer.activation) for layer in cross.layers],
    }
    save_file({name: np.asarray(leaf) for name, leaf in named_leaves(cross).items()}, folder / ARRAYS)
    (folder / JSON).write_text(json.dumps(static, indent=2) + "\n")
    return folder


def load_cross_layer(
    folder: str | Path, *, activations: Sequence[type[Activation]] = (ReLU, TopK, BatchTopK, JumpReLU)
) -> CrossLayer:
    """Read a cross-layer transcoder back.

    Args:
      activations: the classes that the file may name; add your own.
    Raises:
      UserError: a file is missing or damaged, an array is missing or left over, or an activation is unknown.
    """
    folder = Path(folder)
    for name in (JSON, ARRAYS):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {folder}: give the folder that save_cross_layer wrote.")
    known = {activation.__name__: activation for activation in activations}
    try:
        static = json.loads((folder / JSON).read_text())
        arrays = {name: jnp.asarray(array) for name, array in load_file(folder / ARRAYS).items()}
        sites = Sites(**{port: tuple(names) for port, names in static["sites"].items()})
        layers = []
        for number, settings in enumerate(static["activations"]):
            kind = settings.pop("kind")
            if kind not in known:
                raise UserError(
                    f"activation {kind!r} in {folder} is unknown: pass its class in activations.{suggest(kind, known)}"
                )
            own = _take(arrays, f"layers/{number}/activation/")
            layers.append(Layer(**_take(arrays, f"layers/{number}/"), activation=known[kind](**settings, **own)))
    except UserError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the cross-layer transcoder in {folder} is damaged: {error}") from error
    if arrays:
        raise UserError(f"the cross-layer transcoder in {folder} is damaged: unknown arrays {sorted(arrays)[:3]}.")
    return CrossLayer(tuple(layers), sites)


def _take(arrays: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays below a prefix, taken out."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def _describe(activation: Any) -> dict[str, Any]:
    static = [field.name for field in fields(activation) if field.metadata.get("static", False)]
    return {"kind": type(activation).__name__, **{name: getattr(activation, name) for name in static}}
