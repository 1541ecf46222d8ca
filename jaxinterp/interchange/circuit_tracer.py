"""circuit-tracer: transcoders in a file a layer, cross-layer transcoders in two; read and written.

    transcoder    layer_<n>.safetensors: W_enc (features, d), W_dec (features, d), b_enc, b_dec, and maybe
                  activation_function.threshold (JumpReLU, else ReLU), W_skip (d_out, d_in)
    cross-layer   W_enc_<n>.safetensors: W_enc_<n> (features, d), b_enc_<n>, b_dec_<n> and maybe threshold_<n>;
                  W_dec_<n>.safetensors: W_dec_<n> (features, layers - n, d), the write vectors for layers n, n + 1, ...

`config.yaml` names the hooks within a block: `feature_input_hook`, `feature_output_hook`. Of a cross-layer
transcoder one source layer may be read alone, for its codes: its write vectors are then summed over target layers, and
a warning says so. `decoder_rows` reads the write vectors of a few features, and nothing else, from the disk.

Source: circuit-tracer 0.5.0 (transcoder/single_layer_transcoder.py, cross_layer_transcoder.py, utils/hf_utils.py);
older files have W_dec as (d, features), which is told by its shape.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import yaml
from jaxtyping import Float, Int

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.activations import Activation, ReLU
from jaxinterp.decompositions.cross_layer import CrossLayer, PerLayer, fold_layers
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange.arrays import AxesByName, read_checked
from jaxinterp.interchange.contents import Contents, build, plain
from jaxinterp.interchange.fields import shown
from jaxinterp.interchange.layers import Source, cross_layer
from jaxinterp.interchange.names import Hooks, from_hooks, has_post_norms, to_hook
from jaxinterp.interchange.saelens_fields import BANDWIDTH
from jaxinterp.models.files.safetensors_file import open_safetensors
from jaxinterp.models.files.weights import StoredTensor
from jaxinterp.storage.files import write_arrays, write_text

CONFIG = "config.yaml"
FILE = re.compile(r"layer_(\d{1,4})\.safetensors")
ENCODER = re.compile(r"W_enc_(\d{1,4})\.safetensors")
THRESHOLD, SKIP = "activation_function.threshold", "W_skip"
LARGEST_CONFIG = 2**20
"""Bytes of a `config.yaml`."""


def read_layer(path: Path) -> Contents:
    """What a `layer_<n>.safetensors` and the `config.yaml` beside it say.

    Raises:
      UserError: a file is damaged, or has arrays that are unknown.
    """
    found = FILE.fullmatch(path.name)
    if found is None:
        raise UserError(f"{path}: a transcoder of circuit-tracer is named layer_<n>.safetensors.")
    stored = open_safetensors(path)
    layout: AxesByName = {"W_enc": ("features", "d_in"), "b_enc": ("features",), "b_dec": ("d_out",)}
    layout |= {"W_dec": ("features", "d_out") if _rows(stored) else ("d_out", "features")}
    layout |= {THRESHOLD: ("features",)} if THRESHOLD in stored else {}
    layout |= {SKIP: ("d_out", "d_in")} if SKIP in stored else {}
    arrays = read_checked(stored, layout, path, sizes={})
    decoder = arrays["W_dec"] if _rows(stored) else np.ascontiguousarray(arrays["W_dec"].T)
    hooks, no_site, model = _hooks(path.parent, int(found[1]))
    return Contents(
        encoder=arrays["W_enc"],
        encoder_bias=arrays["b_enc"],
        decoder=decoder,
        decoder_bias=arrays["b_dec"],
        activation=_activation(arrays.get(THRESHOLD)),
        subtracts=False,
        transcoder=True,
        skip=np.ascontiguousarray(arrays[SKIP].T) if SKIP in arrays else None,
        hooks=hooks,
        no_site=no_site,
        post_norms=has_post_norms(model),
        before_gain=hooks is not None and hooks.before_gain,
    )


def _rows(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether W_dec has one row a feature; older files have one column."""
    if "W_dec" not in stored or "b_enc" not in stored:
        return True
    return stored["W_dec"].shape[:1] == stored["b_enc"].shape


