"""The exact transcoder of a ReLU MLP: a dictionary made of its own weights, one feature a neuron.

    relu(x W_up + b_up) W_down + b_down  =  relu(x E^T + b_E) D + b_D,    E = W_up^T, D = W_down

Nothing is lost: FVU 0, and the model's logits with it in the MLP's place are those of the model. It is what every
measurement of a replaced model is tested on, and the truth that a learned transcoder of a planted MLP is held against.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.models.mlp import MLP


def exact_transcoder(
    mlp: PyTree, site: str = "blocks/0/mlp", *, target_mean: Float[Array, " d_model"] | None = None
) -> Dictionary:
    """The dictionary that is this MLP.

    Args:
      mlp: a dense ReLU MLP, `model.blocks[3].mlp`.
      site: its name in the model, `blocks/3/mlp`.
      target_mean: the mean of its output over training tokens, for mean ablation; default: 0.
    Raises:
      UserError: the MLP is gated or its activation is not a ReLU: a neuron is then not a feature of a transcoder.
    """
    if not isinstance(mlp, MLP):
        raise UserError(
            f"the leaf at {site!r} is a {type(mlp).__name__}, not a jaxinterp MLP: its weights are unknown."
        )
    if mlp.gate_proj is not None or mlp.activation != "relu":
        raise UserError(
            f"the MLP at {site!r} is gated or has activation={mlp.activation!r}: only a dense ReLU MLP is a transcoder "
            "of its own neurons."
        )
    encoder, decoder = mlp.up_proj.weight.T, mlp.down_proj.weight
    (features, d_in), d_out = encoder.shape, decoder.shape[1]
    return Dictionary(
        encoder=encoder,
        encoder_bias=jnp.zeros(features, jnp.float32) if mlp.up_proj.bias is None else mlp.up_proj.bias,
        decoder=decoder,
        decoder_bias=jnp.zeros(d_out, jnp.float32) if mlp.down_proj.bias is None else mlp.down_proj.bias,
        skip=None,
        input_mean=jnp.zeros(d_in, jnp.float32),
        input_scale=jnp.ones((), jnp.float32),
        output_mean=jnp.zeros(d_out, jnp.float32),
        output_scale=jnp.ones((), jnp.float32),
        target_mean=jnp.zeros(d_out, jnp.float32) if target_mean is None else target_mean,
        target_variance=jnp.ones((), jnp.float32),
        tokens_since_fired=jnp.zeros(features, jnp.int32),
        activation=ReLU(),
        sites=Sites(f"{site}/in", f"{site}/out"),
    )
