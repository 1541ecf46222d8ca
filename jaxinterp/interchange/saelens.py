"""SAELens folders: `cfg.json` beside `sae_weights.safetensors`, read and written.

    a = (x - b_dec [where apply_b_dec_to_input]) W_enc + b_enc,   y = f(a) W_dec + b_dec [+ x W_skip^T]

f, its arrays and fields: `saelens_fields.py`. Scales that were not taken into the weights (normalize_activations) are
not in `cfg.json`: the factor of `expected_average_only_in` is in `activation_scaler.json` beside it, as training writes
it, or comes from the caller. What is divided by each token's own norm is a `PerToken`; what is whitened is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.decompositions.per_token import Kind
from jaxinterp.interchange.arrays import check_names, read_checked
from jaxinterp.interchange.beside import read_beside, write_beside
from jaxinterp.interchange.contents import Contents, gate_biases, plain
from jaxinterp.interchange.fields import check_known, flag, one_of, read_config, shown, size
from jaxinterp.interchange.names import Hooks, from_hooks, has_post_norms, to_hook
from jaxinterp.interchange.saelens_fields import (
    ARCHITECTURES,
    KNOWN,
    REFUSED,
    TRAINING,
    WRITTEN,
    arrays_hint,
    current,
    fields_hint,
)
from jaxinterp.models.files.safetensors_file import open_safetensors
from jaxinterp.storage.files import write_arrays, write_text

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.0.0"
"""The version whose layout is written."""

PER_TOKEN: dict[Any, Kind] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
"""Scales of each token's own, and what they are called in `per_token.py`."""

WHITENED = "; what is whitened has a matrix that the file does not hold"
CENTRING = "center_writing_weights"
CHANGED = ("fold_ln", "fold_value_biases")
"""Options of TransformerLens under which its activations are not those of the model as it was published."""


def read_saelens(folder: Path, overrides: Mapping[str, Json] | None = None) -> Contents:
    """What a SAELens folder says.

    Args:
      overrides: fields of its configuration that are otherwise, or missing.
    Raises:
      UserError: it is damaged, of another architecture, normalises by something else than one scale for all tokens, or
        has fields or arrays that are unknown.
    """
    where = folder / CONFIG
    fields = current(read_config(where) | dict(overrides or {}), where)
    name = fields.get("architecture")
    if isinstance(name, str) and name in REFUSED:
        raise UserError(f"{where}: config field architecture={name!r} is not supported: {REFUSED[name]}.")
    name = one_of(fields, "architecture", where, ARCHITECTURES)
    architecture = ARCHITECTURES[name]
    stored = open_safetensors(folder / WEIGHTS)
    layout = dict(architecture.tensors) | ({"scaling_factor": ("features",)} if "scaling_factor" in stored else {})
    check_names(stored, layout, folder / WEIGHTS, arrays_hint(name, stored))
    check_known(fields, (*KNOWN, *TRAINING, *architecture.fields), where, hint=fields_hint(name, fields))
    sizes = {"d_in": size(fields, "d_in", where)}
    sizes["d_out"] = size(fields, "d_out", where) if architecture.transcoder else sizes["d_in"]
    sizes |= {"features": size(fields, "d_sae", where)} if fields.get("d_sae") is not None else {}
    if name == "topk":
        size(fields, "k", where)
    one_threshold = "topk_threshold" in architecture.tensors
    subtracts = flag(fields, "apply_b_dec_to_input", where, default=not architecture.transcoder)
    if subtracts and architecture.transcoder:
        raise UserError(f"{where}: config field apply_b_dec_to_input=true has no meaning for a transcoder.")
    allowed = ("none", "expected_average_only_in", None, *PER_TOKEN)
    scaling = one_of(fields, "normalize_activations", where, allowed, why=WHITENED)
    if scaling in PER_TOKEN and architecture.transcoder:
        raise UserError(
            f"{where}: config field normalize_activations={scaling!r} of a transcoder: what it writes has another "
            "scale than what it reads, which no reader of such files says."
        )
    if scaling == "expected_average_only_in" and architecture.transcoder:
        raise UserError(
            f"{where}: config field normalize_activations={scaling!r} of a transcoder: what it reads and what it "
            "writes have a scale each, which the file has not: the scales must be folded into its weights first."
        )
    arrays = read_checked(stored, layout, folder / WEIGHTS, sizes=sizes)
    rescaled = flag(fields, "rescale_acts_by_decoder_norm", where, default=one_threshold)
    if one_threshold:
        arrays["threshold"] = _thresholds(arrays, folder / WEIGHTS, rescaled)
    theirs, no_site = _hooks(fields, where, architecture.transcoder)
    hooks, target = read_beside(folder, theirs, arrays["b_dec"].shape[0])
    contents = Contents(
        encoder=np.ascontiguousarray(arrays["W_enc"].T),
        encoder_bias=arrays.get("b_enc", np.zeros(arrays["W_enc"].shape[1], np.float32)),
        decoder=arrays["W_dec"],
        decoder_bias=arrays["b_dec"],
        activation=architecture.activation(arrays, fields),
        subtracts=subtracts,
        transcoder=architecture.transcoder,
        skip=np.ascontiguousarray(arrays["W_skip"].T) if "W_skip" in arrays else None,
        hooks=hooks,
        no_site=no_site,
        post_norms=has_post_norms(fields.get("metadata", {}).get("model_name")),
        before_gain=hooks is not None and hooks.before_gain,
        factor=_factor(folder, scaling),
        target=target,
        centred=_centred(fields),
        model_name=_model_name(fields),
        per_token=PER_TOKEN.get(scaling),
        head=_head(fields, architecture.transcoder, where),
    )
    if rescaled:
        contents = _rescaled(contents)
    # Last: y = ((z / |W_dec|) scale) W_dec has the lengths of W_dec as it is stored.
    return replace(contents, decoder=contents.decoder * _finetuned(arrays, fields, where))


