"""Llama Scope (Llamascopium, earlier Language-Model-SAEs): activations in units of their average norm over a data set.

    s = sqrt(d) / average norm, of inputs (s_in) and of outputs (s_out)
    a = (s_in x - c) E^T + b_E,   y = (z D + b_D) / s_out,   c = b_D where `apply_decoder_bias_to_pre_encoder`, else 0

A folder has `hyperparams.json` and `checkpoints/final.safetensors`, or, of later versions, `config.json` and
`sae_weights.safetensors` with `dataset_average_activation_norm.<hook>`, or without: pass `scaling_factor=`.

Which features are active is decided where write vectors have length 1 (`sparsity_include_decoder_norm`): of
a |D_i|. In hyperparams.json the threshold is one number, measured when all scales were taken into the weights, so of
a |D_i| / s_out (or a / s_in); `log_jumprelu_threshold` is one a feature, of a |D_i|. Codes here are in those units.

Sources: He et al. 2024, arXiv 2410.20526; OpenMOSS/Language-Model-SAEs of October 2024 (sae.py: from_config,
standardize_parameters_of_dataset_activation_scaling, transform_to_unit_decoder_norm; post_processing.py).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.activations import Activation, ReLU, TopK
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange.arrays import AxesByName, read_checked
from jaxinterp.interchange.contents import Contents
from jaxinterp.interchange.fields import flag, one_of, read_config, shown, size
from jaxinterp.interchange.names import Hooks, from_hooks
from jaxinterp.interchange.saelens_fields import BANDWIDTH
from jaxinterp.models.files.safetensors_file import open_safetensors

HYPERPARAMETERS, CHECKPOINT = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
NORMS = "dataset_average_activation_norm"
LAYOUT: AxesByName = {
    "encoder.weight": ("features", "d_in"),
    "encoder.bias": ("features",),
    "decoder.weight": ("d_out", "features"),
    "decoder.bias": ("d_out",),
}
THRESHOLDS: AxesByName = {"log_jumprelu_threshold": ("features",)}


def is_llama_scope(folder: Path) -> bool:
    """Whether a folder has the files of one of the two layouts."""
    later = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file() and not (folder / "cfg.json").is_file()
    return later or ((folder / HYPERPARAMETERS).is_file() and (folder / CHECKPOINT).is_file())


def read_llama_scope(folder: Path) -> Contents:
    """What a folder says.

    Raises:
      UserError: it is damaged, or has an activation, a normalisation or arrays that are not supported.
    """
    first = (folder / HYPERPARAMETERS).is_file()
    where, path = (folder / HYPERPARAMETERS, folder / CHECKPOINT) if first else (folder / CONFIG, folder / WEIGHTS)
    fields = read_config(where)
    one_of({"use_glu_encoder": False} | fields, "use_glu_encoder", where, (False,), why=": a gate beside the encoder")
    one_of({"use_decoder_bias": True} | fields, "use_decoder_bias", where, (True,))
    stored = open_safetensors(path)
    held = {name: tensor for name, tensor in stored.items() if name.startswith(f"{NORMS}.")}
    stored = {name: tensor for name, tensor in stored.items() if name not in held}
    jumps = "log_jumprelu_threshold" in stored
    width = size(fields, "d_model", where)
    arrays = read_checked(stored, LAYOUT | (THRESHOLDS if jumps else {}), path, sizes={"d_in": width, "d_out": width})
    reads, writes = fields.get("hook_point_in"), fields.get("hook_point_out") or fields.get("hook_point_in")
    norms = {name.removeprefix(f"{NORMS}."): float(tensor.read(slice(None), None)) for name, tensor in held.items()}
    given = fields.get(NORMS) or {"in": norms.get(str(reads)), "out": norms.get(str(writes))}
    if not isinstance(given, dict):
        raise UserError(f"{where}: config field {NORMS}={shown(given)} should be an object.")
    scales = _scales(fields, given, width, where)
    hooks, no_site = _hooks(reads, writes, where)
    contents = Contents(
        encoder=arrays["encoder.weight"],
        encoder_bias=arrays["encoder.bias"],
        decoder=np.ascontiguousarray(arrays["decoder.weight"].T),
        decoder_bias=arrays["decoder.bias"],
        activation=ReLU(),
        subtracts=False,
        transcoder=reads != writes,
        hooks=hooks,
        no_site=no_site,
        factor=1.0 if scales is not None else None,
    )
    default = flag(fields, "apply_decoder_bias_to_pre_encoder", where, default=first)
    by_length = flag(fields, "sparsity_include_decoder_norm", where, default=True)
    return _in_their_units(contents, scales, default, by_length, fields, arrays, where)


def _in_their_units(
    contents: Contents,
    scales: tuple[float, float] | None,
    subtracts: bool,
    by_length: bool,
    fields: Mapping[str, Json],
    arrays: Mapping[str, np.ndarray],
    where: Path,
) -> Contents:
    """Scales taken into the weights, as their library does before use; without scales, they are the caller's."""
    into, out = scales or (1.0, 1.0)
    bias = contents.encoder_bias
    if subtracts:
        bias = bias - contents.encoder @ contents.decoder_bias
    later = "log_jumprelu_threshold" in arrays
    units = np.float32(1.0 if later else into)  # of a: the first layout measures its threshold in the data's units
    encoder, bias = contents.encoder * np.float32(into) / units, bias / units
    decoder, decoder_bias = contents.decoder * units / np.float32(out), contents.decoder_bias / np.float32(out)
    lengths = np.ones(len(bias), np.float32)
    if by_length:
        lengths = np.linalg.norm(contents.decoder if later else decoder, axis=1)
        if not np.all(lengths):
            raise UserError(f"{where}: sparsity_include_decoder_norm with a write vector of length 0 divides by 0.")
    activation = _activation(fields, arrays, len(bias), where)
    return Contents(
        **{
            **vars(contents),
            "encoder": encoder * lengths[:, None],
            "encoder_bias": bias * lengths,
            "decoder": decoder / lengths[:, None],
            "decoder_bias": decoder_bias,
            "activation": activation,
        }
    )


