"""Transcoders as a graph needs them: plain read and write vectors, normalisation folded in, one form for all kinds.

    a^s = x^s E_s^T + b_s                      z^s = a where a > θ (and among the k largest of its token), else 0
    y^l = sum_{s <= l} z^s D_{s->l} + b^l + x^l S_l

x^l = the input and y^l = the output of the MLP of layer l, both [seq, d]. θ = 0 gives ReLU, θ > 0 JumpReLU; k gives
TopK, k and θ BatchTopK outside training. Per-layer transcoders write to their own layer only (`reach` 1); S_l is the
skip path.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import several
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import BatchTopK, ReLU, TopK
from jaxinterp.decompositions.cross_layer import CrossLayer, PerLayer, fold_layers
from jaxinterp.decompositions.dictionary import Dictionary, fold
from jaxinterp.decompositions.gates import JumpReLU


class Reader(eqx.Module):
    """The features that read one MLP: E, b, θ, k and D of the module's equation.

    `decoder[i, t]` is what feature i writes to the t-th transcoded layer from its own on.
    """

    encoder: Float[Array, "features d"]
    encoder_bias: Float[Array, " features"]
    threshold: Float[Array, " features"]
    decoder: Float[Array, "features reach d"]
    k: int | None = eqx.field(static=True)

    def pre(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes features"]:
        """a of the module's equation."""
        return x @ self.encoder.T + self.encoder_bias

    def activate(self, pre: Float[Array, "*axes features"]) -> Float[Array, "*axes features"]:
        """z of the module's equation; of equal values the one with the lowest index counts as larger."""
        kept = jnp.where(pre > self.threshold, pre, 0.0)
        if self.k is None or self.k >= pre.shape[-1]:
            return kept
        _, chosen = jax.lax.top_k(pre, self.k)
        marked = jnp.sum(jax.nn.one_hot(chosen, pre.shape[-1], dtype=pre.dtype), axis=-2)
        return kept * marked


class Transcoders(eqx.Module):
    """Transcoders of some or all MLPs of a model: the module's equation. `layers[n]` is the block that reader n reads.

    `skip[n]` is None where a layer has no linear path.
    """

    readers: tuple[Reader, ...]
    decoder_bias: tuple[Float[Array, " d"], ...]
    skip: tuple[Float[Array, "d d"] | None, ...]
    layers: tuple[int, ...] = eqx.field(static=True)

    def written(self, codes: Sequence[Float[Array, "*axes _"]]) -> list[Float[Array, "*axes d"]]:
        """sum_{s <= l} z^s D_{s->l} for every transcoded layer: no bias, no skip path."""
        sums: list[Any] = [0.0] * len(self.readers)
        for source, (reader, z) in enumerate(zip(self.readers, codes, strict=True)):
            for step in range(reader.decoder.shape[1]):
                sums[source + step] = sums[source + step] + z @ reader.decoder[:, step]
        return sums


def from_arrays(
    encoders: Sequence[Any],
    encoder_biases: Sequence[Any],
    decoders: Sequence[Any],
    decoder_biases: Sequence[Any],
    *,
    skips: Sequence[Any] | None = None,
    thresholds: Sequence[Any] | None = None,
    k: int | Sequence[int | None] | None = None,
    layers: Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
) -> Transcoders:
    """Transcoders from given weights, one entry a layer.

    Args:
      encoders: [features, d] each; row i is the read vector of feature i.
      encoder_biases: [features] each.
      decoders: [features, d] each, or [features, reach, d] where features write to several layers (`[i, t]`: to the
        t-th transcoded layer from its own on).
      decoder_biases: [d] each.
      skips: [d, d] each, `x @ skip`; None: no linear paths.
      thresholds: θ [features] each; None: 0.
      k: for TopK, one number or one a layer; None: no limit.
      layers: which blocks they belong to, rising; default: 0, 1, 2, ...
      dtype: of all arrays; default: float32, or float64 where an encoder is float64 and jax allows it.
    Raises:
      UserError: shapes contradict each other, or a number of entries differs.
    """
    count = len(encoders)
    if not count or any(jnp.ndim(encoder) != 2 for encoder in encoders):
        raise UserError(f"encoders: give one [features, d] a layer, not {[jnp.shape(each) for each in encoders]}.")
    ks = [k] * count if k is None or isinstance(k, int) else list(k)
    entries: dict[str, Sequence[Any]] = {
        "encoder_biases": encoder_biases,
        "decoders": decoders,
        "decoder_biases": decoder_biases,
        "skips": [None] * count if skips is None else skips,
        "thresholds": [None] * count if thresholds is None else thresholds,
        "k": ks,
        "layers": range(count) if layers is None else layers,
    }
    for name, entry in entries.items():
        if len(entry) != count:
            raise UserError(f"{name} has {len(entry)} entries, but encoders has {count}: give one a layer.")
    dtype = dtype or jnp.promote_types(jnp.asarray(encoders[0]).dtype, jnp.float32)

    def array(value: Any) -> Array:
        return jnp.asarray(value, dtype)

    readers: list[Reader] = []
    for number in range(count):
        encoder, decoder = array(encoders[number]), array(decoders[number])
        decoder = decoder[:, None] if decoder.ndim == 2 else decoder
        threshold = entries["thresholds"][number]
        limit = jnp.zeros(encoder.shape[0], dtype) if threshold is None else array(threshold)
        bias = array(encoder_biases[number])
        if decoder.shape != (encoder.shape[0], decoder.shape[1], encoder.shape[1]) or bias.shape != encoder.shape[:1]:
            raise UserError(
                f"layer {number}: encoder {encoder.shape}, its bias {bias.shape} and decoder {decoder.shape} do not "
                "belong together: give [features, d], [features] and [features, d] or [features, reach, d]."
            )
        for name, value, shape in (
            ("decoder_biases", decoder_biases[number], encoder.shape[1:]),
            ("skips", entries["skips"][number], (encoder.shape[1],) * 2),
        ):
            if value is not None and jnp.shape(value) != shape:
                raise UserError(f"layer {number}: {name} has shape {jnp.shape(value)}, which must be {shape}.")
        if threshold is not None and jnp.shape(threshold) not in ((), encoder.shape[:1]):
            raise UserError(
                f"layer {number}: thresholds has shape {jnp.shape(threshold)}: give {encoder.shape[:1]} or a number."
            )
        most = ks[number]
        if most is not None and most < 1:
            raise UserError(f"layer {number}: k={most} must be at least 1; None: no limit.")
        if number and encoder.shape[1] != readers[0].encoder.shape[1]:
            raise UserError(
                f"layer {number}: encoder {encoder.shape} reads another width than layer 0's, "
                f"{readers[0].encoder.shape}."
            )
        if decoder.shape[1] > count - number:
            raise UserError(
                f"layer {number}: the decoder writes to {decoder.shape[1]} layers, but {count - number} follow."
            )
        readers.append(Reader(encoder, bias, jnp.broadcast_to(limit, encoder.shape[:1]), decoder, ks[number]))
    given = [None if skip is None else array(skip) for skip in entries["skips"]]
    return Transcoders(
        tuple(readers),
        tuple(array(bias) for bias in decoder_biases),
        tuple(given),
        _rising(tuple(int(layer) for layer in entries["layers"])),
    )