def read_set(folder: Path) -> list[Contents]:
    """Every `layer_<n>.safetensors` of a folder, from layer 0 on.

    Raises:
      UserError: a layer is missing, or a file is damaged.
    """
    return [read_layer(folder / f"layer_{layer}.safetensors") for layer in _layers(folder, FILE)]


def _layers(folder: Path, pattern: re.Pattern[str]) -> range:
    numbers = sorted(int(found[1]) for path in folder.iterdir() if (found := pattern.fullmatch(path.name)))
    if numbers != list(range(len(numbers))):
        missing = sorted(set(range(numbers[-1])) - set(numbers))
        raise UserError(f"{folder}: layers {missing[:5]} are missing; fetch them, or read one file.")
    return range(len(numbers))


def read_clt(folder: Path) -> CrossLayer:
    """A cross-layer transcoder.

    Raises:
      UserError: a file is missing or damaged, or `config.yaml` does not name the hooks.
    """
    layers = _layers(folder, ENCODER)
    hooks = [_hooks(folder, layer) for layer in layers]
    if hooks[0][0] is None:
        raise UserError(f"{hooks[0][1]}: write feature_input_hook and feature_output_hook into {folder / CONFIG}.")
    sites = [known.sites(has_post_norms(model)) for known, _, model in hooks if known is not None]
    if any(known is not None and known.before_gain for known, _, _ in hooks):
        raise UserError(f"{folder}: feature_input_hook is before a norm's gain, which a cross-layer file here is not.")
    sources = [_source(folder, layer, len(layers)) for layer in layers]
    reads = tuple(str(each.reads) for each in sites)
    writes = tuple(str(each.writes) for each in sites)
    return cross_layer(sources, Sites(reads, writes))


def _source(folder: Path, layer: int, layers: int) -> Source:
    arrays = _encoder(folder / f"W_enc_{layer}.safetensors", layer)
    path = folder / f"W_dec_{layer}.safetensors"
    if not path.is_file():
        raise UserError(f"no {path.name} in {folder}: it holds the write vectors; fetch it.")
    name = f"W_dec_{layer}"
    sizes = {"features": len(arrays["b_enc"]), "layers": layers - layer, "d_out": len(arrays["b_dec"])}
    decoder = read_checked(open_safetensors(path), {name: ("features", "layers", "d_out")}, path, sizes=sizes)[name]
    return Source(arrays["W_enc"], arrays["b_enc"], decoder, arrays["b_dec"], _activation(arrays.get("threshold")))


def _encoder(path: Path, layer: int) -> dict[str, np.ndarray]:
    stored = open_safetensors(path)
    layout: AxesByName = {f"W_enc_{layer}": ("features", "d_in"), f"b_enc_{layer}": ("features",)}
    layout |= {f"b_dec_{layer}": ("d_out",)}
    layout |= {f"threshold_{layer}": ("features",)} if f"threshold_{layer}" in stored else {}
    arrays = read_checked(stored, layout, path, sizes={})
    return {name.removesuffix(f"_{layer}"): array for name, array in arrays.items()}