def _activation(fields: Mapping[str, Json], arrays: Mapping[str, np.ndarray], features: int, where: Path) -> Activation:
    """JumpReLU with the file's threshold; TopK that was given one is JumpReLU, too."""
    name = one_of(fields, "act_fn", where, ("relu", "topk", "jumprelu"))
    if "log_jumprelu_threshold" in arrays:
        return JumpReLU(jnp.asarray(arrays["log_jumprelu_threshold"]), "log", BANDWIDTH)
    if name == "jumprelu" and fields.get("jump_relu_threshold") is None:
        raise UserError(
            f"{where}: act_fn='jumprelu', but neither log_jumprelu_threshold nor jump_relu_threshold is there."
        )
    threshold = fields.get("jump_relu_threshold") or 0.0
    if type(threshold) not in (int, float) or not 0 <= threshold < np.inf:
        raise UserError(f"{where}: config field jump_relu_threshold={shown(threshold)} should be a number.")
    if name == "relu":
        return ReLU()
    if name == "topk" and not threshold:
        return TopK(size(fields, "top_k", where))
    return JumpReLU(jnp.full(features, threshold, jnp.float32), "raw", BANDWIDTH)


def _scales(
    fields: Mapping[str, Json], norms: Mapping[str, Json], width: int, where: Path
) -> tuple[float, float] | None:
    """(s_in, s_out); None where the file says that there were some and not which."""
    kind = one_of(fields, "norm_activation", where, ("dataset-wise", "inference"), why="; of each token or batch")
    if kind == "inference":
        return 1.0, 1.0
    found = [norms.get("in"), norms.get("out")]
    if all(norm is None for norm in found):
        return None
    for name, norm in zip(("in", "out"), found, strict=True):
        if not isinstance(norm, int | float) or isinstance(norm, bool) or not 0 < norm < np.inf:
            raise UserError(f"{where}: {NORMS}.{name}={shown(norm)} should be a positive number.")
    return math.sqrt(width) / float(found[0] or 1), math.sqrt(width) / float(found[1] or 1)


def _hooks(reads: Any, writes: Any, where: Path) -> tuple[Hooks | None, str]:
    if not isinstance(reads, str) or not isinstance(writes, str):
        return None, f"{where}: config field hook_point_in is missing"
    try:
        return from_hooks(reads, writes), ""
    except UserError as error:
        return None, f"{where}: {error}"
