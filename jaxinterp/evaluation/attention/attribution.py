"""Which heads, and which tokens that they looked at, make a feature of an attention sublayer fire: exact sums.

With pattern A^h, values v^h and z^h_t = sum_s A^h[t, s] v^h_s, a dictionary that reads z (all heads side by side) has

    pre-activation        a_tj = (z_t - mean) . E_j / scale + b_j
    part of head h        z^h_t . E^h_j,                           E^h_j = E_j[block of head h] / scale
    part of source s      sum_h A^h[t, s] v^h_s . E^h_j
    constant              c_j = b_j - mean . E_j / scale

and both kinds of parts add up to a_tj - c_j. One that reads out = z W_O + b_O has E^h_j = W_O^h E_j / scale instead,
and c_j + b_O . E_j / scale. The constant belongs to no head and no position. Keys and values may be grouped: the values
of head h are those of key-value head h // (heads / kv_heads).

Weights alone give the share of each head in a write vector of z, |D_j[h]| / sum_h |D_j[h]|.

Source: Kissane et al. 2024, arXiv 2406.17759 (direct feature attribution, weight-based head attribution).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.models.attention import Attention


class Reading(NamedTuple):
    """How a dictionary reads the heads: E^h_j of the module's equations, and the constant c_j."""

    vectors: Float[Array, "features heads head_dim"]
    constant: Float[Array, " features"]


def head_shares(rows: Float[Array, "features d"], heads: int) -> Float[Array, "features heads"]:
    """|D_j[h]| / sum_h |D_j[h]|: the share of each head in vectors of z; a row of zeros has shares of 0.

    Raises:
      UserError: the rows do not divide into so many heads.
    """
    if rows.shape[1] % heads:
        raise UserError(f"heads={heads} do not share {rows.shape[1]} dimensions evenly: give vectors of attn/z.")
    lengths = jnp.linalg.norm(rows.reshape(rows.shape[0], heads, -1), axis=-1)
    return lengths / jnp.maximum(jnp.sum(lengths, axis=1, keepdims=True), 1e-12)


def reading(dictionary: Dictionary, attention: PyTree) -> Reading:
    """How a dictionary of this sublayer's z or out reads each head.

    Raises:
      UserError: it reads another array, or the attention sublayer was replaced by another callable.
    """
    reads: PyTree = dictionary.sites.reads
    if not isinstance(attention, Attention):
        raise UserError(f"a {type(attention).__name__} has no heads to attribute to: give the original Attention.")
    if not isinstance(reads, str) or not reads.endswith(("/attn/z", "/attn/out")):
        raise UserError(f"the dictionary reads {reads!r}: attribution to heads needs attn/z or attn/out.")
    encoder = dictionary.encoder / dictionary.input_scale
    constant = dictionary.encoder_bias - encoder @ dictionary.input_mean
    if reads.endswith("/out"):
        if attention.o_proj.bias is not None:
            constant = constant + encoder @ attention.o_proj.bias.astype(jnp.float32)
        encoder = encoder @ attention.o_proj.weight.astype(jnp.float32).T
    return Reading(encoder.reshape(encoder.shape[0], attention.heads, -1), constant)


def by_head(
    reading: Reading, z: Float[Array, "*axes heads head_dim"], indices: Int[Array, "*axes k"]
) -> Float[Array, "*axes k heads"]:
    """The part of each head in the pre-activations of each token's features `indices`.

    Args:
      z: from the trace, `blocks/3/attn/z`.
      indices: k features a token: those of sparse codes, or the same for all tokens.
    """
    return jnp.einsum("...hd,...khd->...kh", z.astype(jnp.float32), reading.vectors[indices])


def by_source(
    reading: Reading,
    attention: Attention,
    attn_in: Float[Array, "batch seq d_model"],
    pattern: Float[Array, "batch heads seq seq"],
    indices: Int[Array, "batch seq k"],
) -> Float[Array, "batch seq k seq"]:
    """The part of each source position (last axis) in the pre-activations of each token's features `indices`.

    Args:
      attn_in, pattern: from the trace, `blocks/3/attn/in` and `blocks/3/attn/pattern`. Values are computed again.
    Raises:
      UserError: the layer norms, clips or gates its values, so that z is not linear in them; or has none of its own.
    """
    if attention.value_norm is not None or attention.clip is not None or attention.gate_proj is not None:
        raise UserError(
            "this layer norms, clips or gates its values: what a source position adds to z is not v_proj(x) times the "
            "pattern. Patch z at source positions instead (jaxinterp.causal.patch)."
        )
    if attention.v_proj is None:
        raise UserError("this layer has no v_proj: it takes its values from its keys, or from a layer before.")
    batch, seq, k = indices.shape
    values = attention.v_proj(attn_in).astype(jnp.float32).reshape(batch, seq, attention.kv_heads, -1)
    values = jnp.repeat(values, attention.heads // attention.kv_heads, axis=2)
    vectors = reading.vectors[indices]

    def add_head(total: Array, head: Array) -> tuple[Array, None]:
        said = jnp.einsum("btkd,bsd->btks", vectors[:, :, :, head], values[:, :, head])
        return total + pattern[:, head, :, None, :].astype(jnp.float32) * said, None

    # Head by head: all at once would hold heads times as much.
    return jax.lax.scan(add_head, jnp.zeros((batch, seq, k, seq), jnp.float32), jnp.arange(attention.heads))[0]


def mean_distance(sources: Float[Array, "batch seq k seq"]) -> Float[Array, "batch seq k"]:
    """How far back a feature's reasons lie, in tokens: sum_s |part_s| (t - s) / sum_s |part_s|; 0 where all are 0."""
    return _weighted(sources, _distance(sources.shape[1]))


def share_at(sources: Float[Array, "batch seq k seq"], distance: int) -> Float[Array, "batch seq k"]:
    """The share of |part_s| at one distance: 0 the token itself, 1 the one before it."""
    return _weighted(sources, _distance(sources.shape[1]) == distance)


def share_beyond(sources: Float[Array, "batch seq k seq"], distance: int) -> Float[Array, "batch seq k"]:
    """The share of |part_s| more than `distance` tokens back."""
    return _weighted(sources, _distance(sources.shape[1]) > distance)


def _distance(seq: int) -> Int[Array, "seq 1 seq"]:
    places = jnp.arange(seq)
    return places[:, None, None] - places[None, None, :]


def _weighted(sources: Array, measure: Array) -> Array:
    sizes = jnp.abs(sources)
    return jnp.sum(sizes * measure, axis=-1) / jnp.maximum(jnp.sum(sizes, axis=-1), 1e-30)