def read_clt_layer(path: Path) -> Contents:
    """One source layer of a cross-layer transcoder, for its codes: `W_enc_<n>.safetensors`.

    Raises:
      UserError: a file is damaged, or the write vectors are missing.
    """
    found = ENCODER.fullmatch(path.name)
    if found is None:
        raise UserError(f"{path}: a layer of a cross-layer transcoder is read by its W_enc_<n>.safetensors.")
    layer = int(found[1])
    arrays, beside = _encoder(path, layer), path.with_name(f"W_dec_{layer}.safetensors")
    if not beside.is_file():
        raise UserError(f"no {beside.name} in {path.parent}: it holds the write vectors; fetch it.")
    name, sizes = f"W_dec_{layer}", {"features": len(arrays["b_enc"]), "d_out": len(arrays["b_dec"])}
    layout: AxesByName = {name: ("features", "layers", "d_out")}
    decoder = read_checked(open_safetensors(beside), layout, beside, sizes=sizes)[name].sum(axis=1)
    warnings.warn(
        f"{path}: one layer of a cross-layer transcoder: codes are those of the file, and what it writes is summed "
        "over the layers that it writes to; read the folder for the whole.",
        stacklevel=4,
    )
    hooks, no_site, model = _hooks(path.parent, layer)
    return Contents(
        encoder=arrays["W_enc"],
        encoder_bias=arrays["b_enc"],
        decoder=decoder,
        decoder_bias=arrays["b_dec"],
        activation=_activation(arrays.get("threshold")),
        subtracts=False,
        transcoder=True,
        hooks=hooks,
        no_site=no_site,
        post_norms=has_post_norms(model),
        before_gain=hooks is not None and hooks.before_gain,
    )


def decoder_rows(
    folder: str | Path, layer: int, features: Int[np.ndarray, " chosen"]
) -> Float[np.ndarray, "chosen layers d_out"]:
    """The write vectors of a few features of one layer of a cross-layer transcoder; no other row is read.

    Args:
      folder: with W_dec_<layer>.safetensors.
      features: their numbers.
    Raises:
      UserError: the file is missing or damaged, or a feature is not there.
    """
    path = Path(folder) / f"W_dec_{layer}.safetensors"
    if not path.is_file():
        raise UserError(f"no {path.name} in {folder}.")
    stored = open_safetensors(path).get(f"W_dec_{layer}")
    if stored is None or len(stored.shape) != 3 or stored.refusal is not None:
        raise UserError(f"{path}: W_dec_{layer} should be numbers [features, layers, d].")
    chosen = np.asarray(features)
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < stored.shape[0]):
        raise UserError(f"{path} has {stored.shape[0]} features; {int(chosen.max())} or another one is not there.")
    return stored.read(chosen, None).astype(np.float32)


def _activation(threshold: np.ndarray | None) -> Activation:
    return ReLU() if threshold is None else JumpReLU(jnp.asarray(threshold), "raw", BANDWIDTH)


def _hooks(folder: Path, layer: int) -> tuple[Hooks | None, str, str | None]:
    """(where it was trained, why that is not known, the model's name)."""
    path = folder / CONFIG
    if not path.is_file():
        return None, f"{folder}: no {CONFIG}, which names feature_input_hook and feature_output_hook", None
    fields = read_yaml(path)
    model = fields.get("model_name")
    said = [fields.get("feature_input_hook"), fields.get("feature_output_hook")]
    if not all(isinstance(name, str) for name in said):
        return None, f"{path}: feature_input_hook={shown(said[0])}, feature_output_hook={shown(said[1])}", None
    try:
        hooks = from_hooks(f"blocks.{layer}.{said[0]}", f"blocks.{layer}.{said[1]}")
    except UserError as error:
        return None, f"{path}: {error}", None
    return hooks, "", model if isinstance(model, str) else None


