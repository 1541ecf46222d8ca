"""An MLP as the dictionary that it is."""

import jax.numpy as jnp

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.models.files.subject import Subject


def as_dictionary(subject: Subject, sites: Sites, activation: ReLU | TopK) -> Dictionary:
    """The dictionary that is the planted MLP itself: feature j is neuron j. The last feature is dead."""
    mlp = subject.model.blocks[1].mlp
    features, d = mlp.up_proj.weight.shape[1], mlp.up_proj.weight.shape[0]
    return Dictionary(
        encoder=mlp.up_proj.weight.T,
        encoder_bias=mlp.up_proj.bias.at[-1].set(-1e9),
        decoder=mlp.down_proj.weight,
        decoder_bias=jnp.zeros(d),
        skip=None,
        input_mean=jnp.zeros(d),
        input_scale=jnp.ones(()),
        output_mean=jnp.zeros(d),
        output_scale=jnp.ones(()),
        target_variance=jnp.ones(()),
        target_mean=jnp.zeros(d),
        tokens_since_fired=jnp.zeros(features, jnp.int32),
        activation=activation,
        sites=sites,
    )
