"""What tests of several folders share."""

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.dictionary import Dictionary

SITES = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")


def random_dictionary(activation, seed=0, features=24, d_in=8, d_out=6, skip=True, sites=SITES):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Dictionary(
        encoder=draw(features, d_in),
        encoder_bias=draw(features),
        decoder=draw(features, d_out),
        decoder_bias=draw(d_out),
        skip=draw(d_in, d_out) if skip else None,
        input_mean=draw(d_in),
        input_scale=jnp.exp(draw()),
        output_mean=draw(d_out),
        output_scale=jnp.exp(draw()),
        target_variance=jnp.exp(draw()),
        target_mean=draw(d_out),
        tokens_since_fired=jnp.zeros(features, jnp.int32),
        activation=activation,
        sites=sites,
    )
