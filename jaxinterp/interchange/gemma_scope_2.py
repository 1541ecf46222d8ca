"""Gemma Scope 2: `params.safetensors`, and `config.json` where it was published.

    a = x w_enc + b_enc,   y = (a 1[a > threshold]) w_dec + b_dec [+ x affine_skip_connection]

w_enc is (d_in, features), w_dec (features, d_out), the skip (d_in, d_out). `config.json`
says where it was trained, as modules of transformers (`model.layers.12.pre_feedforward_layernorm.output`), or else the
names of the folders do, as they are published:
`gemma-scope-2-1b-pt/transcoder/layer_13_width_16k_l0_small/params.safetensors`. A module's output is behind its norm's
gain, so transcoders read `mlp/in` as it is; those of the first Gemma Scope read it before the gain.

A cross-layer transcoder is a folder of `params_layer_<l>.safetensors`, one a layer, whose w_dec is (features, layers,
d_out) and 0 for the layers before l.

Sources: Gemma Scope 2 (model cards); SAELens 6.54 (loading/pretrained_sae_loaders.py); circuit-tracer 0.5.0.
"""

import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.cross_layer import CrossLayer
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange.arrays import AxesByName, read_checked
from jaxinterp.interchange.contents import Contents
from jaxinterp.interchange.fields import check_known, one_of, read_config, shown
from jaxinterp.interchange.layers import Source, cross_layer
from jaxinterp.interchange.names import Hooks
from jaxinterp.interchange.saelens_fields import BANDWIDTH
from jaxinterp.models.files.safetensors_file import open_safetensors

NAME, CONFIG = "params.safetensors", "config.json"
LAYER = re.compile(r"params_layer_(\d{1,4})\.safetensors")
LAYOUT: AxesByName = {
    "w_enc": ("d_in", "features"),
    "w_dec": ("features", "d_out"),
    "b_enc": ("features",),
    "b_dec": ("d_out",),
    "threshold": ("features",),
}
SKIP: AxesByName = {"affine_skip_connection": ("d_in", "d_out")}

MODULES = {
    "output": "resid/post",
    "self_attn.o_proj.input": "attn/z",
    "post_feedforward_layernorm.output": "mlp/added",
    "pre_feedforward_layernorm.output": "mlp/in",
}
"""Ours by what follows `model.layers.N.`."""

MODULE = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,4})\.(.+)")
KINDS = {
    "resid_post": ("resid/post", "resid/post"),
    "attn_out": ("attn/z", "attn/z"),
    "mlp_out": ("mlp/added", "mlp/added"),
    "transcoder": ("mlp/in", "mlp/added"),
}
"""What is read and written, by the first folder in the repository."""

FOLDER = re.compile(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d{1,4})_")
KNOWN = (
    *("architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out", "affine_connection", "width", "l0"),
    *("num_layers", "type", "layer", "site", "d_in", "d_sae", "dtype", "target_l0", "dataset", "site_in", "site_out"),
)


def read_gemma_scope_2(path: Path) -> Contents:
    """What a `params.safetensors`, the `config.json` beside it and the names of the folders above it say.

    Raises:
      UserError: it is damaged, has other arrays or fields, or says two things about its skip path.
    """
    stored = open_safetensors(path)
    skip = "affine_skip_connection" in stored
    arrays = read_checked(stored, LAYOUT | (SKIP if skip else {}), path, sizes={})
    config = path.parent / CONFIG
    fields = read_config(config) if config.is_file() else {}
    if fields:
        check_known(fields, KNOWN, config)
        one_of(fields, "architecture", config, ("jump_relu",))
        if fields.get("affine_connection", skip) is not skip:
            said = shown(fields["affine_connection"])
            raise UserError(f"{config}: affine_connection={said} contradicts the arrays of {path.name}.")
    hooks = _hooks(path, fields)
    return Contents(
        encoder=np.ascontiguousarray(arrays["w_enc"].T),
        encoder_bias=arrays["b_enc"],
        decoder=arrays["w_dec"],
        decoder_bias=arrays["b_dec"],
        activation=JumpReLU(jnp.asarray(arrays["threshold"]), "raw", BANDWIDTH),
        subtracts=False,
        transcoder=None if hooks is None else hooks.reads != hooks.writes,
        skip=arrays.get("affine_skip_connection"),
        hooks=hooks,
        no_site=f"{path}: neither {CONFIG} nor the folders' names (transcoder/layer_13_width_16k_l0_small) say it",
        post_norms=True,
    )