def write_saelens(dictionary: Dictionary, folder: Path) -> Path:
    """Write a SAELens folder, which is made if it is not there.

    Raises:
      UserError: SAELens has no architecture for this dictionary, or no name for its sites.
    """
    contents = plain(dictionary)
    activation: Any = contents.activation
    name = WRITTEN.get((type(activation), bool(contents.transcoder), contents.skip is not None))
    if name is None:
        what = "transcoders" if contents.transcoder else "autoencoders"
        raise UserError(
            f"activation={type(activation).__name__}{'' if contents.skip is None else ' with a skip path'}: SAELens "
            f"has no such {what}; it has {', '.join(ARCHITECTURES)} (format='sparsify' has TopK transcoders)."
        )
    reads, writes = str(dictionary.sites.reads), str(dictionary.sites.writes)
    metadata: dict[str, Json] = {"sae_lens_version": VERSION, "hook_name": to_hook(reads)}
    metadata |= {"hook_name_out": to_hook(writes)} if contents.transcoder else {}
    config: dict[str, Json] = {
        "architecture": name,
        "d_in": contents.encoder.shape[1],
        "d_sae": contents.encoder.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": contents.subtracts,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if reads.endswith("/attn/z") else "none",
        "metadata": metadata,
    }
    config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False} if isinstance(activation, TopK) else {}
    config |= {"d_out": contents.decoder.shape[1]} if contents.transcoder else {}
    write_arrays(folder / WEIGHTS, _arrays(contents))
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_beside(folder, contents, dictionary.sites)
    return folder


def _arrays(contents: Contents) -> dict[str, np.ndarray]:
    """The arrays by SAELens's names."""
    arrays = {"W_enc": contents.encoder.T, "W_dec": contents.decoder, "b_dec": contents.decoder_bias}
    match contents.activation:
        case Gated(log_scale=log_scale):
            gate, magnitude = gate_biases(contents)
            arrays |= {"b_gate": gate, "r_mag": np.asarray(log_scale), "b_mag": magnitude}
        case JumpReLU(parametrisation=parametrisation) as jump:
            threshold = jump.threshold_parameter if parametrisation == "raw" else jump.threshold
            arrays |= {"b_enc": contents.encoder_bias, "threshold": np.asarray(threshold)}
        case _:
            arrays |= {"b_enc": contents.encoder_bias}
    if contents.skip is not None:
        arrays["W_skip"] = contents.skip.T
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def _thresholds(arrays: Mapping[str, np.ndarray], where: Path, rescaled: bool) -> np.ndarray:
    """The one threshold of a training file, for every feature: of a, or of a |W_dec rows| where it is rescaled.

    `_rescaled` takes the lengths into the encoder, so that the threshold is the same number in both cases.

    Raises:
      UserError: it was never measured.
    """
    threshold = float(arrays["topk_threshold"].reshape(()))
    if not threshold > 0:
        raise UserError(
            f"{where}: topk_threshold={threshold:g} was never measured (training had just begun): without it, the "
            "codes of a token depend on the others of its batch."
        )
    return np.full(arrays["W_enc"].shape[1], threshold, np.float32)


