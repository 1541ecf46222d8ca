"""dictionary_learning: `ae.pt`, a state dict of PyTorch, beside `config.json`; read without unpickling.

    AutoEncoder             y = D ReLU(E (x - bias) + b) + bias
    AutoEncoderNew          y = D ReLU(E x + b) + decoder.bias
    AutoEncoderTopK         y = D TopK_k(ReLU(E (x - b_dec) + b)) + b_dec
    BatchTopKSAE,           the same with a 1[a > threshold] in place of TopK: one threshold, measured in training
    MatryoshkaBatchTopKSAE
    GatedAutoEncoder        e = E (x - decoder_bias),  z = 1[e + gate_bias > 0] ReLU(exp(r_mag) e + mag_bias)
    JumpReluAutoEncoder     a = x W_enc + b_enc,  z = a 1[a > threshold]

`encoder.weight` is (features, d), `decoder.weight` (d, features), W_enc (d, features), W_dec (features, d). Weights are
taken as they are stored; the library's own loader rescales an AutoEncoder to unit write vectors, which changes codes
and not outputs.

Source: dictionary_learning 0.1.0 (dictionary.py, trainers/*.py, utils.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.activations import Activation, ReLU, TopK
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.interchange.arrays import AxesByName, check_names, integer, read_checked
from jaxinterp.interchange.contents import Contents
from jaxinterp.interchange.fields import one_of, read_config, shown
from jaxinterp.interchange.names import Hooks, from_submodule, has_post_norms
from jaxinterp.interchange.saelens_fields import BANDWIDTH
from jaxinterp.interchange.torch_file import open_torch

NAME, CONFIG = "ae.pt", "config.json"

Arrays = Mapping[str, np.ndarray]

TORCH: AxesByName = {"encoder.weight": ("features", "d"), "decoder.weight": ("d", "features")}
ENCODER_BIAS: AxesByName = {"encoder.bias": ("features",)}
OWN: AxesByName = {"W_enc": ("d", "features"), "W_dec": ("features", "d"), "b_enc": ("features",), "b_dec": ("d",)}
SELECTED: AxesByName = {"k": (), "threshold": ()}
GATES: AxesByName = {"gate_bias": ("features",), "r_mag": ("features",), "mag_bias": ("features",)}


def _relu(arrays: Arrays, features: int, path: Path) -> Activation:
    return ReLU()


def _topk(arrays: Arrays, features: int, path: Path) -> Activation:
    return TopK(integer(arrays["k"], "k", path))


def _one_threshold(arrays: Arrays, features: int, path: Path) -> Activation:
    threshold = float(arrays["threshold"])
    if threshold < 0:
        raise UserError(
            f"{path}: threshold={threshold} was never measured (training ended before threshold_start_step): without "
            "it, the codes of a token depend on the others of its batch."
        )
    return JumpReLU(jnp.full(features, arrays["threshold"], jnp.float32), "raw", BANDWIDTH)


def _thresholds(arrays: Arrays, features: int, path: Path) -> Activation:
    return JumpReLU(jnp.asarray(arrays["threshold"]), "raw", BANDWIDTH)


def _gated(arrays: Arrays, features: int, path: Path) -> Activation:
    return Gated(*(jnp.asarray(arrays[name]) for name in ("gate_bias", "r_mag", "mag_bias")))


@dataclass(frozen=True)
class Class:
    """The arrays of a class, the one that is the decoder's bias, and how they make an activation."""

    tensors: AxesByName
    activation: Callable[[Arrays, int, Path], Activation]
    bias: str
    subtracts: bool = True


