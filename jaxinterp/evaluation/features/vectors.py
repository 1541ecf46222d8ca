"""What a feature's two vectors say without any text: the logits it moves, the neurons it resembles.

With write vector D_j (in the model's units) of an array that the residual stream receives:

    direct path    l_j = c center(g * P D_j) W_U,     then minus its mean over the vocabulary

g = the final norm's weight, W_U = the unembedding, with a scale of the logits and a projection in front of it where the
model has them; P = the down projection for an array inside the MLP (`hidden`), the weight of the sublayer's post-norm
where the block has one, else 1; `center` subtracts the mean over d_model for a LayerNorm; c = the product of factors on
the way: Granite's of what a sublayer adds, Gemma 4's of this layer and of later ones. l is in logits per unit of
activation, for a final residual stream of root mean square 1: the norm's division is left out, and so are a soft cap on
the logits and everything that later layers make of the feature.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jaxinterp.models.mlp import MLP
from jaxinterp.models.transformer import Transformer


def direct_logits(
    model: PyTree, writes: str, vectors: Float[np.ndarray, "chosen d_out"]
) -> Float[np.ndarray, "chosen vocab"] | None:
    """The direct path of the module's equation; None without logits, or where the array is not added up to them.

    Args:
      writes: the site that the vectors are written to: `blocks/3/mlp/{hidden,out,added}`, `blocks/3/attn/out`,
        `blocks/3/resid/{pre,mid,post}`.
      vectors: write vectors in the model's own units, per unit of activation.
    """
    block = _block(model, writes)
    sublayer, _, port = writes.rpartition("/")
    if block is None or not model.config.head or model.final_norm is None:
        return None
    if sublayer.endswith("/resid"):
        pass  # the residual stream itself
    elif sublayer.endswith("/attn") and port == "out":
        if block.attn_post_norm is not None:
            vectors = vectors * _gain(block.attn_post_norm)
    elif not sublayer.endswith("/mlp") or port not in ("hidden", "out", "added"):
        return None
    elif port == "hidden":
        if not isinstance(block.mlp, MLP):
            return None
        vectors = vectors @ _wide(block.mlp.down_proj.weight)
    if sublayer.endswith("/mlp") and port != "added" and block.mlp_post_norm is not None:
        vectors = vectors * _gain(block.mlp_post_norm)
    if model.final_norm.kind == "layer":
        vectors = vectors - vectors.mean(axis=1, keepdims=True)
    logits = _factor(model, writes) * (vectors * _gain(model.final_norm)) @ _wide(model.output_matrix())
    return logits - logits.mean(axis=1, keepdims=True)


def _factor(model: Transformer, writes: str) -> float:
    """What the residual stream is multiplied by between the written array and its end."""
    _, layer, sublayer, port = writes.split("/")
    added = sublayer == "resid" or port == "added"
    later = model.blocks[int(layer) + (port == "post") :]
    scales = [float(block.scale[0]) for block in later if block.scale is not None]
    return math.prod(scales) * (1.0 if added else model.config.residual_scale)


def neuron_cosines(
    model: PyTree, site: str, vectors: Float[np.ndarray, "chosen d"]
) -> Float[np.ndarray, "chosen d_mlp"] | None:
    """Cosines of vectors at a site of an MLP with what its neurons read or write there; None where there is nothing.

    At `in` a neuron is its column of the gate (of the up projection in an MLP without a gate), at `out` and `added` its
    row of the down projection, at `hidden` its own axis.
    """
    block = _block(model, site)
    port = site.rpartition("/")[2]
    if block is None or "/mlp/" not in site or not isinstance(block.mlp, MLP):
        return None
    if port == "in":
        neurons = _wide((block.mlp.up_proj if block.mlp.gate_proj is None else block.mlp.gate_proj).weight).T
    elif port in ("out", "added"):
        neurons = _wide(block.mlp.down_proj.weight)
    elif port == "hidden":
        return unit(vectors)
    else:
        return None
    return unit(vectors) @ unit(neurons).T


def row_cosines(
    first: Float[np.ndarray, "rows d_first"], second: Float[np.ndarray, "rows d_second"]
) -> Float[np.ndarray, " rows"] | None:
    """The cosine of every row of `first` with the same row of `second`; None where their dimensions differ."""
    return np.sum(unit(first) * unit(second), axis=1) if first.shape == second.shape else None


def unit(rows: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows d"]:
    """Rows of length 1; a row of zeros stays zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _block(model: PyTree, site: str) -> PyTree:
    """The block that `blocks/3/mlp/...` is in, None for a model or a site of another form."""
    parts = site.split("/")
    if not isinstance(model, Transformer) or len(parts) != 4 or parts[0] != "blocks":
        return None
    return model.blocks[int(parts[1])]


def _gain(norm: PyTree) -> np.ndarray:
    return _wide(norm.weight) + norm.offset


def _wide(array: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(array, jnp.float32))
