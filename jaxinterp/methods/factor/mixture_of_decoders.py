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

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.mixture_of_decoders import MixtureOfDecoders
from jaxinterp.decompositions.scales import moments, scales_of
from jaxinterp.methods.checks import check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import gradient_method, warmup_linear
from jaxinterp.models.rules import Activation
from jaxinterp.objectives import reconstruction, total


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
