"""A cross-layer transcoder on disk, in the form of `codec`; and in that of older versions, which is read and no longer
written: `cross_layer.json` (what is static) beside `cross_layer.safetensors` (the arrays).
"""

from collections.abc import Sequence
from pathlib import Path

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions import codec
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer
from jaxinterp.decompositions.on_disk import (
    KNOWN,
    check_arrays,
    damage,
    make_activation,
    make_sites,
    read,
    take,
)

NAME = "cross_layer"


def save_cross_layer(cross: CrossLayer, folder: str | Path) -> Path:
    """Write a cross-layer transcoder into a folder, in the one form of all decompositions."""
    return codec.write_tree(cross, Path(folder))


def load_cross_layer(folder: str | Path, *, activations: Sequence[type[Activation]] = KNOWN) -> CrossLayer:
    """Read a cross-layer transcoder back.

    Args:
      activations: the classes that the file may name; add your own.
    Raises:
      UserError: a file is missing or damaged, an array is missing, left over or of another shape than the others, or
        an activation is unknown.
    """
    folder = Path(folder)
    if (folder / f"{codec.NAME}.json").is_file():
        found = codec.read_tree(folder, (CrossLayer, Layer, *activations))
        assert isinstance(found, CrossLayer)
        return found
    with damage(folder):
        static, arrays = read(folder, NAME)
        layers = []
        for number, settings in enumerate(static["activations"]):
            own = take(arrays, f"layers/{number}/activation/")
            activation = make_activation(settings, own, folder, activations)
            layers.append(Layer(**take(arrays, f"layers/{number}/"), activation=activation))
            check_arrays((layers[-1], activation), folder)
        if arrays:
            raise UserError(f"the decomposition in {folder} is damaged: unknown arrays {sorted(arrays)[:3]}.")
        return CrossLayer(tuple(layers), make_sites(static["sites"]))
