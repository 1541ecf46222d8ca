"""What every format here says, in one form: the arrays of a dictionary, and which conventions they stand in.

    a = (s x - c) E^T + b_E,   z = activation(a),   y = (z D + b_D) / s [+ x S],   c = b_D where `subtracts`, else 0

`build` makes a `Dictionary` of it, with b_D as the input's mean and 1/s as its scales; `plain` is the way back, for a
file to be written: arrays stay as they are to the last bit where the dictionary's means and scales say no more than
that, and are folded where they do.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import Activation, BatchTopK
from jaxinterp.decompositions.adaptive import GroupBias, check_foldable
from jaxinterp.decompositions.dictionary import Dictionary, fold
from jaxinterp.decompositions.gates import Gated
from jaxinterp.decompositions.per_token import Kind, PerToken
from jaxinterp.interchange.names import Hooks


@dataclass(frozen=True)
class Target:
    """What the target was over the training sample: its mean, and its mean squared distance from it."""

    mean: np.ndarray
    variance: float


@dataclass(frozen=True)
class Contents:
    """The module's equation. Rows are features: encoder E `(features, d_in)`, decoder D `(features, d_out)`.

    Attributes:
      subtracts: whether the encoder reads the input without the decoder's bias.
      transcoder: whether what it writes is another array than what it reads; None where the format does not say.
      hooks: where it was trained, as the file names it; None where it does not.
      no_site: why `hooks` is None, for the message that asks for a site.
      post_norms: whether the model that the file names has norms behind its sublayers.
      before_gain: whether what it reads at a sublayer's input is before the gain and bias of the norm.
      factor: s, by which activations were multiplied in training; None where the file says that there was one and not
        which.
      target: None where the file does not say.
      centred: whether it was trained on streams whose mean was taken off; None: the file does not say.
      model_name: of the model that it was trained on, where the file says it.
      per_token: by which scale of its own each token was divided, where it was (`per_token.py`).
      head: the one head of an attention sublayer that it reads and writes.
    """

    encoder: Float[np.ndarray, "features d_in"]
    encoder_bias: Float[np.ndarray, " features"]
    decoder: Float[np.ndarray, "features d_out"]
    decoder_bias: Float[np.ndarray, " d_out"]
    activation: Activation
    subtracts: bool
    transcoder: bool | None
    skip: Float[np.ndarray, "d_in d_out"] | None = None
    hooks: Hooks | None = None
    no_site: str = ""
    post_norms: bool = False
    before_gain: bool = False
    factor: float | None = 1.0
    target: Target | None = None
    centred: bool | None = False
    model_name: str | None = None
    per_token: Kind | None = None
    head: int | None = None


def finished(dictionary: Dictionary, contents: Contents) -> Dictionary | PerToken:
    """The dictionary, behind each token's own scale where it was trained there."""
    if contents.per_token is None:
        return dictionary
    return PerToken(dictionary, dictionary.target_mean, dictionary.target_variance, contents.per_token)


def of_head(contents: Contents, width: int) -> Contents:
    """The dictionary of one head's part of `attn/z`, for all heads beside each other: the others pass as they are.

        E' = [0 .. E .. 0],  D' = [0 .. D .. 0],  S' = 1 for the dimensions of other heads

    Args:
      width: of all heads together.
    Raises:
      UserError: there is no such head.
    """
    size = contents.encoder.shape[1]
    head = contents.head or 0
    if width % size or not 0 <= head < width // size:
        raise UserError(f"hook_head_index={head} of size {size}: the model's 'attn/z' has {width} dimensions.")
    here = slice(head * size, (head + 1) * size)

    def placed(rows: np.ndarray) -> np.ndarray:
        whole = np.zeros((*rows.shape[:-1], width), np.float32)
        whole[..., here] = rows
        return whole

    others = np.eye(width, dtype=np.float32)
    others[here, here] = 0 if contents.skip is None else contents.skip
    return replace(
        contents,
        encoder=placed(contents.encoder),
        decoder=placed(contents.decoder),
        decoder_bias=placed(contents.decoder_bias),
        skip=others,
        target=None,
    )


def build(contents: Contents, sites: Sites) -> Dictionary:
    """The dictionary at these sites; `target_mean` and `target_variance` are NaN where the file has none."""
    features, width = contents.decoder.shape
    bias = jnp.asarray(contents.decoder_bias)
    factor = contents.factor if contents.factor is not None else 1.0
    target = contents.target or Target(np.full(width, np.nan, np.float32), np.nan)
    scale = jnp.asarray(1.0 / factor, jnp.float32)
    return Dictionary(
        encoder=jnp.asarray(contents.encoder),
        encoder_bias=jnp.asarray(contents.encoder_bias),
        decoder=jnp.asarray(contents.decoder),
        decoder_bias=bias,
        skip=None if contents.skip is None else jnp.asarray(contents.skip),
        input_mean=bias * scale if contents.subtracts else jnp.zeros(contents.encoder.shape[1], jnp.float32),
        input_scale=scale,
        output_mean=jnp.zeros(width, jnp.float32),
        output_scale=scale,
        target_mean=jnp.asarray(target.mean, jnp.float32),
        target_variance=jnp.asarray(target.variance, jnp.float32),
        tokens_since_fired=jnp.zeros(features, jnp.int32),
        activation=contents.activation,
        sites=sites,
    )


