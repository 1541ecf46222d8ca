"""Any decomposition into a folder and back, whatever its kind.

save(decomposition, "runs/a/dictionary")
load_decomposition("runs/a/dictionary")
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.cross_layer import CrossLayer, PerLayer
from jaxinterp.decompositions.cross_layer_files import load_cross_layer, save_cross_layer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.decompositions.modules_on_disk import MODULES, load_module, save_module
from jaxinterp.decompositions.on_disk import KNOWN
from jaxinterp.storage.files import check_empty, write_text

PER_LAYER = "per_layer.json"
KINDS: dict[str, Callable[..., Any]] = {
    "dictionary.json": load_dictionary,
    "cross_layer.json": load_cross_layer,
    "module.json": load_module,
}
"""The file by which a folder is known, and what reads it."""


def save(decomposition: Any, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a decomposition into a folder, which is made if it is not there, and return the folder.

    Args:
      decomposition: a dictionary, a cross-layer transcoder, or one decomposition a layer (`PerLayer`).
      overwrite: write also where the folder has files in it.
    Raises:
      UserError: the folder has files in it, the disk is full, or this kind of decomposition has no file form.
    """
    if isinstance(decomposition, MODULES):
        return save_module(decomposition, check_empty(folder, overwrite=overwrite))
    if not isinstance(decomposition, Dictionary | EffectDictionary | CrossLayer | PerLayer):
        raise UserError(
            f"a {type(decomposition).__name__} has no form on disk: save dictionaries, cross-layer transcoders, or "
            "what PerLayerTranscoders gives; of a Fit, its .decomposition."
        )
    folder = check_empty(folder, overwrite=overwrite)
    if isinstance(decomposition, CrossLayer):
        return save_cross_layer(decomposition, folder)
    if isinstance(decomposition, PerLayer):
        for number, part in enumerate(decomposition.parts):
            save(part, folder / str(number), overwrite=overwrite)
        write_text(folder / PER_LAYER, json.dumps({"format": 1, "parts": len(decomposition.parts)}) + "\n")
        return folder
    return save_dictionary(decomposition, folder)


def load_decomposition(folder: str | Path, *, activations: Sequence[type[Activation]] = KNOWN) -> Any:
    """Read back what `save` wrote.

    Args:
      activations: the classes that a file may name; add your own. No code is loaded by name.
    Raises:
      UserError: the folder holds no decomposition, or a file in it is missing or damaged.
    """
    folder = Path(folder)
    for name, read in KINDS.items():
        if (folder / name).is_file():
            return read(folder, activations=activations)
    if (folder / PER_LAYER).is_file():
        try:
            count = int(json.loads((folder / PER_LAYER).read_text())["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / PER_LAYER} is damaged: {error}") from error
        return PerLayer(tuple(load_decomposition(folder / str(n), activations=activations) for n in range(count)))
    inside = [each.parent.name for name in KINDS for each in sorted(folder.glob(f"*/{name}"))]
    hint = f" Did you mean {folder / inside[0]}?" if inside else ""
    raise UserError(f"no decomposition in {folder}: give the folder that save wrote.{hint}")
