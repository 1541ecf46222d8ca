"""A mixture of decoders (MxD): every token multiplies a dense MLP's output by a sparse sum of vectors.

    y' = (z D) * (a C) + b,   z = f(x' E^T + b_E),   a = relu of the k largest of x' G^T + b_G

Training and start values: `jaxinterp.methods.factor.mixture_of_decoders`.

Source: Oldfield et al. 2025 (arXiv 2505.21364), section 3.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import SparseCodes, weighted_rows
from jaxinterp.decompositions.scales import Scales
from jaxinterp.kernels import encode_topk
from jaxinterp.models.rules import ACTIVATIONS, Activation


class MixtureOfDecoders(eqx.Module):
    """The decomposition. `gate` and `scale` hold one row a feature."""

    encoder: Float[Array, "hidden d_in"] = eqx.field(metadata=PARAMETER)
    encoder_bias: Float[Array, " hidden"] = eqx.field(metadata=PARAMETER)
    decoder: Float[Array, "hidden d_out"] = eqx.field(metadata=PARAMETER)
    decoder_bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    gate: Float[Array, "features d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    gate_bias: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    scale: Float[Array, "features d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    scales: Scales = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    k: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """How many decoders there are."""
        return self.gate.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Float[Array, "*axes"] | None = None,
        training: bool = False,
    ) -> SparseCodes:
        """a: the k largest gates of each token that are positive."""
        x = self.scales.normalise(x)
        values, indices = encode_topk(x, self.gate, self.gate_bias, k=self.k, keep=k)
        return SparseCodes(jax.nn.relu(values), indices, self.features)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation."""
        dense = dense_path(self.scales.normalise(x), self.encoder, self.encoder_bias, self.decoder, self.activation)
        return self.scales.restore(dense * weighted_rows(codes, self.scale) + self.decoder_bias)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)


def dense_path(
    x: Float[Array, "*axes d_in"],
    encoder: Float[Array, "hidden d_in"],
    encoder_bias: Float[Array, " hidden"],
    decoder: Float[Array, "hidden d_out"],
    activation: Activation,
) -> Float[Array, "*axes d_out"]:
    """z D."""
    return ACTIVATIONS[activation](x @ encoder.T + encoder_bias) @ decoder


def mix(
    x: Float[Array, "*axes d_in"],
    gates: Float[Array, "*axes features"],
    encoder: Float[Array, "hidden d_in"],
    encoder_bias: Float[Array, " hidden"],
    decoder: Float[Array, "hidden d_out"],
    scale: Float[Array, "features d_out"],
    bias: Float[Array, " d_out"],
    activation: Activation = "gelu",
) -> Float[Array, "*axes d_out"]:
    """(z D) * (a C) + b for given gates a, without means and scales."""
    return dense_path(x, encoder, encoder_bias, decoder, activation) * (gates @ scale) + bias


def feature_map(decoder: Float[Array, "hidden d_out"], scale: Float[Array, " d_out"]) -> Float[Array, "hidden d_out"]:
    """D diag(c_n): the linear map from z to y of one feature."""
    return decoder * scale
