"""Circuits from weights alone: what a transcoder feature reads from tokens and from earlier features, in any text.

With g_l = the weight of the norm before MLP l (of the attention norm: a_l), centring C for a LayerNorm, E and D the
read and write vectors of features, W_OV^h = W_V^h W_O^h, the effect of feature i (layer s, position q) on the
pre-activation of feature j (layer t, position p) is a number from the weights times a number from the text:

    along the residual stream (q = p)     [D_i . C(g_t E_j)]                    x   z_i(q) σ_t(p)
    through head h of layer t             [C(a_t W_OV^h C(g_t E_j)) . D_i]      x   z_i(q) σ^a_t(q) A^h(p, q) σ_t(p)

σ = the inverse scale of the norm, A = the attention pattern. For s = t - 1 these are all paths. The de-embedding of a
feature is the same with rows of the embedding table in place of D_i.

Source: Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944, section 4; norms' weights taken into the read vectors.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Attention
from jaxinterp.models.layers import Norm
from jaxinterp.models.transformer import Transformer


class Strengths(NamedTuple):
    """Input-invariant strengths of every feature of a layer on one feature."""

    residual: Float[Array, " features"]
    heads: Float[Array, "heads features"]


def read_vector(model: Transformer, transcoders: Transcoders, layer: int, index: int) -> Float[Array, " d"]:
    """C(g_l E_j): what the feature reads in the residual stream, per unit of the norm's inverse scale.

    Raises:
      UserError: the layer has no transcoder, or no such feature; or the model norms sums or what sublayers write.
    """
    config = model.config
    if config.post_norms or config.sum_norms or config.parallel:
        raise UserError(
            "strengths from weights need a model that norms only what sublayers read: take a graph instead."
        )
    if any(block.scale is not None or block.per_layer is not None for block in model.blocks):
        raise UserError("strengths from weights need a plain residual stream, without factors or vectors by layer.")
    if config.residual_scale != 1:
        raise UserError(
            f"residual_scale={config.residual_scale}: strengths from weights would be off by it at each step."
        )
    if layer not in transcoders.layers:
        raise UserError(f"layer {layer} has no transcoder: features are in layers {transcoders.layers}.")
    encoder = transcoders.readers[transcoders.layers.index(layer)].encoder
    if not 0 <= index < encoder.shape[0]:
        raise UserError(f"feature {index} of layer {layer}: give an index below {encoder.shape[0]}.")
    return through_norm(model.blocks[layer].mlp_norm, encoder[index])


def head_read_vectors(model: Transformer, transcoders: Transcoders, layer: int, index: int) -> Float[Array, "heads d"]:
    """C(a_l W_OV^h C(g_l E_j)): what the feature reads through each head of its own layer's attention."""
    read, attention = read_vector(model, transcoders, layer, index), model.blocks[layer].attn
    plain = isinstance(attention, Attention) and attention.v_proj is not None
    if not plain or attention.gate_proj is not None or attention.value_norm is not None or attention.clip is not None:
        raise UserError(f"blocks/{layer}/attn does not move values as they are (a gate, norm, clip, or no v_proj).")
    d, group = read.shape[0], attention.heads // attention.kv_heads
    value = jnp.repeat(attention.v_proj.weight.reshape(d, attention.kv_heads, -1), group, axis=1)
    out = attention.o_proj.weight.reshape(attention.heads, -1, d)
    seen = jnp.einsum("dhk,hke,e->hd", value, out, read)
    return jnp.stack([through_norm(model.blocks[layer].attn_norm, row) for row in seen])


def de_embedding(model: Transformer, transcoders: Transcoders, layer: int, index: int) -> Float[Array, " vocab"]:
    """How strongly each token's embedding alone drives the feature along the residual stream."""
    return model.embedding.scale * (model.embedding.token @ read_vector(model, transcoders, layer, index))


def strengths(model: Transformer, transcoders: Transcoders, source: int, layer: int, index: int) -> Strengths:
    """The input-invariant strengths of all features of layer `source` on feature `index` of `layer`.

    Raises:
      UserError: as `read_vector`; or `source` is not before `layer`.
    """
    if source not in transcoders.layers or source >= layer:
        raise UserError(f"source={source} must be a transcoded layer before layer {layer}.")
    start = transcoders.layers.index(source)
    decoder = transcoders.readers[start].decoder
    reached = [step for step in range(decoder.shape[1]) if transcoders.layers[start + step] < layer]
    written = jnp.sum(decoder[:, jnp.asarray(reached)], axis=1)
    return Strengths(
        written @ read_vector(model, transcoders, layer, index),
        head_read_vectors(model, transcoders, layer, index) @ written.T,
    )


def through_norm(norm: Norm | None, vector: Float[Array, " d"]) -> Float[Array, " d"]:
    """C(g v): a read vector behind a norm, as one before it, without the norm's scale."""
    if norm is None:
        return vector
    vector = vector * (norm.weight + norm.offset)
    return vector - jnp.mean(vector) if norm.kind == "layer" else vector
