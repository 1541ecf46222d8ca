"""Cross-layer transcoders and sets of transcoders in other libraries' arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer


@dataclass(frozen=True)
class Source:
    """The features that read one layer, and the bias of what is written to it."""

    encoder: Float[np.ndarray, "features d_in"]
    encoder_bias: Float[np.ndarray, " features"]
    decoder: Float[np.ndarray, "features reach d_out"]
    decoder_bias: Float[np.ndarray, " d_out"]
    activation: Activation


def cross_layer(sources: Sequence[Source], sites: Sites) -> CrossLayer:
    """y^l = sum_{s <= l} z^s D_{s->l} + b^l, with scales 1 and targets whose moments are not known (NaN).

    Raises:
      UserError: layers read or write arrays of different sizes.
    """
    widths = [(source.encoder.shape[1], source.decoder.shape[2]) for source in sources]
    for number, (reads, writes) in enumerate(widths):
        if (reads, writes) != widths[0]:
            raise UserError(
                f"layer {number} reads {reads} dimensions and writes {writes}, but layer 0 reads {widths[0][0]} and "
                f"writes {widths[0][1]}: the files belong to different models, or one is damaged."
            )

    def layer(source: Source) -> Layer:
        features, _, d_out = source.decoder.shape
        d_in = source.encoder.shape[1]
        return Layer(
            encoder=jnp.asarray(source.encoder),
            encoder_bias=jnp.asarray(source.encoder_bias),
            decoder=jnp.asarray(source.decoder),
            decoder_bias=jnp.asarray(source.decoder_bias),
            input_mean=jnp.zeros(d_in, jnp.float32),
            input_scale=jnp.ones(d_in, jnp.float32),
            output_mean=jnp.zeros(d_out, jnp.float32),
            output_scale=jnp.ones(d_out, jnp.float32),
            target_mean=jnp.full(d_out, jnp.nan, jnp.float32),
            target_variance=jnp.asarray(jnp.nan, jnp.float32),
            tokens_since_fired=jnp.zeros(features, jnp.int32),
            activation=source.activation,
        )

    return CrossLayer(tuple(layer(source) for source in sources), sites)
