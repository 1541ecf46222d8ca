"""Which tensors a Hugging Face folder of a configuration must hold: names and shapes, without any file."""

from collections.abc import Mapping
from typing import Any

from jaxinterp.models.families.configs import family_config, family_of
from jaxinterp.models.families.tables import Family
from jaxinterp.models.files.weights import leaf_shapes, look_up
from jaxinterp.models.transformer import TransformerConfig


def wanted_tensors(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
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
