"""Dictionaries in one `.pt` file whose settings stand elsewhere: in the file's name, or beside it.

    qwen_scope   layer<n>.sae.pt: W_enc (features, d), W_dec (d, features), b_enc, b_dec; k in the repository's name,
                 SAE-Res-Qwen3-1.7B-Base-W32K-L0_50: y = TopK_50(x W_enc^T + b_enc) W_dec^T + b_dec
    hook_z       <name>.pt beside <name>_cfg.json (Kissane et al. 2024, arXiv 2406.17759): W_enc (d, features), W_dec
                 (features, d), ReLU, b_dec subtracted from the input
    goodfire     encoder_linear.{weight,bias}, decoder_linear.{weight,bias}: ReLU, nothing subtracted
    openai       encoder.weight, decoder.weight, pre_bias, latent_bias; the name of the activation. ReLU, or TopK of an
                 input from which each token's own mean and standard deviation were taken (Gao et al. 2024, 2406.04093)

Pickles are read by `torch_file.py`, without unpickling. Sources: SAELens 6.54 (pretrained_sae_loaders.py); the cards of
the repositories; openai/sparse_autoencoder (model.py).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import Activation, ReLU, TopK
from jaxinterp.interchange.arrays import AxesByName, read_checked
from jaxinterp.interchange.contents import Contents
from jaxinterp.interchange.fields import one_of, read_config, shown
from jaxinterp.interchange.names import Hooks, from_hooks
from jaxinterp.interchange.torch_file import open_torch, open_torch_with_settings

ACROSS: AxesByName = {"W_enc": ("features", "d"), "W_dec": ("d", "features"), "b_enc": ("features",), "b_dec": ("d",)}
ALONG: AxesByName = {"W_enc": ("d", "features"), "W_dec": ("features", "d"), "b_enc": ("features",), "b_dec": ("d",)}
LINEAR: AxesByName = {
    "encoder_linear.weight": ("features", "d"),
    "encoder_linear.bias": ("features",),
    "decoder_linear.weight": ("d", "features"),
    "decoder_linear.bias": ("d",),
}
OPENAI: AxesByName = {
    "encoder.weight": ("features", "d"),
    "decoder.weight": ("d", "features"),
    "pre_bias": ("d",),
    "latent_bias": ("features",),
}
QWEN_FILE = re.compile(r"layer(\d{1,4})\.sae\.pt")
QWEN_FOLDER = re.compile(r"SAE-Res-[\w.-]+?-W\d+K-L0_(\d{1,5})(?![\w.-])")
IGNORED = ("stats_last_nonzero",)
"""Of OpenAI's: how long ago a feature was active in training."""


def settings_beside(path: Path) -> Path:
    """Where the configuration of a `hook_z` file is."""
    return path.with_name(f"{path.name.removesuffix('.pt')}_cfg.json")


def format_of(path: Path) -> str:
    """Which format a `.pt` or `.pth` file has, by its arrays and its name.

    Raises:
      UserError: it is damaged, or asks for more than arrays.
    """
    names = set(open_torch_with_settings(path)[0])
    if {"pre_bias", "latent_bias"} <= names:
        return "openai"
    if names == set(LINEAR):
        return "goodfire"
    if names == set(ACROSS):
        return "hook_z" if settings_beside(path).is_file() else "qwen_scope"
    return "dictionary_learning"


def _contents(encoder: np.ndarray, bias: np.ndarray, decoder: np.ndarray, output: np.ndarray, **more: Any) -> Contents:
    return Contents(
        encoder=np.ascontiguousarray(encoder),
        encoder_bias=bias,
        decoder=np.ascontiguousarray(decoder),
        decoder_bias=output,
        transcoder=False,
        **more,
    )