def _factor(folder: Path, scaling: str | None) -> float | None:
    """What activations were multiplied by: of `activation_scaler.json`, where there is one; None: nobody says.

    Raises:
      UserError: the file is malformed, or the configuration says that nothing was multiplied.
    """
    path = folder / SCALER
    expected = scaling == "expected_average_only_in"
    if not path.is_file():
        return None if expected else 1.0
    factor = read_config(path).get("scaling_factor")
    if factor is None:
        return None if expected else 1.0
    if type(factor) not in (int, float) or not 0 < factor < np.inf:
        raise UserError(f"{path}: scaling_factor={shown(factor)} should be a positive number.")
    if not expected and factor != 1:
        raise UserError(
            f"{path}: scaling_factor={factor}, but {CONFIG} says normalize_activations={shown(scaling)}: mend one."
        )
    return float(factor)


def _centred(fields: Mapping[str, Json]) -> bool | None:
    """Whether streams were centred; None: the file says neither that nor which version wrote it."""
    metadata = fields.get("metadata") or {}
    options = metadata.get("model_from_pretrained_kwargs")
    if isinstance(options, dict) and CENTRING in options:
        return bool(options[CENTRING])
    versions = ("sae_lens_version", "sae_lens_training_version")
    return False if any(said.get(name) for said in (fields, metadata) for name in versions) else None


def _model_name(fields: Mapping[str, Json]) -> str | None:
    name = (fields.get("metadata") or {}).get("model_name")
    return name if isinstance(name, str) else None


def _finetuned(arrays: Mapping[str, np.ndarray], fields: Mapping[str, Json], where: Path) -> np.ndarray | np.float32:
    """The finetuned scale of every write vector, 1 where the file has none."""
    factors, named = arrays.get("scaling_factor"), bool(fields.get("finetuning_scaling_factor"))
    if factors is None and named:
        raise UserError(
            f"{where}: finetuning_scaling_factor is set, but the scale is missing: no tensor 'scaling_factor'."
        )
    if factors is None or np.all(factors == 1):
        return np.float32(1)
    if not named:
        raise UserError(
            f"{where}: tensor 'scaling_factor' is not 1, but finetuning_scaling_factor is not set; mend one."
        )
    return factors[:, None]


def _rescaled(contents: Contents) -> Contents:
    """Unit write vectors, their lengths taken into the encoder: what rescale_acts_by_decoder_norm computes."""
    norms = np.linalg.norm(contents.decoder, axis=1)
    if not np.all(norms):
        raise UserError("rescale_acts_by_decoder_norm with a write vector of length 0 divides by 0.")
    return replace(
        contents,
        encoder=contents.encoder * norms[:, None],
        encoder_bias=contents.encoder_bias * norms,
        decoder=contents.decoder / norms[:, None],
    )


def _head(fields: Mapping[str, Json], transcoder: bool, where: Path) -> int | None:
    """The head that it was trained on, of those beside each other in `attn/z`; None: all.

    Raises:
      UserError: it is of a transcoder, or of another array.
    """
    metadata = fields.get("metadata") or {}
    head = metadata.get("hook_head_index")
    one_of(metadata, "hook_head_index_out", where, (None,), why=": transcoders of single heads have no name here")
    if head is None:
        return None
    if transcoder or not str(metadata.get("hook_name")).endswith("attn.hook_z"):
        raise UserError(
            f"{where}: config field hook_head_index={shown(head)} is not supported with hook_name="
            f"{shown(metadata.get('hook_name'))}: one head has a name here in blocks.N.attn.hook_z only."
        )
    if type(head) is not int or head < 0:
        raise UserError(f"{where}: config field hook_head_index={shown(head)} should be the number of a head.")
    return head


def _hooks(fields: Mapping[str, Json], where: Path, transcoder: bool) -> tuple[Hooks | None, str]:
    """Where it was trained; None, and why not, where that cannot be told."""
    metadata = fields.get("metadata") or {}
    shape = one_of(fields, "reshape_activations", where, ("none", "hook_z", None))
    reads = metadata.get("hook_name")
    writes = metadata.get("hook_name_out") if transcoder else reads
    if not isinstance(reads, str) or not isinstance(writes, str):
        name = "hook_name_out" if isinstance(reads, str) else "hook_name"
        return None, f"{where}: config field metadata.{name} is missing"
    options = metadata.get("model_from_pretrained_kwargs") or {}
    for name in CHANGED if isinstance(options, dict) else ():
        if options.get(name):
            return None, (
                f"{where}: model_from_pretrained_kwargs.{name}={shown(options[name])}: it was trained on a model whose "
                "activations TransformerLens had changed, which ours are not"
            )
    try:
        theirs = from_hooks(reads, writes)
    except UserError as error:
        return None, f"{where}: {error}"
    if shape == "hook_z" and not theirs.reads.endswith("/attn/z"):
        raise UserError(f"{where}: config field reshape_activations='hook_z' contradicts {theirs.said}.")
    return theirs, ""
