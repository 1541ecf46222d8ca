"""SAELens's architectures as a table: their arrays, their fields, their activations; and the layouts before version 6.

    standard, transcoder             f = ReLU
    topk                             f = ReLU of the k largest; with rescale_acts_by_decoder_norm of a |W_dec rows|
    jumprelu, jumprelu_transcoder    f = a 1[a > threshold] of ReLU(a)
    batchtopk, matryoshka_batchtopk  f = a 1[a > threshold] of ReLU(a), one threshold for all: what training writes
    gated                            f = 1[x W_enc + b_gate > 0] ReLU(x W_enc exp(r_mag) + b_mag)
    skip_transcoder, jumprelu_skip_transcoder: with W_skip

W_enc is (d_in, features), W_dec (features, d_out), W_skip (d_out, d_in). BatchTopK and Matryoshka dictionaries are
`jumprelu` in files meant for use; in those of training the threshold is `topk_threshold`, of a |W_dec rows| with
rescale_acts_by_decoder_norm.

Source: SAELens 6.54 (sae_lens/saes/*.py, loading/pretrained_sae_loaders.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.activations import Activation, ReLU, TopK
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.interchange.arrays import AxesByName
from jaxinterp.interchange.fields import one_of, shown

BANDWIDTH = 0.001
"""Of JumpReLU, for further training: the published one, where the file has none."""

Arrays = Mapping[str, np.ndarray]
Fields = Mapping[str, Any]

LINEAR: AxesByName = {"W_enc": ("d_in", "features"), "W_dec": ("features", "d_out"), "b_dec": ("d_out",)}
BIAS: AxesByName = {"b_enc": ("features",)}
THRESHOLD: AxesByName = {"threshold": ("features",)}
ONE_THRESHOLD: AxesByName = {"topk_threshold": ()}
GATES: AxesByName = {"b_gate": ("features",), "r_mag": ("features",), "b_mag": ("features",)}
SKIP: AxesByName = {"W_skip": ("d_out", "d_in")}


def _relu(arrays: Arrays, fields: Fields) -> Activation:
    return ReLU()


def _topk(arrays: Arrays, fields: Fields) -> Activation:
    return TopK(fields["k"])


def _jumprelu(arrays: Arrays, fields: Fields) -> Activation:
    details = (fields.get("metadata") or {}).get("training_architecture_details")
    bandwidth = details.get("jumprelu_bandwidth") if isinstance(details, dict) else None
    if not (isinstance(bandwidth, float) and bandwidth > 0):
        bandwidth = BANDWIDTH
    return JumpReLU(jnp.asarray(arrays["threshold"]), "raw", bandwidth)


def _gated(arrays: Arrays, fields: Fields) -> Activation:
    return Gated(*(jnp.asarray(arrays[name]) for name in ("b_gate", "r_mag", "b_mag")))


@dataclass(frozen=True)
class Architecture:
    """The arrays of an architecture, how they and the fields make an activation, and the fields that are its own."""

    tensors: AxesByName
    activation: Callable[[Arrays, Fields], Activation]
    fields: tuple[str, ...] = ()

    @property
    def transcoder(self) -> bool:
        """Whether it writes another array than it reads."""
        return "d_out" in self.fields


TOPK_FIELDS = ("k", "rescale_acts_by_decoder_norm")
MATRYOSHKA = ("matryoshka_widths", "use_matryoshka_aux_loss", "detach_matryoshka_losses")
ARCHITECTURES = {
    "standard": Architecture(LINEAR | BIAS, _relu),
    "topk": Architecture(LINEAR | BIAS, _topk, TOPK_FIELDS),
    "jumprelu": Architecture(LINEAR | BIAS | THRESHOLD, _jumprelu),
    "batchtopk": Architecture(LINEAR | BIAS | ONE_THRESHOLD, _jumprelu, TOPK_FIELDS),
    "matryoshka_batchtopk": Architecture(LINEAR | BIAS | ONE_THRESHOLD, _jumprelu, (*TOPK_FIELDS, *MATRYOSHKA)),
    "gated": Architecture(LINEAR | GATES, _gated),
    "transcoder": Architecture(LINEAR | BIAS, _relu, ("d_out",)),
    "skip_transcoder": Architecture(LINEAR | BIAS | SKIP, _relu, ("d_out",)),
    "jumprelu_transcoder": Architecture(LINEAR | BIAS | THRESHOLD, _jumprelu, ("d_out",)),
    "jumprelu_skip_transcoder": Architecture(LINEAR | BIAS | THRESHOLD | SKIP, _jumprelu, ("d_out",)),
}

REFUSED = {
    "temporal": "its codes depend on the tokens before (an attention over them predicts a part of each activation)",
    "matching_pursuit": "its codes come one after the other, each from what the ones before left; no linear map gives "
    "them",
}
"""Architectures that are not a dictionary here, and why."""

WRITTEN: dict[tuple[type, bool, bool], str] = {
    (ReLU, False, False): "standard",
    (TopK, False, False): "topk",
    (JumpReLU, False, False): "jumprelu",
    (Gated, False, False): "gated",
    (ReLU, True, False): "transcoder",
    (ReLU, True, True): "skip_transcoder",
    (JumpReLU, True, False): "jumprelu_transcoder",
    (JumpReLU, True, True): "jumprelu_skip_transcoder",
}
"""(activation, whether a transcoder, whether it has a skip path) -> architecture."""

KNOWN = (
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "metadata", "finetuning_scaling_factor", "sae_lens_version"),
)
TRAINING = (
    *("decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "pre_act_loss_coefficient"),
    *("jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0", "use_sparse_activations", "aux_loss_coefficient"),
    "topk_threshold_lr",
)
"""Fields that no forward pass reads: how it was trained."""

RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
NOT_OURS = ("activation", "transcode", "num_latents", "skip_connection", "k")
"""Fields that no configuration of SAELens before 6 has; sparsify's has."""

