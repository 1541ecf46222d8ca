"""Decompositions of several layers at once: they read a tuple of arrays, hold codes of every layer, and write a tuple.

CrossLayer: a feature of layer s reads x^s and writes to the outputs of layer s and of later layers.

    z^s = activation(x'^s E_s^T + b_s),                         x'^s = (x^s - input_mean) / input_scale
    y^l = output_scale * (sum_{s <= l} z^s D_{s->l} + b^l) + output_mean

Scales are per dimension. The ragged decoders lie with the layer that reads: `decoder[i, t]` is what feature i of layer
s writes to layer s + t, so that a feature is one row (its write vectors beside each other), its length is the length of
that row, and one gather per source serves all targets. With one target per layer (`reach` 1, the diagonal) the layers
are transcoders that do not know of each other.

PerLayer: one decomposition per layer, of any kind, side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE, STATE_ROWS
from jaxinterp.decompositions.activations import Activation, ActsOnPre, check_schedule
from jaxinterp.decompositions.adaptive import check_foldable
from jaxinterp.decompositions.codes import SparseCodes, weighted_rows
from jaxinterp.kernels import as_products


class LayerCodes(eqx.Module):
    """Codes of several layers. Where one number a feature is asked for, layer stands after layer."""

    layers: tuple[Codes, ...]

    @property
    def features(self) -> int:
        """The number of features of all layers."""
        return sum(codes.features for codes in self.layers)

    def dense(self) -> Float[Array, "*axes features"]:
        """One value per feature."""
        return jnp.concatenate([codes.dense() for codes in self.layers], axis=-1)

    def weighted(self, per_feature: Float[Array, " features"]) -> Float[Array, "*axes"]:
        """Per token, the sum of its values times a number of each feature."""
        pairs = zip(self.layers, self.split(per_feature), strict=True)
        return reduce(add, [codes.weighted(part) for codes, part in pairs])

    def active(self) -> Float[Array, "*axes"]:
        """The number of active features of each token, in all layers together."""
        return reduce(add, [codes.active() for codes in self.layers])

    @property
    def capped(self) -> bool:
        """Whether the codes of any layer have a limit that tokens should not reach."""
        return any(codes.capped for codes in self.layers)

    def at_cap(self) -> Float[Array, "*axes"]:
        """Per token, in what fraction of the layers with such a limit it reached it."""
        capped = [codes for codes in self.layers if isinstance(codes, SparseCodes) and codes.capped]
        return reduce(add, [codes.at_cap() for codes in capped]) / len(capped)

    def smallest(self) -> Float[Array, " layers"]:
        """The smallest positive value of every layer: a threshold belongs to a layer."""
        return jnp.stack([codes.smallest() for codes in self.layers])

    def fired(self, weight: Float[Array, "*axes"]) -> Float[Array, " features"]:
        """How many tokens (by weight) each feature is active on."""
        return jnp.concatenate([codes.fired(weight) for codes in self.layers])

    def split(self, per_feature: Float[Array, " features"]) -> list[Float[Array, " _"]]:
        """One number a feature, cut into the layers."""
        ends = [sum(codes.features for codes in self.layers[: n + 1]) for n in range(len(self.layers))]
        return [per_feature[end - codes.features : end] for codes, end in zip(self.layers, ends, strict=True)]


class Layer(eqx.Module):
    """The features that read one layer, and what the output of that layer is like."""

    encoder: Float[Array, "features d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    encoder_bias: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder: Float[Array, "features reach d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder_bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    input_mean: Float[Array, " d_in"] = eqx.field(metadata=STATE)
    input_scale: Float[Array, " d_in"] = eqx.field(metadata=STATE)
    output_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    output_scale: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    tokens_since_fired: Int[Array, " features"] = eqx.field(metadata=STATE_ROWS)
    activation: Activation

    def normalise(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_in"]:
        """x' of the module's equation: from float32 sums, rounded to bfloat16 where x is bfloat16."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return as_products((wide - self.input_mean) / self.input_scale, x)

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> Codes:
        """z^s of the module's equation; options as in a dictionary."""
        check_schedule(self.activation, k)
        rows, bias = self.encoder, self.encoder_bias
        return self.activation.codes(self.normalise(x), rows, bias, k=k, weight=weight, training=training)

    def pre(self, x: Float[Array, "*axes d_in"]) -> dict[str, Float[Array, "*axes features"]]:
        """What the activation decides on, by name; nothing where its codes cannot be made of it again."""
        if not isinstance(self.activation, ActsOnPre):
            return {}
        return dict(self.activation.pre(self.normalise(x), self.encoder, self.encoder_bias))

    def from_pre(self, pre: Mapping[str, Array], x: Float[Array, "*axes d_in"]) -> Codes:
        """The codes of pre-activations.

        Raises:
          UserError: the activation has no `from_pre`.
        """
        if not isinstance(self.activation, ActsOnPre):
            raise UserError(f"activation={type(self.activation).__name__} has no codes_pre: edit the codes.")
        return self.activation.from_pre(pre, self.normalise(x))

    def write(self, codes: Codes) -> Float[Array, "*axes reach d_out"]:
        """z^s D_{s->l} for every target l at once, in normalised units."""
        features, reach, d_out = self.decoder.shape
        written = weighted_rows(codes, self.decoder.reshape(features, reach * d_out))
        return written.reshape(*written.shape[:-1], reach, d_out)

    def write_to(self, codes: Codes, step: int) -> Float[Array, "*axes d_out"]:
        """z^s D_{s->s+step}."""
        return weighted_rows(codes, self.decoder[:, step])


