"""Any decomposition into a folder and back, whatever its kind.

save(decomposition, "runs/a/dictionary")
load_decomposition("runs/a/dictionary")
"""

import json
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions import codec
from jaxinterp.decompositions.at_output import AtOutput
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.components import Components
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer, PerLayer
from jaxinterp.decompositions.cross_layer_files import load_cross_layer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.directions import Directions
from jaxinterp.decompositions.experts import DenseNeurons, DenseStudent, Experts, Router, Scaling
from jaxinterp.decompositions.factor_analysers import FactorAnalysers
from jaxinterp.decompositions.files import load_dictionary
from jaxinterp.decompositions.linear_transforms import LinearTransforms
from jaxinterp.decompositions.mixture_of_decoders import MixtureOfDecoders
from jaxinterp.decompositions.mlp_parts import MLPParts
from jaxinterp.decompositions.modules_on_disk import load_module
from jaxinterp.decompositions.on_disk import KNOWN
from jaxinterp.decompositions.own_experts import OwnExperts, OwnMonet
from jaxinterp.decompositions.parameter_parts import AttributionParts, Blocks, Gates, Lower, ParameterParts, Parts
from jaxinterp.decompositions.parts import NonnegativeParts
from jaxinterp.decompositions.per_token import PerToken
from jaxinterp.decompositions.plain import LinearMap, Neurons, PrincipalComponents
from jaxinterp.decompositions.product_key_neurons import ProductKeyNeurons
from jaxinterp.decompositions.scales import Scales
from jaxinterp.models.layers import Linear
from jaxinterp.models.mixtures.moe_x import MoEX
from jaxinterp.models.mixtures.monet import Horizontal, Monet
from jaxinterp.models.mixtures.product_keys import DenseScores, KeyScores, ProductKeyMLP
from jaxinterp.models.mlp import MLP
from jaxinterp.storage.files import check_empty

PER_LAYER = "per_layer.json"
"""How older versions marked a folder of one decomposition a layer."""

KINDS: tuple[type, ...] = (
    Dictionary,
    EffectDictionary,
    CrossLayer,
    Layer,
    PerLayer,
    Components,
    Scales,
    Experts,
    Router,
    Scaling,
    DenseNeurons,
    DenseStudent,
    FactorAnalysers,
    LinearMap,
    PrincipalComponents,
    Neurons,
    MLP,
    Linear,
    Directions,
    NonnegativeParts,
    PerToken,
    MixtureOfDecoders,
    LinearTransforms,
    ProductKeyNeurons,
    OwnExperts,
    OwnMonet,
    MoEX,
    Monet,
    Horizontal,
    ProductKeyMLP,
    DenseScores,
    KeyScores,
    AtOutput,
    MLPParts,
    Lower,
    ParameterParts,
    Parts,
    Gates,
    Blocks,
    AttributionParts,
    *KNOWN,
)
"""The classes that a file may name without being told of them."""


def save(decomposition: PyTree, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a decomposition into a folder, which is made if it is not there, and return the folder.

    Args:
      decomposition: any module made of declared fields: arrays, numbers, words, tuples, and other such modules. Of a
        kind of your own, pass its class to `load_decomposition`.
      overwrite: write also where the folder has files in it.
    Raises:
      UserError: the folder has files in it, the disk is full, or a field holds what no file can (a function).

    Example:
      >>> folder = save(result.decomposition, "transcoder", overwrite=True)
    """
    if not isinstance(decomposition, eqx.Module):
        raise UserError(
            f"a {type(decomposition).__name__} has no form on disk: save one decomposition (an Equinox module) at a "
            "time; of a Fit, its .decomposition."
        )
    return codec.write_tree(decomposition, check_empty(folder, overwrite=overwrite))


def load_decomposition(folder: str | Path, *, kinds: Sequence[type] = (), activations: Sequence[type] = ()) -> PyTree:
    """Read back what `save` wrote, or what older versions did.

    Args:
      kinds: classes of your own that the file may name, activations among them: `kinds=(MyKind,)`. No code is loaded by
        name.
      activations: the same, under an older name.
    Raises:
      UserError: the folder holds no decomposition, or a file in it is missing or damaged.

    Example:
      >>> load_decomposition(folder).features
      64
    """
    folder, own = Path(folder), (*kinds, *activations)
    if (folder / f"{codec.NAME}.json").is_file():
        return codec.read_tree(folder, (*KINDS, *own))
    if (folder / "dictionary.json").is_file():
        return load_dictionary(folder, activations=(*KNOWN, *own))
    if (folder / "cross_layer.json").is_file():
        return load_cross_layer(folder, activations=(*KNOWN, *own))
    if (folder / "module.json").is_file():
        return load_module(folder)
    if (folder / PER_LAYER).is_file():
        try:
            count = int(json.loads((folder / PER_LAYER).read_text())["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / PER_LAYER} is damaged: {error}") from error
        return PerLayer(tuple(load_decomposition(folder / str(n), kinds=own) for n in range(count)))
    names = (f"{codec.NAME}.json", "dictionary.json", "cross_layer.json")
    inside = [each.parent.name for name in names for each in sorted(folder.glob(f"*/{name}"))]
    hint = f" Did you mean {folder / inside[0]}?" if inside else ""
    raise UserError(f"no decomposition in {folder}: give the folder that save wrote.{hint}")