METADATA = (
    *("hook_name", "hook_name_out", "hook_head_index", "model_name", "model_from_pretrained_kwargs"),
    *("sae_lens_version", "sae_lens_training_version"),
)
NORMALISED = {True: "expected_average_only_in", False: "none", None: "none"}


def current(config: Mapping[str, Json], where: Path) -> dict[str, Json]:
    """The fields as version 6 has them.

    Older files hold the configuration of the whole run; what it says beside the known fields is ignored, as SAELens
    does. Arrays are never ignored.

    Raises:
      UserError: it has no version, and nothing else that tells a configuration of SAELens; the activation is neither
        relu nor topk, or topk without k.
    """
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: config field metadata should be an object.")
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version")
    if version and _major(version, where) >= 6:
        return dict(config)
    if not version:
        _check_old(config, where)
    old = {"activation_fn": "relu"} | {RENAMED.get(name, name): value for name, value in config.items()}
    fields = {"architecture": "standard"} | {name: old[name] for name in (*KNOWN, "d_out") if name in old}
    if one_of(old, "activation_fn", where, ("relu", "topk")) == "topk":
        arguments = old.get("activation_fn_kwargs")
        one_of(fields, "architecture", where, ("standard", "topk"), why=" with activation_fn='topk'")
        if not isinstance(arguments, dict) or arguments.get("signed") or set(arguments) - {"k", "signed"}:
            raise UserError(f"{where}: config field activation_fn_kwargs={arguments!r} is not supported: expected k.")
        fields |= {"architecture": "topk", "k": arguments.get("k")}
    scaling = fields.get("normalize_activations")
    if scaling is None or isinstance(scaling, bool):
        fields["normalize_activations"] = NORMALISED[scaling]
    return fields | {"metadata": {name: old[name] for name in METADATA if name in old} | metadata}


def _major(version: Any, where: Path) -> int:
    try:
        return int(version.split(".")[0])
    except (AttributeError, ValueError) as error:
        raise UserError(f"{where}: config field sae_lens_version={shown(version)} should be like '6.0.0'.") from error


def _check_old(config: Mapping[str, Json], where: Path) -> None:
    """Raises UserError if nothing says that it is SAELens's: what it leaves out would have SAELens's defaults."""
    foreign = [name for name in NOT_OURS if name in config]
    if foreign:
        raise UserError(
            f"{where}: config field {foreign[0]}={shown(config[foreign[0]])} is none of SAELens before version 6, and "
            "no sae_lens_version says that it is newer: it is of another library, or edited."
        )
    if "d_sae" not in config or not {"hook_point", "hook_name"} & set(config):
        raise UserError(
            f"{where}: it has neither sae_lens_version nor the fields that every older file of SAELens has (d_sae and "
            "hook_name or hook_point): it is of another library, whose activation cannot be told."
        )


def arrays_hint(name: str, arrays: Mapping[str, PyTree]) -> str:
    """Which architectures have these arrays, where the named one has not."""
    like = [other for other, kind in ARCHITECTURES.items() if set(kind.tensors) == set(arrays) - {"scaling_factor"}]
    if not like or name in like:
        return ""
    return f" These are the arrays of {' or '.join(map(repr, like))}: architecture={name!r} looks wrong."


def fields_hint(name: str, fields: Fields) -> str:
    """Which architectures have a field that the named one has not."""
    for field in fields:
        kinds = (
            (other, kind) for other, kind in ARCHITECTURES.items() if kind.tensors.keys().isdisjoint(ONE_THRESHOLD)
        )
        like = [other for other, kind in kinds if field in kind.fields]
        if like and name not in like:
            return f" It belongs to {' or '.join(map(repr, like))}: architecture={name!r} looks wrong."
    return ""
