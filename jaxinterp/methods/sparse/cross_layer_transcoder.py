"""Cross-layer transcoder: features read one MLP's input and write to the outputs of that MLP and of all later ones.

    a^s = x'^s E_s^T + b_s,   z^s = activation(a^s),   y^l ≈ s_l * (sum_{s <= l} z^s D_{s->l} + b^l) + mean_l
    loss = mean_l |(y^l - ŷ^l) / s_l|^2 / d  +  λ(step) sum_{s,i} tanh(c |D_i^s| z_i^s)  +  μ mean_s sum_i relu(-a_i^s)

For every layer x [tokens, d_in], y [tokens, d]; E [features, d_in], a and z [tokens, features]; D_{s->l} [features, d],
stored together as [features, targets, d]. D_i^s = the write vectors of feature i of layer s to all targets, beside each
other. Inputs and outputs are standardised per dimension over the sample: x' = (x - mean) / s, s_l [d]. λ rises linearly
from 0 over the whole run. Start: E uniform in ±1/sqrt(features), D in ±1/sqrt(layers d), biases 0. Adam, its rate
divided by 10 for the last fifth. With TopK, set λ (`sparsity`) to 0; AuxK then revives dead features. `reach` limits
how many layers a feature writes to; 1 is the diagonal: per-layer transcoders.

Sources: Ameisen et al. 2025, "Circuit Tracing" (recalled); constants, start values, the scaling of the loss (so that λ
means the same) and AuxK as in Goreg12345/crosslayer-transcoder: JumpReLU with θ = 0.03 and bandwidth 0.01 at the start,
λ = 7e-4, c = 1, 10,000 features a layer, rate 1e-4, 100,000 steps of 1000 tokens. Fewer steps want a higher rate.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.core.sites import Site, Sites, several
from jaxinterp.decompositions.activations import Activation, ReLU, TopK
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_positive, check_whole
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.methods.sparse.dictionary import moments, since_fired
from jaxinterp.objectives import Metrics, Objective, Ratio, scale, total
from jaxinterp.objectives.cross_layer import auxk_of_layers, pre_activation, standardised_error, tanh_penalty


@dataclass(frozen=True)
class CrossLayerTranscoder:
    """Hyperparameters of a cross-layer transcoder."""

    features: int = 4608
    """Features that read each layer."""
    activation: Literal["jumprelu", "topk", "relu"] | Activation = "jumprelu"
    """How codes are made sparse; or any activation by value, of which every layer gets a copy."""
    threshold: float = 0.03
    """θ at the start (jumprelu); its logarithm is trained."""
    bandwidth: float = 0.01
    """Width of the straight-through estimator of θ (jumprelu)."""
    k: int = 32
    """Active features per token and layer (topk)."""
    sparsity: float = 7e-4
    """λ at the end of the run. It stays with topk too, where k already makes codes sparse: set it to 0 there."""
    tanh_slope: float = 1.0
    """c."""
    pre_activation: float = 0.0
    """μ; with TopK and ReLU it costs another encoder matmul a layer."""
    auxk: float = 1 / 32
    """Coefficient of AuxK (topk): dead features learn what the live ones leave over."""
    dead_after: int = 10_000_000
    """A feature is dead when it has not fired for this many tokens."""
    reach: int | None = None
    """To how many layers a feature writes, its own among them; None: to all that follow."""
    learning_rate: float = 1e-4
    """Rate of Adam, divided by 10 after 80 percent of the steps."""
    objective: Objective | None = None
    """Another objective in place of the equation's loss."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter is invalid."""
        if isinstance(self.activation, str):
            check_one_of(self, "activation", ("jumprelu", "topk", "relu"), "; pass any other by value: BatchTopK(k)")
        check_whole(self, features=1, k=1, dead_after=0, reach=1)
        if self.activation == "topk" and self.k > self.features:
            raise UserError(f"k={self.k} must lie between 1 and features={self.features}.")
        check_not_negative(self, "sparsity", "pre_activation", "auxk")
        check_positive(self, "threshold", "bandwidth", "tanh_slope", "learning_rate")

    def needs(self, site: Site) -> Sites:
        """From the inputs to the outputs of all layers, in the order of the flow."""
        return Sites(tuple(f"{name}/in" for name in several(site)), tuple(f"{name}/out" for name in several(site)))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the equation's loss."""
        rate = optax.piecewise_constant_schedule(self.learning_rate, {round(0.8 * steps): 0.1})
        return gradient_method(self.start, self.objective or self.loss(steps), optax.adam(rate), count_layers)

    def loss(self, steps: int) -> Objective:
        """The equation's loss, for a run of so many steps."""
        terms = [standardised_error()]
        if self.sparsity:
            terms.append(scale(tanh_penalty(self.tanh_slope), lambda step: self.sparsity * step / steps))
        if self.pre_activation:
            terms.append(scale(pre_activation(), self.pre_activation))
        if self.auxk and self.activation == "topk":
            terms.append(scale(auxk_of_layers(self.dead_after), self.auxk))
        return total(*terms)

    def start(self, key: PRNGKeyArray, sample: Batch, model: PyTree = None) -> CrossLayer:
        """Standardisation from the sample, random encoders and decoders."""
        layers, keys = len(sample.inputs), jax.random.split(key, len(sample.inputs))
        pairs = enumerate(zip(sample.inputs, sample.targets, strict=True))
        reach = layers if self.reach is None else self.reach
        made = [self._layer(keys[n], x, y, sample.weight, min(reach, layers - n), layers) for n, (x, y) in pairs]
        return CrossLayer(tuple(made), sample.sites)

    def _layer(self, key: PRNGKeyArray, x: Array, y: Array, weight: Array, reach: int, layers: int) -> Layer:
        encoder_key, decoder_key = jax.random.split(key)
        shape, write_shape = (self.features, x.shape[1]), (self.features, reach, y.shape[1])
        bound, write_bound = self.features**-0.5, (layers * y.shape[1]) ** -0.5
        (input_mean, input_variance), (mean, variance) = moments(x, weight), moments(y, weight)
        return Layer(
            encoder=jax.random.uniform(encoder_key, shape, minval=-bound, maxval=bound, dtype=jnp.float32),
            encoder_bias=jnp.zeros(self.features, jnp.float32),
            decoder=jax.random.uniform(
                decoder_key, write_shape, minval=-write_bound, maxval=write_bound, dtype=jnp.float32
            ),
            decoder_bias=jnp.zeros(y.shape[1], jnp.float32),
            input_mean=input_mean,
            input_scale=_scale(input_variance),
            output_mean=mean,
            output_scale=_scale(variance),
            target_mean=mean,
            target_variance=jnp.where(jnp.sum(variance) > 0, jnp.sum(variance), 1.0),
            tokens_since_fired=jnp.zeros(self.features, jnp.int32),
            activation=self._activation(),
        )

    def _activation(self) -> Activation:
        if self.activation == "jumprelu":
            return JumpReLU.start(self.features, self.threshold, bandwidth=self.bandwidth)
        if isinstance(self.activation, str):
            return TopK(self.k) if self.activation == "topk" else ReLU()
        return jax.tree.map(jnp.array, self.activation)  # copies: a buffer can be donated once only


