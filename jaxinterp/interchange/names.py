"""What other libraries call the places inside a model, and what we call them.

TransformerLens (SAELens) names hooks: `blocks.8.hook_mlp_out`. Hugging Face (sparsify) names modules, and means their
input and output: `layers.5.mlp`. dictionary_learning writes `mlp_out_layer_5`. Ours are sites: `blocks/5/mlp/out`.

Two names need more than a table. `ln2.hook_normalized` is the residual stream divided by its norm *before* the norm's
gain and bias (TransformerLens 3.9: components/rms_norm.py, layer_norm.py), where `mlp/in` is what the MLP reads, behind
them. And `hook_mlp_out` is what the MLP adds to the residual stream: `mlp/added`, which is `mlp/out` unless the model
has a norm behind its MLP (Gemma 2 and 3, OLMo 2); `hook_attn_out` likewise. What the sublayer itself returns is
`mlp.hook_out`, `attn.hook_out` in every model (TransformerLens 3.9: model_bridge/generalized_components/block.py); we
write these.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid/pre",
    "hook_resid_mid": "resid/mid",
    "hook_resid_post": "resid/post",
    "ln1.hook_normalized": "attn/in",
    "ln2.hook_normalized": "mlp/in",
    "mlp.hook_in": "mlp/in",
    "mlp.hook_pre": "mlp/pre",
    "mlp.hook_pre_linear": "mlp/up",
    "mlp.hook_post": "mlp/hidden",
    "mlp.hook_out": "mlp/out",
    "hook_mlp_out": "mlp/added",
    "attn.hook_z": "attn/z",
    "attn.hook_out": "attn/out",
    "hook_attn_out": "attn/out",
}
"""Ours by the name of a hook within its block."""

WRITTEN = {ours: theirs for theirs, ours in TRANSFORMER_LENS.items() if "normalized" not in theirs}
WRITTEN |= {"mlp/out": "mlp.hook_out", "mlp/in": "mlp.hook_in", "attn/out": "attn.hook_out"}
"""The hook whose array is ours in every model, for files that we write."""

ATTENTION_ADDED = "hook_attn_out"
"""What attention adds to the residual stream: `attn/out`, unless the model has a norm behind it."""

NORMALISED = ("ln1.hook_normalized", "ln2.hook_normalized")
"""Hooks before the gain and bias of their norm."""

MODULES = {"": ("resid/pre", "resid/post"), "mlp": ("mlp/in", "mlp/out")}
MODULES |= dict.fromkeys(("self_attn", "attn", "attention"), ("attn/in", "attn/out"))
"""What a Hugging Face module reads and returns, by its name within its block."""

SUBMODULES = {"resid_post": "resid/post", "mlp_out": "mlp/out", "attention_out": "attn/out", "attn_out": "attn/out"}
"""Ours by dictionary_learning's names."""

POST_NORMS = re.compile(r"gemma-?[23](?!b)|olmo-?2", re.IGNORECASE)
"""Names of models with a norm behind their sublayers; Gemma-2b is of the first generation."""

BLOCK = re.compile(r"blocks\.(\d{1,5})\.(.+)")
MODULE = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h|blocks)\.(\d{1,5})(?:\.(.+))?")
SUBMODULE = re.compile(r"(.+)_layer_(\d{1,5})")


@dataclass(frozen=True)
class Hooks:
    """Where a file says that it was trained.

    Attributes:
      reads, writes: our names.
      said: the file's own words, for messages.
      before_gain: what it reads is the normalised array before the gain and bias of the norm.
      added: our names say `mlp/added`, which is `mlp/out` in a model without norms behind its sublayers.
      attention_added: they say `attn/out`, which is another array in a model with such norms.
    """

    reads: str
    writes: str
    said: str
    before_gain: bool = False
    added: bool = False
    attention_added: bool = False

    def sites(self, post_norms: bool) -> Sites:
        """Our names in a model with or without norms behind its sublayers.

        Raises:
          UserError: there is none for what attention adds behind such a norm.
        """
        if post_norms and self.attention_added:
            raise UserError(f"{self.said}: what attention adds behind a norm of its own has no name here.")
        return self._without_norms() if self.added and not post_norms else Sites(self.reads, self.writes)

    def may_be(self, sites: Sites) -> bool:
        """Whether these are our names in one model or another."""
        return sites == Sites(self.reads, self.writes) or (self.added and sites == self._without_norms())

    def _without_norms(self) -> Sites:
        return Sites(self.reads.replace("/added", "/out"), self.writes.replace("/added", "/out"))


def from_hooks(reads: str, writes: str) -> Hooks:
    """Our names for two of TransformerLens.

    Raises:
      UserError: one is unknown, or what is written is before the gain of a norm and what is read is not.
    """
    ours, hooks = [], []
    for name in (reads, writes):
        found = BLOCK.fullmatch(name)
        if found is None or found[2] not in TRANSFORMER_LENS:
            raise UserError(
                f"hook_name={name!r} has no counterpart here that is known to be the same array; known: blocks.N."
                f"{{{', '.join(TRANSFORMER_LENS)}}}"
            )
        ours.append(f"blocks/{int(found[1])}/{TRANSFORMER_LENS[found[2]]}")
        hooks.append(found[2])
    if hooks[1] in NORMALISED and reads != writes:
        raise UserError(f"hook_name_out={writes!r}: writing before the gain of a norm is not supported.")
    said = f"hook_name={reads!r}" + ("" if reads == writes else f", hook_name_out={writes!r}")
    return Hooks(
        ours[0],
        ours[1],
        said,
        before_gain=hooks[0] in NORMALISED,
        added=any(name.endswith("/added") for name in ours),
        attention_added=ATTENTION_ADDED in hooks,
    )


def to_hook(site: str) -> str:
    """The name that TransformerLens has for one of our arrays.

    Raises:
      UserError: it has none.
    """
    found = re.fullmatch(r"blocks/(\d+)/(.+)", site)
    if found is None or found[2] not in WRITTEN:
        raise UserError(
            f"site {site!r} has no name in SAELens files; those with one: blocks/N/{{{', '.join(WRITTEN)}}}."
        )
    return f"blocks.{found[1]}.{WRITTEN[found[2]]}"


def from_module(name: str, *, transcoder: bool) -> Hooks | None:
    """Our names for a Hugging Face module; None where the name says nothing.

    An autoencoder reads and writes what the module returns, a transcoder goes from what it reads to what it returns.
    """
    found = MODULE.fullmatch(name)
    if found is None or (found[2] or "") not in MODULES:
        return None
    reads, writes = (f"blocks/{int(found[1])}/{port}" for port in MODULES[found[2] or ""])
    return Hooks(reads if transcoder else writes, writes, f"the folder's name {name!r}")


def from_submodule(name: str) -> Hooks | None:
    """Our names for dictionary_learning's `submodule_name`; None where it says nothing."""
    found = SUBMODULE.fullmatch(name)
    if found is None or found[1] not in SUBMODULES:
        return None
    site = f"blocks/{int(found[2])}/{SUBMODULES[found[1]]}"
    return Hooks(site, site, f"submodule_name={name!r}")


def has_post_norms(model_name: Any) -> bool:
    """Whether a model of this name has norms behind its sublayers; False where nothing is known of it."""
    return isinstance(model_name, str) and POST_NORMS.search(model_name) is not None


def module_folder(path: Path) -> str:
    """The name of the module that a sparsify folder is named by: `layers.5.mlp`, also above `seed0`."""
    return path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name