def transcoders_of(decomposition: PyTree, *, dtype: DTypeLike = jnp.float32) -> Transcoders:
    """Trained decompositions in the form of a graph, their normalisation folded into the weights.

    Args:
      decomposition: a `Dictionary` from an MLP's input to its output; a `PerLayer`, sequence or mapping of such; or a
        `CrossLayer`.
      dtype: of the arrays.
    Raises:
      UserError: it reads or writes something else, or its activation is not ReLU, JumpReLU, TopK or BatchTopK.
    """
    decomposition = jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, decomposition)
    if isinstance(decomposition, CrossLayer):
        return _of_cross_layer(decomposition)
    if isinstance(decomposition, Dictionary):
        parts: list[Any] = [decomposition]
    elif isinstance(decomposition, PerLayer):
        parts = list(decomposition.parts)
    else:
        parts = list(decomposition.values() if isinstance(decomposition, Mapping) else decomposition)
    for part in parts:
        if not isinstance(part, Dictionary):
            raise UserError(f"a {type(part).__name__} has no read and write vectors: give transcoders (Dictionary).")
    folded = sorted((fold(part) for part in parts), key=_layer_of)
    limits = [_limits(part.activation, part.features, dtype) for part in folded]
    return from_arrays(
        [part.encoder for part in folded],
        [part.encoder_bias for part in folded],
        [part.decoder for part in folded],
        [part.decoder_bias + part.output_mean for part in folded],
        skips=[part.skip for part in folded],
        thresholds=[threshold for threshold, _ in limits],
        k=[k for _, k in limits],
        layers=[_layer_of(part) for part in folded],
        dtype=dtype,
    )


def _of_cross_layer(cross: CrossLayer) -> Transcoders:
    folded = fold_layers(cross)
    dtype = folded.layers[0].encoder.dtype
    limits = [_limits(layer.activation, layer.encoder.shape[0], dtype) for layer in folded.layers]
    return from_arrays(
        [layer.encoder for layer in folded.layers],
        [layer.encoder_bias for layer in folded.layers],
        [layer.decoder for layer in folded.layers],
        [layer.decoder_bias + layer.output_mean for layer in folded.layers],
        thresholds=[threshold for threshold, _ in limits],
        k=[k for _, k in limits],
        layers=[_block(*pair) for pair in zip(several(cross.sites.reads), several(cross.sites.writes), strict=True)],
        dtype=dtype,
    )


def _limits(activation: Any, features: int, dtype: DTypeLike) -> tuple[Array, int | None]:
    """θ and k of an activation."""
    zero = jnp.zeros(features, dtype)
    if isinstance(activation, ReLU):
        return zero, None
    if isinstance(activation, TopK):
        return zero, activation.k
    if isinstance(activation, JumpReLU):
        return activation.threshold.astype(dtype), None
    if isinstance(activation, BatchTopK):
        limit = jnp.broadcast_to(jnp.maximum(activation.threshold, 0.0), (features,)).astype(dtype)
        return limit, min(activation.CAP * activation.k, features)
    raise UserError(
        f"activation={type(activation).__name__} is not supported in a graph: take ReLU, JumpReLU, TopK or BatchTopK."
    )


def _layer_of(part: Dictionary) -> int:
    reads, writes = several(part.sites.reads), several(part.sites.writes)
    if len(reads) != 1 or len(writes) != 1:
        raise UserError(f"a transcoder reads {reads} and writes {writes}: give one that reads and writes one array.")
    return _block(reads[0], writes[0])


def _block(reads: str, writes: str) -> int:
    """3 for `blocks/3/mlp/in` and `blocks/3/mlp/out`."""
    first, _, rest = reads.removeprefix("blocks/").partition("/")
    if not first.isdigit() or rest != "mlp/in" or writes != f"blocks/{first}/mlp/out":
        raise UserError(
            f"a transcoder that reads {reads!r} and writes {writes!r} is not supported in a graph: train it from an "
            "MLP's input to its output (Transcoder, SkipTranscoder, CrossLayerTranscoder)."
        )
    return int(first)


def _rising(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise UserError(f"layers={layers} must be rising, each once.")
    return layers