def plain(dictionary: Dictionary) -> Contents:
    """The dictionary in the module's equation, with s = 1.

    Raises:
      UserError: it reads or writes several arrays, its activation depends on more than the pre-activations, or is
        BatchTopK, which no format has as it is; or a value is NaN or infinite.
    """
    sites, activation = dictionary.sites, dictionary.activation
    if not isinstance(sites.reads, str) or not isinstance(sites.writes, str):
        raise UserError(f"sites={sites}: no format here has dictionaries that read or write several arrays.")
    check_foldable(activation)
    if isinstance(activation, BatchTopK):
        raise UserError(
            f"activation=BatchTopK keeps at most {activation.CAP} k features a token, which no format here has: write "
            "as_jumprelu(dictionary), which keeps all above its threshold."
        )
    if isinstance(activation, GroupBias):
        raise UserError("activation=GroupBias decides by another bias than it adds, which no format here has.")
    one_scale = float(dictionary.input_scale) == 1 and float(dictionary.output_scale) == 1
    no_mean = not np.any(dictionary.output_mean)
    subtracts = False
    if not (one_scale and no_mean and not np.any(dictionary.input_mean)):
        centred = sites.reads == sites.writes and np.array_equal(dictionary.input_mean, dictionary.decoder_bias)
        if one_scale and no_mean and centred and dictionary.skip is None:
            subtracts = True
        else:
            dictionary = fold(dictionary)
            dictionary = replace(dictionary, decoder_bias=dictionary.decoder_bias + dictionary.output_mean)
    for name, leaf in named_leaves(dictionary).items():
        if not name.startswith("target_") and not np.all(np.isfinite(leaf)):
            raise UserError(
                f"{name} has values that are NaN or infinite: the dictionary is broken; nothing is written."
            )
    target = Target(np.asarray(dictionary.target_mean), float(dictionary.target_variance))
    known = np.all(np.isfinite(target.mean)) and np.isfinite(target.variance)
    return Contents(
        encoder=np.asarray(dictionary.encoder),
        encoder_bias=np.asarray(dictionary.encoder_bias),
        decoder=np.asarray(dictionary.decoder),
        decoder_bias=np.asarray(dictionary.decoder_bias),
        activation=activation,
        subtracts=subtracts,
        transcoder=sites.reads != sites.writes,
        skip=None if dictionary.skip is None else np.asarray(dictionary.skip),
        target=target if known else None,
    )


def subtracting(contents: Contents) -> Contents:
    """The same function with the decoder's bias subtracted from the input: b_E' = b_E + E b_D."""
    if contents.subtracts:
        return contents
    bias = contents.encoder_bias + contents.encoder @ contents.decoder_bias
    return replace(contents, encoder_bias=bias, subtracts=True)


def gate_biases(contents: Contents) -> tuple[np.ndarray, np.ndarray]:
    """(gate, size): what a Gated file adds to x E^T and to exp(r) x E^T, with b_E taken into both."""
    gated: Any = contents.activation
    if not isinstance(gated, Gated):
        raise TypeError(type(gated).__name__)
    bias, scale = contents.encoder_bias, np.exp(np.asarray(gated.log_scale))
    return np.asarray(gated.gate_bias) + bias, np.asarray(gated.size_bias) + scale * bias


def behind_gain(contents: Contents, gain: Float[np.ndarray, " d"], bias: Float[np.ndarray, " d"]) -> Contents:
    """What was trained on a normalised array n, for x = gain n + bias, as the sublayer behind the norm reads it.

        E' = E / gain,  S' = S / gain,  b_E' = b_E - E' bias  (not where the decoder's bias is subtracted)
        a transcoder:   b_D' = b_D - bias S'
        an autoencoder: D' = gain D,  b_D' = gain b_D + bias

    with s bias for bias where activations are multiplied by s.

    Raises:
      UserError: a gain is 0.
    """
    if not np.all(gain):
        raise UserError("the norm before the site has gains of 0: what the file reads there is lost in this model.")
    bias = np.float32(contents.factor or 1.0) * bias
    encoder = contents.encoder / gain
    encoder_bias = contents.encoder_bias if contents.subtracts else contents.encoder_bias - encoder @ bias
    changed = replace(contents, encoder=encoder, encoder_bias=encoder_bias, target=None)
    if not contents.transcoder:
        return replace(changed, decoder=contents.decoder * gain, decoder_bias=gain * contents.decoder_bias + bias)
    if contents.skip is None:
        return changed
    skip = contents.skip / gain[:, None]
    return replace(changed, skip=skip, decoder_bias=contents.decoder_bias - bias @ skip)