CLASSES = {
    "AutoEncoder": Class(TORCH | ENCODER_BIAS | {"bias": ("d",)}, _relu, "bias"),
    "AutoEncoderNew": Class(TORCH | ENCODER_BIAS | {"decoder.bias": ("d",)}, _relu, "decoder.bias", subtracts=False),
    "AutoEncoderTopK": Class(TORCH | ENCODER_BIAS | SELECTED | {"b_dec": ("d",)}, _topk, "b_dec"),
    "BatchTopKSAE": Class(TORCH | ENCODER_BIAS | SELECTED | {"b_dec": ("d",)}, _one_threshold, "b_dec"),
    "MatryoshkaBatchTopKSAE": Class(OWN | SELECTED | {"group_sizes": ("groups",)}, _one_threshold, "b_dec"),
    "GatedAutoEncoder": Class(TORCH | GATES | {"decoder_bias": ("d",)}, _gated, "decoder_bias"),
    "JumpReluAutoEncoder": Class(OWN | {"threshold": ("features",)}, _thresholds, "b_dec", subtracts=False),
}


def read_dictionary_learning(path: Path) -> Contents:
    """What an `ae.pt` and the `config.json` beside it say.

    Raises:
      UserError: the pickle asks for more than tensors, its arrays are not those of the class that the configuration
        names, or there is no configuration and the arrays are those of two classes.
    """
    where = path.parent / CONFIG
    config = read_config(where) if where.is_file() else {}
    trainer, buffer = _section(config, "trainer", where), _section(config, "buffer", where)
    stored = open_torch(path)
    like = [name for name, kind in CLASSES.items() if set(kind.tensors) == set(stored)]
    if "dict_class" in trainer:
        name = one_of(trainer, "dict_class", where, CLASSES)
    elif len(like) == 1:
        name = like[0]
    else:
        what = f"these are arrays of {' or '.join(like)}" if like else f"no known class has arrays {', '.join(stored)}"
        raise UserError(f"{path}: {what}: put the {CONFIG} beside it that says dict_class.")
    hint = f" These are the arrays of {' or '.join(like)}: dict_class={name!r} looks wrong." if like else ""
    kind = CLASSES[name]
    check_names(stored, kind.tensors, path, hint)
    arrays = read_checked(stored, kind.tensors, path, sizes=_sizes(trainer))
    if "k" in arrays and trainer.get("k") not in (None, integer(arrays["k"], "k", path)):
        raise UserError(
            f"{where}: k={shown(trainer['k'])}, but {path.name} has {integer(arrays['k'], 'k', path)}; mend one."
        )
    own = "W_enc" in arrays
    encoder = arrays["W_enc"].T if own else arrays["encoder.weight"]
    hooks, no_site = _hooks(trainer, buffer, where)
    return Contents(
        encoder=np.ascontiguousarray(encoder),
        encoder_bias=arrays.get("b_enc", arrays.get("encoder.bias", np.zeros(encoder.shape[0], np.float32))),
        decoder=arrays["W_dec"] if own else np.ascontiguousarray(arrays["decoder.weight"].T),
        decoder_bias=arrays[kind.bias],
        activation=kind.activation(arrays, encoder.shape[0], path),
        subtracts=kind.subtracts,
        transcoder=buffer.get("io") == "in_and_out",
        hooks=hooks,
        no_site=no_site,
        post_norms=has_post_norms(trainer.get("lm_name")),
    )


def _section(config: Mapping[str, Json], name: str, where: Path) -> dict[str, Json]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: config field {name} should be an object.")
    return section


def _sizes(trainer: Mapping[str, Json]) -> dict[str, int]:
    named = {"d": trainer.get("activation_dim"), "features": trainer.get("dict_size")}
    return {axis: value for axis, value in named.items() if type(value) is int}


def _hooks(trainer: Mapping[str, Json], buffer: Mapping[str, Json], where: Path) -> tuple[Hooks | None, str]:
    """Where it was trained; None, and why not, where that cannot be told."""
    if buffer.get("io", "out") != "out":
        return None, f"{where}: buffer.io={shown(buffer['io'])}: it was trained on more than what a module returns"
    name = trainer.get("submodule_name")
    hooks = from_submodule(name) if isinstance(name, str) else None
    return (
        hooks,
        f"{where}: trainer.submodule_name={shown(name)} says no place that is known here (resid_post_layer_8, ...)",
    )
