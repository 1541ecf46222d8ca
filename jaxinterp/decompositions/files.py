"""A dictionary on disk, in the form of `codec`; and in that of older versions, which is read and no longer written:
`dictionary.json` (what is static) beside `dictionary.safetensors` (every leaf by its name).

Activation, k and sites are saved with the arrays, because a dictionary loaded with another activation or at another
site gives wrong numbers without an error. So is how it chooses its features, where that is by their effect.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions import codec
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.on_disk import (
    KNOWN,
    check_arrays,
    damage,
    make_activation,
    make_sites,
    read,
    take,
)

NAME = "dictionary"


def save_dictionary(dictionary: Dictionary | EffectDictionary, folder: str | Path) -> Path:
    """Write a dictionary into a folder, which is made if it is not there, in the one form of all decompositions."""
    return codec.write_tree(dictionary, Path(folder))


def load_dictionary(
    folder: str | Path, *, activations: Sequence[type[Activation]] = KNOWN
) -> Dictionary | EffectDictionary:
    """Read a dictionary back.

    Args:
      activations: the classes that the file may name; add your own. No code is loaded by name.
    Raises:
      UserError: a file is missing or damaged, an array is missing, left over or of another shape than the others, or
        the activation is unknown.
    """
    folder = Path(folder)
    if (folder / f"{codec.NAME}.json").is_file():
        found = codec.read_tree(folder, (Dictionary, EffectDictionary, *activations))
        assert isinstance(found, Dictionary | EffectDictionary)
        return found
    with damage(folder):
        static, arrays = read(folder, NAME)
        activation = make_activation(static["activation"], take(arrays, "activation/"), folder, activations)
        expected = {field.name for field in fields(Dictionary)} - {"activation", "sites", "skip"}
        if set(arrays) - {"skip"} != expected:
            different = sorted(set(arrays) ^ expected - {"skip"})
            raise UserError(f"the decomposition in {folder} is damaged: arrays {different} are missing or unknown.")
        sites = make_sites(static["sites"])
        filled: dict[str, PyTree] = {"skip": None, **arrays}
        dictionary = Dictionary(**filled, activation=activation, sites=sites)
        check_arrays((dictionary, activation), folder)
        by_effect = static.get("by_effect")
        if by_effect is None:
            return dictionary
        return EffectDictionary(dictionary, **by_effect | {"sites": make_sites(by_effect["sites"])})
