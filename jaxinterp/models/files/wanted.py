"""Which tensors a Hugging Face folder of a configuration must hold: names and shapes, without any file."""

from collections.abc import Collection, Mapping

import numpy as np

from jaxinterp.core.json_value import Json
from jaxinterp.models.families.configs import family_config, family_of
from jaxinterp.models.families.tables import Family
from jaxinterp.models.files.weights import StoredTensor, leaf_shapes, look_up
from jaxinterp.models.transformer import TransformerConfig


def wanted_tensors(fields: Mapping[str, Json]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name in the file.

    Args:
      fields: of a config.json.
    Raises:
      UserError: the family or a field is not supported.
    """
    family = family_of(fields)
    return tensors_of(family, family_config(family, fields))


def tensors_of(family: Family, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The same, of a family and a configuration."""
    shapes, table = leaf_shapes(config), family.table(config)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        theirs, layout = look_up(table, name)
        stored = layout.sized(name, shapes).file_shape(shape)
        if "#" in theirs:  # one tensor an expert
            found |= {theirs.replace("#", str(number)): stored[1:] for number in range(stored[0])}
        else:
            found[theirs] = stored
    return found


def without_zero_biases(tensors: Mapping[str, StoredTensor], known: Collection[str]) -> dict[str, StoredTensor]:
    """The tensors, but biases of 0 that the model has no place for: packers write one for every matrix.

    Args:
      known: names that the model has a place for.
    """

    def is_nothing(name: str, tensor: StoredTensor) -> bool:
        if name in known or not name.endswith(".bias") or tensor.refusal is not None:
            return False
        return len(tensor.shape) == 1 and not np.any(tensor.read(slice(None), None))

    return {name: tensor for name, tensor in tensors.items() if not is_nothing(name, tensor)}
