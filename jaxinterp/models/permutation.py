"""The neurons of an MLP have no order: match those of two models, and bring one into the order of the other.

    permutation = argmax over P of sum_j  <read_A[j], read_B[P j]> + <write_A[j], write_B[P j]>

read: the columns of the gate and up matrices and their biases, write: the rows of the down matrix. Solved exactly by
the Hungarian method, layer by layer: the residual stream ties the axes between layers, so that layers do not depend on
each other. A gated MLP has one more symmetry, (W_up[:, j] c, W_down[j, :] / c): `balanced` scales both to equal norms
before matching.

Sources: weight matching, Git Re-Basin 2209.04836 (there all axes are free and layers are matched in turns).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from scipy.optimize import linear_sum_assignment

from jaxinterp.core.errors import UserError
from jaxinterp.models.mlp import MLP
from jaxinterp.models.pruning import keep_neurons
from jaxinterp.models.sites import select, sites


def neuron_vectors(mlp: PyTree) -> Float[Array, "neurons size"]:
    """One row a neuron: what it reads by each matrix (with its bias), and what it writes.

    Raises:
      UserError: it is not an MLP.
    """
    if not isinstance(mlp, MLP):
        raise UserError(f"mlp is a {type(mlp).__name__}: neurons of an MLP are matched.")
    parts = []
    for linear in (mlp.gate_proj, mlp.up_proj):
        if linear is not None:
            parts += [linear.weight.T] + ([] if linear.bias is None else [linear.bias[:, None]])
    return jnp.concatenate([*parts, mlp.down_proj.weight], axis=1)


def balanced(mlp: MLP) -> MLP:
    """The same function, up column and down row of every gated neuron with equal norms; a dense MLP as it is."""
    if mlp.gate_proj is None:
        return mlp
    up, down = mlp.up_proj, mlp.down_proj
    bias = 0.0 if up.bias is None else jnp.square(up.bias)
    reads, writes = jnp.sqrt(jnp.sum(up.weight**2, axis=0) + bias), jnp.linalg.norm(down.weight, axis=1)
    scale = jnp.where((reads > 0) & (writes > 0), jnp.sqrt(writes / jnp.where(reads > 0, reads, 1)), 1.0)
    return dataclasses.replace(
        mlp,
        up_proj=dataclasses.replace(up, weight=up.weight * scale, bias=None if up.bias is None else up.bias * scale),
        down_proj=dataclasses.replace(down, weight=down.weight / scale[:, None]),
    )


def match_neurons(
    first: Float[Array | np.ndarray, "neurons size"], second: Float[Array | np.ndarray, "_neurons _size"]
) -> tuple[Int[np.ndarray, " neurons"], Float[np.ndarray, " neurons"]]:
    """The neuron of the second for each of the first, and the cosine of the two.

    Raises:
      UserError: the two have other shapes.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise UserError(f"first has shape {first.shape}, second {second.shape}: match MLPs of one size.")
    likeness = first @ second.T
    place = linear_sum_assignment(-likeness)[1]
    sizes = np.linalg.norm(first, axis=1) * np.linalg.norm(second[place], axis=1)
    return place, likeness[np.arange(len(place)), place] / np.maximum(sizes, 1e-300)


def align(model: PyTree, reference: Any) -> tuple[Any, dict[str, float]]:
    """The model with its MLPs' neurons in the order of the reference's, and the mean cosine of each layer's matches.

    Raises:
      UserError: a leaf is not an MLP in both, or the sizes differ.
    """
    leaves = [name for name in sites(model, "**/mlp") if name.endswith("/mlp")]
    orders: dict[str, list[int]] = {}
    cosines: dict[str, float] = {}
    for name in leaves:
        own, other = (neuron_vectors(_balanced(select(each, name).get())) for each in (model, reference))
        place, cosine = match_neurons(other, own)
        orders[name], cosines[name] = place.tolist(), float(cosine.mean())
    return keep_neurons(model, orders), cosines


def _balanced(mlp: PyTree) -> PyTree:
    return balanced(mlp) if isinstance(mlp, MLP) else mlp