def count_layers(state: MethodState, batch: Batch, metrics: Metrics, key: PRNGKeyArray) -> MethodState:
    """Tokens since each feature fired, and every layer's activation by that layer's own metrics."""
    cross = state.decomposition
    ends = [sum(layer.encoder.shape[0] for layer in cross.layers[: n + 1]) for n in range(len(cross.layers))]

    def after(number: int, layer: Layer) -> Layer:
        here = slice(ends[number] - layer.encoder.shape[0], ends[number])
        own = dict(metrics)
        if "fired" in metrics:
            own["fired"] = jax.tree.map(lambda array: array[here], metrics["fired"])
        since = since_fired(layer.tokens_since_fired, own)
        if "smallest_code" in metrics:
            own["smallest_code"] = Ratio(metrics["smallest_code"].total[number], metrics["smallest_code"].count)
        return replace(layer, tokens_since_fired=since, activation=layer.activation.after_step(own, batch.step))

    layers = tuple(after(number, layer) for number, layer in enumerate(cross.layers))
    return MethodState(CrossLayer(layers, cross.sites), state.optimizer)


def _scale(variance: Array) -> Array:
    """Standard deviations; 1 where a dimension does not vary."""
    return jnp.where(variance > 1e-12, jnp.sqrt(jnp.where(variance > 1e-12, variance, 1.0)), 1.0)
