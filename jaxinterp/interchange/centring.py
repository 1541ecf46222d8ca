"""Dictionaries that were trained on centred streams: TransformerLens's `center_writing_weights`.

TransformerLens takes the mean over d_model off everything that is added to the residual stream of a LayerNorm model.
Its stream is c = P x with P = 1 - 11^T / d, and so are the outputs of attention and MLPs; the model's predictions are
the same. Versions of SAELens that wrote no version trained on it by default (`gpt2-small-res-jb`). For a dictionary
z = f(E (s c - b) + b_E), ĉ = (z D + b_D) / s of c, the one of x is

    z = f(E P s x - E b + b_E),   ŷ = (z D + b_D) / s + x 11^T / d

The last term is the mean that no later LayerNorm sees: ŷ - x = ĉ - c.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.interchange.contents import Contents

CENTRED = ("resid/pre", "resid/mid", "resid/post", "attn/out", "mlp/out", "mlp/added")
"""What is centred with the weights that write into the stream."""

RMS_NORM = re.compile(r"gemma|llama|mistral|mixtral|qwen|phi-?3|olmo|smollm|yi-|tinyllama", re.IGNORECASE)
"""Names of models with RMSNorm, which sees the mean: TransformerLens leaves their weights as they are."""


def settle_centring(contents: Contents, centred: bool | None, sites: Sites, subject: Any, where: str) -> Contents:
    """The dictionary for the stream as the published model has it.

    Args:
      centred: whether it was trained on centred streams; None: as the file says.
      sites: where it belongs.
    Raises:
      UserError: the file does not say it, and the model has LayerNorm or is unknown; or what was trained on centred
        streams is a transcoder, or belongs where nothing is centred.
    """
    reached = any(str(name).endswith(CENTRED) for name in (sites.reads, sites.writes))
    if centred is None and not (reached and _has_layer_norm(contents, subject)):
        return contents
    said = contents.centred if centred is None else centred
    if said is None:
        raise UserError(
            f"{where}: it has no version, and files of SAELens without one were trained on streams whose mean "
            "TransformerLens had taken off (center_writing_weights), which this model's are not: pass centred=True to "
            "fold that into the weights, or centred=False to read it as it is."
        )
    if said and not reached:
        raise UserError(f"centred=True: the mean of {sites.reads!r} is never taken off; leave centred out.")
    return _folded(contents, where) if said else contents


def _has_layer_norm(contents: Contents, subject: Any) -> bool:
    """Whether the subject, or else the model that the file names, has LayerNorm; True where nothing is known."""
    config = getattr(getattr(subject, "model", None), "config", None)
    norm = getattr(config, "norm", None)
    if norm is not None:
        return bool(norm == "layer")
    return RMS_NORM.search(contents.model_name or "") is None


def _folded(contents: Contents, where: str) -> Contents:
    if contents.transcoder:
        raise UserError(
            f"{where}: a transcoder that was trained on centred streams (center_writing_weights) reads one array and "
            "writes another: fold that into its weights first, or pass centred=False to read it as it is."
        )
    width = contents.encoder.shape[1]
    bias = contents.encoder_bias
    if contents.subtracts:
        bias = bias - contents.encoder @ contents.decoder_bias
    mean = np.full((width, width), 1 / width, np.float32)
    return replace(
        contents,
        encoder=contents.encoder - contents.encoder.mean(axis=1, keepdims=True),
        encoder_bias=bias,
        subtracts=False,
        skip=mean if contents.skip is None else contents.skip - contents.skip.mean(axis=0, keepdims=True) + mean,
        target=None,
    )