def read_yaml(path: Path) -> dict[str, Json]:
    """The mapping in a YAML file, without any object.

    Raises:
      UserError: it is too large, or holds something else.
    """
    if path.stat().st_size > LARGEST_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than any configuration needs.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not readable YAML ({reason}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold a mapping of names to values.")
    return {str(name): value for name, value in found.items()}


def write_circuit_tracer(decomposition: Dictionary | PerLayer | CrossLayer, folder: Path) -> Path:
    """Write a folder that circuit-tracer opens: one transcoder, one for each layer, or a cross-layer transcoder.

    Raises:
      UserError: an activation is neither ReLU nor JumpReLU, or a site has no name there.
    """
    if isinstance(decomposition, CrossLayer):
        return _write_clt(decomposition, folder)
    parts = decomposition.parts if isinstance(decomposition, PerLayer) else (decomposition,)
    hooks, files = set(), {}
    for part in parts:
        if not isinstance(part, Dictionary):
            raise UserError(f"a {type(part).__name__} has no place in format='circuit_tracer', a Dictionary has.")
        contents = plain(part)
        reads, writes = str(part.sites.reads), str(part.sites.writes)
        if not contents.transcoder:
            raise UserError(f"{part.sites}: circuit-tracer has transcoders only; format='saelens' has autoencoders.")
        hooks.add((_within(reads), _within(writes)))
        if contents.subtracts:
            bias = contents.encoder_bias - contents.encoder @ contents.decoder_bias
            contents = replace(contents, encoder_bias=bias)
        arrays = {"W_enc": contents.encoder, "W_dec": contents.decoder}
        arrays |= {"b_enc": contents.encoder_bias, "b_dec": contents.decoder_bias}
        threshold = _threshold(contents.activation)
        arrays |= {} if threshold is None else {THRESHOLD: threshold}
        arrays |= {} if contents.skip is None else {SKIP: contents.skip.T}
        files[f"layer_{reads.split('/')[1]}.safetensors"] = _float32(arrays)
    return _write(folder, files, hooks, "transcoder_set")


def _write_clt(cross: CrossLayer, folder: Path) -> Path:
    folded = fold_layers(cross)
    pairs = zip(cross.sites.reads, cross.sites.writes, strict=True)
    hooks = {(_within(str(reads)), _within(str(writes))) for reads, writes in pairs}
    layers, files = len(folded.layers), {}
    for number, layer in enumerate(folded.layers):
        features, reach, width = layer.decoder.shape
        if f"blocks/{number}/" not in str(cross.sites.reads[number]):
            raise UserError(f"{cross.sites}: circuit-tracer has a cross-layer transcoder of all layers, from 0 on.")
        decoder = np.zeros((features, layers - number, width), np.float32)
        decoder[:, :reach] = np.asarray(layer.decoder)
        arrays = {"W_enc": np.asarray(layer.encoder), "b_enc": np.asarray(layer.encoder_bias)}
        arrays |= {"b_dec": np.asarray(layer.decoder_bias + layer.output_mean)}
        threshold = _threshold(layer.activation)
        arrays |= {} if threshold is None else {"threshold": threshold}
        named = {f"{name}_{number}": array for name, array in arrays.items()}
        files[f"W_enc_{number}.safetensors"] = _float32(named)
        files[f"W_dec_{number}.safetensors"] = _float32({f"W_dec_{number}": decoder})
    return _write(folder, files, hooks, "cross_layer_transcoder")


def _threshold(activation: Any) -> np.ndarray | None:
    """Of a JumpReLU; None for a ReLU.

    Raises:
      UserError: it is another activation.
    """
    match activation:
        case ReLU():
            return None
        case JumpReLU():
            return np.asarray(activation.threshold)
        case _:
            raise UserError(
                f"activation={type(activation).__name__}: circuit-tracer's files have ReLU and JumpReLU only (write "
                "as_jumprelu(dictionary) of a BatchTopK; format='sparsify' has TopK)."
            )


def _float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def _within(site: str) -> str:
    """The hook of a site within its block."""
    return to_hook(site).split(".", 2)[2]


def _write(folder: Path, files: Mapping[str, dict[str, np.ndarray]], hooks: set[tuple[str, str]], kind: str) -> Path:
    """The files, and the configuration last."""
    if len(hooks) != 1:
        raise UserError(f"circuit-tracer has one kind of input and output for all layers, not {sorted(hooks)}.")
    reads, writes = next(iter(hooks))
    for name, arrays in files.items():
        write_arrays(folder / name, arrays)
    config = {"model_kind": kind, "feature_input_hook": reads, "feature_output_hook": writes}
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
    return folder


def layers_of(contents: list[Contents], sites: list[Sites]) -> PerLayer:
    """One transcoder a layer, side by side."""
    return PerLayer(tuple(build(each, site) for each, site in zip(contents, sites, strict=True)))
