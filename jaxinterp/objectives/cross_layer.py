"""The terms that cross-layer transcoders are trained with: sums over layers, in units of standardised targets.

    standardised_error   mean_l mean_t |(y_t^l - ŷ_t^l) / s_l|^2 / d
    tanh_penalty         mean_t sum_{s,i} tanh(c |D_i^s| z_ti^s)
    pre_activation       mean_s mean_t sum_i relu(-a_ti^s)
    auxk_of_layers       sum_l |ê^l - e^l|^2 / sum_l |e^l|^2 * min(dead / k_aux, 1)
                         e^l = sg((y^l - ŷ^l) / s_l),  ê^l = sum_{s <= l} z_dead^s D_{s->l}

s_l = `output_scale`, one number a dimension; D_i^s = the write vectors of feature i of layer s to all its targets,
beside each other; dead, k_aux = the dead features of all layers, and how many of them a token may use: half of d_out a
layer; means over tokens are weighted. Sources: as the cross-layer transcoder names them.
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Codes
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer, LayerCodes
from jaxinterp.kernels import encode_topk
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term, ratio


def standardised_error() -> Term:
    """Squared error in units of each dimension's variance, mean over dimensions and layers; metric `fvu`: mean of the
    layers' fractions of variance unexplained, in the targets' own units."""

    def term(decomposition: CrossLayer, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        errors = [y - guess for y, guess in zip(batch.targets, forward.output, strict=True)]
        pairs = list(zip(decomposition.layers, errors, strict=True))
        standard = [ratio(jnp.mean((error / layer.output_scale) ** 2, axis=-1), batch.weight) for layer, error in pairs]
        raw = [ratio(jnp.sum(error**2, axis=-1) / layer.target_variance, batch.weight) for layer, error in pairs]
        error = _mean(standard)
        return error.value(), {"standardised_error": error, "fvu": _mean(raw)}

    return term


def tanh_penalty(slope: float = 1.0) -> Term:
    """sum over layers and features of tanh(c |D_i| z_i), mean over tokens; metric `penalty`."""

    def term(decomposition: CrossLayer, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        sums = [
            _penalised(layer, codes, slope)
            for layer, codes in zip(decomposition.layers, forward.codes.layers, strict=True)
        ]
        penalty = ratio(reduce(add, sums), batch.weight)
        return penalty.value(), {"penalty": penalty}

    return term


def pre_activation() -> Term:
    """sum over features of relu(-a), mean over tokens and layers: it lifts features that never fire; metric by name."""

    def term(decomposition: CrossLayer, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        below = []
        for layer, codes, x in zip(decomposition.layers, forward.codes.layers, batch.inputs, strict=True):
            a = codes.pre if isinstance(codes, DenseCodes) else None  # what a gate decided by
            if a is None:
                a = layer.normalise(x) @ layer.encoder.T + layer.encoder_bias
            below.append(ratio(jnp.sum(jax.nn.relu(-a), axis=-1), batch.weight))
        mean = _mean(below)
        return mean.value(), {"pre_activation": mean}

    return term


def auxk_of_layers(dead_after: int) -> Term:
    """AuxK of all layers at once: dead features decode the residuals of all targets; metric `auxk`."""

    def term(decomposition: CrossLayer, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        dead = [layer.tokens_since_fired > dead_after for layer in decomposition.layers]
        numbers = list(zip(decomposition.layers, batch.targets, forward.output, strict=True))
        residuals = [jax.lax.stop_gradient((y - guess) / layer.output_scale) for layer, y, guess in numbers]
        weight = batch.weight[:, None]
        size = sum(jnp.sum(weight * residual**2) for residual in residuals) + 1e-12

        # As with one layer: where fewer are dead than may be used, they count for less.
        most = sum(_most_dead(layer) for layer in decomposition.layers)
        fraction = jnp.minimum(jnp.sum(jnp.concatenate(dead)) / most, 1.0)

        def of_dead(decomposition: CrossLayer) -> Array:
            layers = zip(decomposition.layers, batch.inputs, dead, strict=True)
            codes = LayerCodes(tuple(_codes_among(layer, x, allowed) for layer, x, allowed in layers))
            pairs = zip(decomposition.combine(codes), residuals, strict=True)
            error = reduce(add, [jnp.sum(weight * (helped - residual) ** 2) for helped, residual in pairs]) / size
            return error * fraction

        value = jax.lax.cond(
            jnp.any(jnp.concatenate(dead)), of_dead, lambda _: jnp.zeros((), jnp.float32), decomposition
        )
        return value, {"auxk": Ratio(value, jnp.ones((), jnp.float32))}

    return term


def _penalised(layer: Layer, codes: Codes, slope: float) -> Array:
    """Per token, the sum of tanh(c |D_i| z_i). Not `linalg.norm`, whose gradient at a row of zeros is NaN."""
    lengths = slope * jnp.sqrt(jnp.sum(layer.decoder**2, axis=(1, 2)) + 1e-12)
    if isinstance(codes, SparseCodes):
        return jnp.sum(jnp.tanh(lengths[codes.indices] * codes.values), axis=-1)
    return jnp.sum(jnp.tanh(lengths * codes.dense()), axis=-1)


def _codes_among(layer: Layer, x: Array, allowed: Array) -> SparseCodes:
    """The codes of the allowed features, `_most_dead` a token."""
    k = _most_dead(layer)
    values, indices = encode_topk(layer.normalise(x), layer.encoder, layer.encoder_bias, k=k, allowed=allowed)
    return SparseCodes(jax.nn.relu(values), indices, layer.decoder.shape[0])


def _most_dead(layer: Layer) -> int:
    """How many dead features of a layer a token may use: half as many as the output has dimensions."""
    features, _, d_out = layer.decoder.shape
    return min(max(d_out // 2, 1), features)


def _mean(ratios: list[Ratio]) -> Ratio:
    return Ratio(reduce(add, [one.total for one in ratios]), reduce(add, [one.count for one in ratios]))