class CrossLayer(eqx.Module):
    """A cross-layer transcoder: the module's equation."""

    layers: tuple[Layer, ...]
    sites: Sites = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises UserError if the layers are not those of the sites."""
        if not len(self.layers) == len(self.sites.reads) == len(self.sites.writes):
            raise UserError(
                f"{len(self.layers)} layers for reads={self.sites.reads!r} and writes={self.sites.writes!r}: "
                "give tuples of names, one of each a layer."
            )

    @property
    def target_mean(self) -> tuple[Float[Array, " d_out"], ...]:
        """The mean of every target over the training sample."""
        return tuple(layer.target_mean for layer in self.layers)

    def encode_layer(
        self,
        layer: int,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> Codes:
        """The codes of one layer's features."""
        return self.layers[layer].encode(x, k=k, weight=weight, training=training)

    def reader(self, layer: int) -> Layer:
        """The features that read a layer."""
        return self.layers[layer]

    def encode(
        self,
        x: tuple[Float[Array, "..."], ...],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> LayerCodes:
        """The codes of every layer; k and weight as in a dictionary."""
        layers = enumerate(x)
        return LayerCodes(
            tuple(self.encode_layer(n, array, k=k, weight=weight, training=training) for n, array in layers)
        )

    def combine(self, codes: LayerCodes) -> tuple[Float[Array, "*axes d_out"], ...]:
        """sum_{s <= l} z^s D_{s->l} for every l, in normalised units."""
        written = [layer.write(part) for layer, part in zip(self.layers, codes.layers, strict=True)]

        def reaching(target: int) -> Array:
            near = [(parts, target - source) for source, parts in enumerate(written[: target + 1])]
            return reduce(add, [parts[..., step, :] for parts, step in near if step < parts.shape[-2]])

        return tuple(reaching(target) for target in range(len(self.layers)))

    def decode(self, codes: LayerCodes, x: tuple[Array, ...]) -> tuple[Float[Array, "*axes d_out"], ...]:
        """y of the module's equation for every layer; x is not read."""
        return tuple(_outwards(layer, sums) for layer, sums in zip(self.layers, self.combine(codes), strict=True))

    def decode_layer(self, layer: int, codes: Sequence[Codes], x: Array) -> Float[Array, "*axes d_out"]:
        """y of one layer, from the codes of the layers up to it (later ones are not needed)."""
        near = [(source, layer - number, codes[number]) for number, source in enumerate(self.layers[: layer + 1])]
        parts = [source.write_to(part, step) for source, step, part in near if step < source.decoder.shape[1]]
        return _outwards(self.layers[layer], reduce(add, parts))

    def __call__(self, x: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(y.astype(own.dtype) for y, own in zip(self.decode(self.encode(x), x), x, strict=True))

    def write_vectors(self) -> Float[Array, "features layers d_out"]:
        """Every feature's write vectors in the targets' own units, layer after layer; 0 where it does not write."""
        rows = []
        for source, layer in enumerate(self.layers):
            reach = layer.decoder.shape[1]
            scales = jnp.stack([target.output_scale for target in self.layers[source : source + reach]])
            after = len(self.layers) - source - reach
            rows.append(jnp.pad(layer.decoder * scales, ((0, 0), (source, after), (0, 0))))
        return jnp.concatenate(rows)


class PerLayer(eqx.Module):
    """One decomposition for each layer, side by side: `parts[l]` reads and writes what its own `sites` name."""

    parts: tuple[Any, ...]

    @property
    def sites(self) -> Sites:
        """What the parts read and write."""
        return Sites(tuple(part.sites.reads for part in self.parts), tuple(part.sites.writes for part in self.parts))

    @property
    def target_mean(self) -> tuple[Float[Array, " _"], ...]:
        """The mean of every target over the training sample."""
        return tuple(part.target_mean for part in self.parts)

    def encode_layer(self, layer: int, x: Array, **options: Any) -> Codes:
        """The codes of one part."""
        return self.parts[layer].encode(x, **options)

    def reader(self, layer: int) -> PyTree:
        """The part that reads a layer."""
        return self.parts[layer]

    def encode(self, x: tuple[Array, ...], **options: Any) -> LayerCodes:
        """The codes of every part; options as each part has them."""
        return LayerCodes(tuple(part.encode(array, **options) for part, array in zip(self.parts, x, strict=True)))

    def decode(self, codes: LayerCodes, x: tuple[Array, ...]) -> tuple[Array, ...]:
        """What every part makes of its own codes."""
        return tuple(self.decode_layer(number, codes.layers, array) for number, array in enumerate(x))

    def decode_layer(self, layer: int, codes: Sequence[Codes], x: Array) -> Array:
        """What one part makes of its own codes."""
        return self.parts[layer].decode(codes[layer], x)

    def __call__(self, x: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(part(array) for part, array in zip(self.parts, x, strict=True))


def fold_layers(cross: CrossLayer) -> CrossLayer:
    """The same function with input means 0 and scales 1; codes do not change, `output_mean` stays.

    E' = E / s_in,  b' = b - E' mean_in,  D'_{s->l} = D_{s->l} s_out^l,  b'^l = s_out^l b^l.

    Raises:
      UserError: an activation is TopAFA, whose codes depend on the length of x'.
    """
    for layer in cross.layers:
        check_foldable(layer.activation)

    def folded(source: int, layer: Layer) -> Layer:
        encoder = layer.encoder / layer.input_scale
        scales = jnp.stack([target.output_scale for target in cross.layers[source : source + layer.decoder.shape[1]]])
        changes: dict[str, PyTree] = {
            "encoder": encoder,
            "encoder_bias": layer.encoder_bias - encoder @ layer.input_mean,
            "decoder": layer.decoder * scales,
            "decoder_bias": layer.decoder_bias * layer.output_scale,
            "input_mean": jnp.zeros_like(layer.input_mean),
            "input_scale": jnp.ones_like(layer.input_scale),
            "output_scale": jnp.ones_like(layer.output_scale),
        }
        return replace(layer, **changes)

    return CrossLayer(tuple(folded(source, layer) for source, layer in enumerate(cross.layers)), cross.sites)


def _outwards(layer: Layer, sums: Array) -> Array:
    return layer.output_scale * (sums + layer.decoder_bias) + layer.output_mean