def read_qwen_scope(path: Path) -> Contents:
    """What a `layer<n>.sae.pt` and the name of its repository say.

    Raises:
      UserError: the file is damaged, or no folder above it says k.
    """
    spelled = Path(os.path.abspath(path)).as_posix()
    file, folder = QWEN_FILE.search(path.name), QWEN_FOLDER.search(spelled)
    if folder is None:
        raise UserError(
            f"{path}: how many features are active is in the repository's name only (SAE-Res-Qwen3-1.7B-Base-W32K-"
            "L0_50), and no folder above the file has such a name: put it back, or read it by 'org/name'."
        )
    arrays = read_checked(open_torch(path), ACROSS, path, sizes={})
    hooks = None
    if file is not None:
        site = f"blocks/{int(file[1])}/resid/post"
        hooks = Hooks(site, site, f"the file's name {path.name!r}")
    return _contents(
        arrays["W_enc"],
        arrays["b_enc"],
        arrays["W_dec"].T,
        arrays["b_dec"],
        activation=TopK(int(folder[1])),
        subtracts=False,
        hooks=hooks,
        no_site=f"{path}: the file's name is not layer<n>.sae.pt",
    )


def read_hook_z(path: Path) -> Contents:
    """What a file and the `<name>_cfg.json` beside it say.

    Raises:
      UserError: the file is damaged, or its configuration is missing.
    """
    where = settings_beside(path)
    fields = read_config(where)
    sizes = {"d": fields.get("act_size"), "features": fields.get("dict_size")}
    arrays = read_checked(open_torch(path), ALONG, path, sizes={axis: n for axis, n in sizes.items() if type(n) is int})
    hooks, no_site, name = None, f"{where}: config field act_name is missing", fields.get("act_name")
    if isinstance(name, str):
        try:
            hooks = from_hooks(name, name)
        except UserError as error:
            no_site = f"{where}: {error}"
    return _contents(
        arrays["W_enc"].T,
        arrays["b_enc"],
        arrays["W_dec"],
        arrays["b_dec"],
        activation=ReLU(),
        subtracts=True,
        hooks=hooks,
        no_site=no_site,
    )


def read_goodfire(path: Path) -> Contents:
    """What such a file says.

    Raises:
      UserError: it is damaged.
    """
    arrays = read_checked(open_torch(path), LINEAR, path, sizes={})
    return _contents(
        arrays["encoder_linear.weight"],
        arrays["encoder_linear.bias"],
        arrays["decoder_linear.weight"].T,
        arrays["decoder_linear.bias"],
        activation=ReLU(),
        subtracts=False,
        no_site=f"{path}: nothing in it says where it was trained",
    )


def read_openai(path: Path) -> Contents:
    """What such a file says.

    Raises:
      UserError: it is damaged, or its activation is unknown.
    """
    tensors, settings = open_torch_with_settings(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in IGNORED}
    arrays = read_checked(tensors, OPENAI, path, sizes={})
    name = one_of({"activation": "ReLU"} | settings, "activation", path, ("ReLU", "TopK"))
    activation: Activation = ReLU()
    if name == "TopK":
        inner = settings.get("activation_state_dict")
        k = inner.get("k") if isinstance(inner, dict) else None
        if type(k) is not int or k < 1:
            raise UserError(f"{path}: activation_state_dict.k={shown(k)} should be a positive whole number.")
        one_of({"postact_fn": "ReLU"} | dict(inner or {}), "postact_fn", path, ("ReLU",))
        activation = TopK(k)
    return _contents(
        arrays["encoder.weight"],
        arrays["latent_bias"],
        arrays["decoder.weight"].T,
        arrays["pre_bias"],
        activation=activation,
        subtracts=True,
        no_site=f"{path}: nothing in it says where it was trained",
        per_token="layer_norm" if name == "TopK" else None,
    )


READ: dict[str, Callable[[Path], Contents]] = {
    "qwen_scope": read_qwen_scope,
    "hook_z": read_hook_z,
    "goodfire": read_goodfire,
    "openai": read_openai,
}
