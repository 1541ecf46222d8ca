"""Classes of gated neurons by what they read and write: strengthening, weakening, conditional, proportional, ...

A neuron of a gated MLP computes act(w_gate . x) (w_in . x) and adds that much of w_out. With the sign

    a(c) = 1 if c > threshold, -1 if c < -threshold, else 0            threshold 0.5
    l = a(cos(w_in, w_out)),  g = a(cos(w_gate, w_out)),  t = a(cos(w_gate, w_in))
    typical = 1 where t = l g, or where l = g = 0

its class is (l, |g|, typical): eleven of them, `NAMES`. It does not change under a joint flip of w_in and w_out, under
positive scaling, or under a rotation of the residual stream. The scale of the norm before the MLP belongs into w_gate
and w_in (`folded` does that); the bias of a norm does not matter here. A dense MLP has l alone.

`random_region` says which cosines chance explains.

Source: Gerstner and Schuetze 2025 (arXiv 2505.17936); names of the current code (the paper has "enrichment" for
strengthening and "depletion" for weakening).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from scipy.stats import beta

from jaxinterp.core.errors import UserError
from jaxinterp.models.mlp import MLP

NAMES: dict[tuple[int, int, int], str] = {
    (1, 1, 1): "strengthening",
    (1, 1, 0): "atypical strengthening",
    (1, 0, 1): "conditional strengthening",
    (1, 0, 0): "atypical conditional strengthening",
    (0, 1, 1): "proportional change",
    (0, 1, 0): "atypical proportional change",
    (0, 0, 1): "orthogonal output",
    (-1, 1, 1): "weakening",
    (-1, 1, 0): "atypical weakening",
    (-1, 0, 1): "conditional weakening",
    (-1, 0, 0): "atypical conditional weakening",
}
"""The eleven classes by (l, |g|, typical)."""

DENSE_NAMES: dict[int, str] = {1: "strengthening", 0: "orthogonal output", -1: "weakening"}
"""The three classes of a dense MLP's neurons by l."""


class NeuronVectors(NamedTuple):
    """Read and write vectors of a layer's neurons, one row a neuron; `gate` is None in a dense MLP."""

    gate: Float[Array, "neurons d"] | None
    read: Float[Array, "neurons d"]
    write: Float[Array, "neurons d"]


class Cosines(NamedTuple):
    """cos(w_in, w_out), cos(w_gate, w_out), cos(w_gate, w_in) of every neuron; the last two None in a dense MLP."""

    read_write: Float[Array, "*layers neurons"]
    gate_write: Float[Array, "*layers neurons"] | None
    gate_read: Float[Array, "*layers neurons"] | None


def folded(
    gate: Float[Array, "d neurons"] | None,
    up: Float[Array, "d neurons"],
    down: Float[Array, "neurons d"],
    scale: Float[Array, " d"] | None = None,
) -> NeuronVectors:
    """The vectors of an MLP whose weights are stored (d_in, d_out), with the scale of the norm before it taken in.

    Args:
      scale: what the normed input is multiplied with (weight + offset of the norm); None: 1.
    """
    factor = 1 if scale is None else scale[:, None]
    return NeuronVectors(None if gate is None else (gate * factor).T, (up * factor).T, down)


def cosines(vectors: NeuronVectors) -> Cosines:
    """The three cosines of every neuron; 0 where a vector has no length."""
    read_write = _cosine(vectors.read, vectors.write)
    if vectors.gate is None:
        return Cosines(read_write, None, None)
    return Cosines(read_write, _cosine(vectors.gate, vectors.write), _cosine(vectors.gate, vectors.read))


def classify(cosines: Cosines, threshold: float = 0.5) -> Int[Array, "*layers neurons 3"]:
    """(l, |g|, typical) of every neuron; of a dense MLP's (l, 0, 1).

    Raises:
      UserError: the threshold is not in (0, 1).
    """
    if not 0 < threshold < 1:
        raise UserError(f"threshold={threshold} must lie between 0 and 1: it is a cosine.")
    along = _sign(cosines.read_write, threshold)
    if cosines.gate_write is None or cosines.gate_read is None:
        return jnp.stack([along, jnp.zeros_like(along), jnp.ones_like(along)], axis=-1)
    gate, together = _sign(cosines.gate_write, threshold), _sign(cosines.gate_read, threshold)
    typical = (together == along * gate) | ((along == 0) & (gate == 0))
    return jnp.stack([along, jnp.abs(gate), typical.astype(along.dtype)], axis=-1)


def counts(classes: Int[Array | np.ndarray, "*layers neurons 3"]) -> dict[str, Int[np.ndarray, "*layers"]]:
    """By name of a class, how many neurons of each layer are in it; classes without neurons are there too."""
    found = np.asarray(classes)
    return {name: np.asarray((found == np.asarray(key)).all(axis=-1).sum(axis=-1)) for key, name in NAMES.items()}


def members(classes: Int[Array | np.ndarray, "neurons 3"], name: str) -> Int[np.ndarray, " members"]:
    """The numbers of the neurons in one class.

    Raises:
      UserError: no class has this name.
    """
    keys = {known: key for key, known in NAMES.items()}
    if name not in keys:
        raise UserError(f"class {name!r} does not exist: the classes are {', '.join(keys)}.")
    return np.flatnonzero((np.asarray(classes) == np.asarray(keys[name])).all(axis=-1))


def random_region(d: int, p: float = 0.05) -> tuple[float, float]:
    """Between which cosines the share 1 - p of pairs of random vectors in d dimensions lies: about ±1.96/sqrt(d).

    The cosine is distributed as 2 Beta((d-1)/2, (d-1)/2) - 1.
    """
    if not 0 < p < 1:
        raise UserError(f"p={p} must lie between 0 and 1.")
    shape = (d - 1) / 2
    chance = beta(shape, shape, loc=-1, scale=2)
    return float(chance.ppf(p / 2)), float(chance.ppf(1 - p / 2))


def mismatched_region(
    first: Float[Array, "neurons d"], second: Float[Array, "neurons d"], p: float = 0.05
) -> tuple[float, float]:
    """The same from the layer itself: quantiles p/2 and 1 - p/2 of the cosines of vectors of different neurons."""
    all_pairs = np.asarray(_unit(first) @ _unit(second).T, np.float64)
    apart = all_pairs[~np.eye(len(all_pairs), dtype=bool)]
    low, high = np.quantile(apart, [p / 2, 1 - p / 2])
    return float(low), float(high)


def model_vectors(model: PyTree) -> Mapping[str, NeuronVectors]:
    """The vectors of every MLP of this package's models, by the name of its leaf, with the scale of its norm taken in.

    Raises:
      UserError: a block's MLP is not of the dense or gated kind.
    """
    found = {}
    for layer, block in enumerate(model.blocks):
        mlp = block.mlp
        if not isinstance(mlp, MLP):
            raise UserError(f"blocks/{layer}/mlp is a {type(mlp).__name__}, which has no gate, up and down weights.")
        norm = block.mlp_norm
        scale = None if norm is None else norm.weight + norm.offset
        gate = None if mlp.gate_proj is None else mlp.gate_proj.weight
        found[f"blocks/{layer}/mlp"] = folded(gate, mlp.up_proj.weight, mlp.down_proj.weight, scale)
    return found


def _sign(cosine: Array, threshold: float) -> Array:
    return jnp.where(cosine > threshold, 1, jnp.where(cosine < -threshold, -1, 0))


def _cosine(first: Array, second: Array) -> Array:
    return jnp.sum(_unit(first) * _unit(second), axis=-1)


def _unit(rows: Array) -> Array:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