def _hooks(path: Path, fields: dict[str, object]) -> Hooks | None:
    """Where it was trained: by the configuration, else by the folders' names.

    Raises:
      UserError: the configuration names a module that is unknown.
    """
    if "hf_hook_point_in" in fields:
        said = [fields["hf_hook_point_in"], fields.get("hf_hook_point_out") or fields["hf_hook_point_in"]]
        ours = [_site(name, path) for name in said]
        return Hooks(ours[0], ours[1], f"hf_hook_point_in={said[0]!r}", added=any("/added" in name for name in ours))
    found = FOLDER.search("/".join(Path(os.path.abspath(path)).parts[-8:]))
    if found is None:
        return None
    reads, writes = (f"blocks/{int(found[2])}/{port}" for port in KINDS[found[1]])
    return Hooks(reads, writes, f"the folders' names {found[0]!r}", added="/added" in writes)


def _site(name: object, path: Path) -> str:
    found = MODULE.fullmatch(name) if isinstance(name, str) else None
    if found is None or found[2] not in MODULES:
        raise UserError(
            f"{path.parent / CONFIG}: hook point {shown(name)} has no counterpart here; known: model.layers.N."
            f"{{{', '.join(MODULES)}}}."
        )
    return f"blocks/{int(found[1])}/{MODULES[found[2]]}"


def read_gemma_scope_2_clt(folder: Path) -> CrossLayer:
    """A cross-layer transcoder: every `params_layer_<l>.safetensors` of a folder.

    Raises:
      UserError: a layer is missing, arrays disagree, a feature writes before the layer that it reads, or there is a
        skip path, which no cross-layer transcoder here has.
    """
    files = {int(found[1]): path for path in folder.iterdir() if (found := LAYER.fullmatch(path.name))}
    sources = []
    for layer in range(len(files)):
        if layer not in files:
            raise UserError(f"{folder} has {len(files)} files params_layer_<l>.safetensors, but none of layer {layer}.")
        stored = open_safetensors(files[layer])
        if "affine_skip_connection" in stored:
            raise UserError(f"{files[layer]}: a skip path, which no cross-layer transcoder here has.")
        layout = LAYOUT | {"w_dec": ("features", "layers", "d_out")}
        arrays = read_checked(stored, layout, files[layer], sizes={"layers": len(files)})
        if np.any(arrays["w_dec"][:, :layer]):
            raise UserError(f"{files[layer]}: features of layer {layer} write to layers before it.")
        sources.append(
            Source(
                np.ascontiguousarray(arrays["w_enc"].T),
                arrays["b_enc"],
                np.ascontiguousarray(arrays["w_dec"][:, layer:]),
                arrays["b_dec"],
                JumpReLU(jnp.asarray(arrays["threshold"]), "raw", BANDWIDTH),
            )
        )
    reads, writes = (tuple(f"blocks/{n}/{port}" for n in range(len(files))) for port in ("mlp/in", "mlp/added"))
    return cross_layer(sources, Sites(reads, writes))


def read_layer_alone(path: Path) -> Contents:
    """Refuses a single `params_layer_<n>.safetensors`.

    Raises:
      UserError: always: a layer writes to all layers above it.
    """
    raise UserError(f"{path} is one layer of a cross-layer transcoder: read its folder, {path.parent}.")
