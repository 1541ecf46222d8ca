"""Mixture of decoders (MxD): every token multiplies a dense MLP's output by a sparse sum of vectors.

    y' = (z D) * (a C) + b,   z = f(x' E^T + b_E),   a = relu of the k largest of x' G^T + b_G
       = sum_n a_n  z (D diag(c_n)) + b                 feature n is a linear map of full rank, used where a_n > 0

x' [tokens, d_in] normalised, y' [tokens, d_out]; E [hidden, d_in], D [hidden, d_out], G [features, d_in], C [features,
d_out], a [tokens, features]. The first line is what is computed: the features' maps D diag(c_n) are never built. The
loss is |y - ŷ|^2 over the target's variance.

Start (the authors' without unit norms): D = 0; E, G uniform in ±1/sqrt(d_in); C uniform in ±1/sqrt(features). Defaults:
theirs are GELU, hidden = 4 d, as many features as make the parameters those of a transcoder of 32 d features; here 2304
of each, the parameters of a transcoder of 4608.

Source: Oldfield et al. 2025 (arXiv 2505.21364), section 3.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.codes import SparseCodes, weighted_rows
from jaxinterp.decompositions.scales import Scales, moments, scales_of
from jaxinterp.kernels import encode_topk
from jaxinterp.methods.checks import check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import gradient_method, warmup_linear
from jaxinterp.models.rules import ACTIVATIONS, Activation
from jaxinterp.objectives import reconstruction, total


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


@dataclass(frozen=True)
class MixtureOfDecodersMethod:
    """Hyperparameters."""

    features: int = 2304
    """Decoders."""
    hidden: int = 2304
    """Neurons of the dense path."""
    k: int = 32
    """Active features per token."""
    activation: Activation = "gelu"
    """f of the dense path."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, features=1, hidden=1, k=1)
        check_positive(self, "learning_rate")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the reconstruction."""
        optimizer = optax.adam(warmup_linear(self.learning_rate, steps))
        return gradient_method(lambda key, sample, model: start(self, key, sample), total(reconstruction()), optimizer)


def start(method: MixtureOfDecodersMethod, key: PRNGKeyArray, sample: Batch) -> MixtureOfDecoders:
    """The start values of the module's text, with the means and scales of a sample."""
    x, y = sample.inputs, sample.targets
    d_in, d_out = x.shape[1], y.shape[1]
    keys = jax.random.split(key, 3)
    uniform = lambda key, rows, d, fan: jax.random.uniform(key, (rows, d), jnp.float32, minval=-1, maxval=1) / fan**0.5
    target_mean, target_variance = moments(y, sample.weight)
    return MixtureOfDecoders(
        encoder=uniform(keys[0], method.hidden, d_in, d_in),
        encoder_bias=jnp.zeros(method.hidden, jnp.float32),
        decoder=jnp.zeros((method.hidden, d_out), jnp.float32),
        decoder_bias=jnp.zeros(d_out, jnp.float32),
        gate=uniform(keys[1], method.features, d_in, d_in),
        gate_bias=jnp.zeros(method.features, jnp.float32),
        scale=uniform(keys[2], method.features, d_out, method.features),
        scales=scales_of(x, y, sample.weight),
        target_mean=target_mean,
        target_variance=target_variance,
        k=method.k,
        activation=method.activation,
        sites=sample.sites,
    )
