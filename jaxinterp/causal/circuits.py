"""Sparse feature circuits: which nodes a behaviour needs, and how much of it the rest can do.

A node is an entry along the last axis of an array (a feature of `mlp/codes`, a neuron of `mlp/hidden`), at every
position or at each; an *error* array (`mlp/error`) is one node, its effect contracted over the last axis.

    effect of a node       mean over prompts of M(run with the node ablated) - M(run), exact or estimated
    circuit                the nodes with |effect| >= threshold, or the n largest
    m(C)                   mean M with every node outside C at its ablation value (`fills`)
    faithfulness(C)        (m(C) - m(nothing)) / (m(model) - m(nothing))          a ratio of means; may exceed 1
    completeness(C)        the same ratio for the complement of C; 0 where C holds everything that matters

Where two nodes do the same work, C may be faithful without one of them; completeness shows it. What to do with errors
is what you pass: in `fills` and scored they are nodes; left out of `fills` they always stay; in `fills` and out of
every circuit they are removed.

Source: Marks et al. 2024, arXiv 2403.19647, sections 3 and 4.
"""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.causal.measure import Metric
from jaxinterp.causal.patch import Patch, array_shapes
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Edit
from jaxinterp.models.run import run

Circuit = dict[str, Array]
"""By array name, which nodes are in: Bool, `[nodes]` or `[seq, nodes]`; of an error array `[1]` or `[seq, 1]`."""


def node_effects(
    estimates: Mapping[str, Array], *, errors: tuple[str, ...] = (), positions: bool = False
) -> dict[str, Float[Array, "batch ..."]]:
    """Effects of nodes from estimates in the shape of the arrays, prompt by prompt.

    Args:
      estimates: by array name `[batch, seq, ..., d]`, from `attribute` or, per node, from `patch_effects`.
      errors: names of arrays that are one node (a position).
      positions: a node for every position; default: summed over positions.
    Raises:
      UserError: an array has no axis of positions or of nodes.
    """
    found = {}
    for name, value in estimates.items():
        if value.ndim < 3:
            raise UserError(
                f"estimates[{name!r}] has shape {value.shape}: give [batch, seq, ..., d], from `attribute` or from "
                "patch_effects(..., each=(1, 2))."
            )
        if name in errors:
            value = jnp.sum(value, axis=-1, keepdims=True)
        value = value.reshape(*value.shape[:2], -1)
        found[name] = value if positions else jnp.sum(value, axis=1)
    return found


def select_nodes(
    effects: Mapping[str, Array | np.ndarray], *, threshold: float | None = None, top: int | None = None
) -> Circuit:
    """The circuit of the nodes whose mean effect over prompts is large: |mean| >= threshold, or the `top` largest.

    Args:
      effects: by array name `[batch, *nodes]`, from `node_effects`.

    Equal effects at the end of `top` are taken in the order of names and indices.

    Raises:
      UserError: neither or both of threshold and top are given, or one is negative or not a number.
    """
    if (threshold is None) == (top is None):
        raise UserError(f"threshold={threshold} and top={top}: give one of the two.")
    given = top if threshold is None else threshold
    if given is None or not given >= 0 or (top is not None and top != int(top)):
        raise UserError(f"threshold={threshold}, top={top}: must be 0 or positive, top a whole number.")
    means = {name: np.abs(np.asarray(value).mean(axis=0)) for name, value in effects.items()}
    if threshold is not None:
        return {name: jnp.asarray(mean >= threshold) for name, mean in means.items()}
    flat = np.concatenate([mean.reshape(-1) for mean in means.values()])
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[:top]] = True
    return _cut(kept, means)


def circuit_size(circuit: Circuit) -> int:
    """How many nodes a circuit has."""
    return sum(int(np.sum(np.asarray(mask))) for mask in circuit.values())


def complement(circuit: Circuit) -> Circuit:
    """The nodes that are not in the circuit."""
    return {name: jnp.asarray(~np.asarray(mask)) for name, mask in circuit.items()}


def random_circuit(circuit: Circuit, seed: int) -> Circuit:
    """A random circuit with as many nodes in every array: the control."""
    draw = np.random.default_rng(seed)
    masks = {name: np.asarray(mask) for name, mask in circuit.items()}
    return {name: jnp.asarray(draw.permutation(mask.reshape(-1)).reshape(mask.shape)) for name, mask in masks.items()}


def circuit_metric(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    circuit: Circuit,
    fills: Mapping[str, Array],
    *,
    where: Bool[Array, "..."] | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> Float[Array, " batch"]:
    """The metric of every prompt with all nodes outside the circuit at their ablation value.

    Args:
      circuit: by array name, which nodes stay; every name needs a fill.
      fills: by array name, the ablation value, broadcast to the array.
      where: [batch or 1, seq], positions where nodes are ablated; default: all.
    Raises:
      UserError: a name without a fill, or a mask that does not fit its array.
    """
    for name in circuit:
        if name not in fills:
            raise UserError(f"the circuit has nodes of {name!r}, but fills has no ablation value for it.")
    shapes = array_shapes(model, tokens, {name: fills[name] for name in circuit}, metric, edits)
    for name, mask in circuit.items():
        shape = shapes[name]
        nodes = int(np.prod(shape[2:]))
        if mask.shape[-1] not in (1, nodes) or mask.ndim > 2 or (mask.ndim == 2 and mask.shape[0] != shape[1]):
            raise UserError(f"the mask at {name!r} has shape {mask.shape}: the array {shape} needs [{nodes}] or [1].")
    return _circuit_metric(model, tokens, metric, dict(circuit), dict(fills), where, dict(edits or {}))


@eqx.filter_jit
def _circuit_metric(
    model: PyTree,
    tokens: Array,
    metric: Metric,
    circuit: Circuit,
    fills: Mapping[str, Array],
    where: Array | None,
    edits: dict[str, Edit],
) -> Array:
    ablations = {}
    for name, mask in circuit.items():
        ablations[name] = _Ablate(mask, fills[name], where)
    return metric(run(model, tokens, edits={**edits, **ablations}))


class _Ablate(eqx.Module):
    mask: Array
    fill: Array
    where: Array | None

    def __call__(self, x: Array) -> Array:
        stays = self.mask if self.mask.ndim == 2 else self.mask[None]
        if stays.shape[1] > 1:
            stays = stays.reshape(stays.shape[0], *x.shape[2:])
        else:
            stays = stays.reshape(stays.shape[0], *(1,) * (x.ndim - 2))
        out = ~stays[None]
        if self.where is not None:
            out = out & self.where.reshape(*self.where.shape, *(1,) * (x.ndim - 2))
        return Patch(self.fill, out)(x)


class Faithfulness(NamedTuple):
    """Means over prompts: m(C), m(complement of C), m(model), m(nothing); and the two ratios."""

    circuit: float
    complement: float
    model: float
    empty: float
    faithfulness: float
    completeness: float


def faithfulness(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    circuit: Circuit,
    fills: Mapping[str, Array],
    *,
    where: Bool[Array, "..."] | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> Faithfulness:
    """How much of the metric a circuit, and its complement, give back; see the module's docstring.

    Raises:
      UserError: as `circuit_metric`; or the metric is the same with and without all nodes: the ratio has no meaning.
    """
    nothing = {name: jnp.zeros(mask.shape, bool) for name, mask in circuit.items()}

    def mean(circuit: Circuit) -> float:
        return float(jnp.mean(circuit_metric(model, tokens, metric, circuit, fills, where=where, edits=edits)))

    of_circuit, of_rest, of_nothing = mean(circuit), mean(complement(circuit)), mean(nothing)
    of_model = mean(complement(nothing))
    span = of_model - of_nothing
    if abs(span) <= 1e-9 * max(abs(of_model), abs(of_nothing), 1e-30):
        raise UserError(f"ablating every node leaves the metric at {of_model:.4g}: these nodes do not carry it.")
    return Faithfulness(
        of_circuit, of_rest, of_model, of_nothing, (of_circuit - of_nothing) / span, (of_rest - of_nothing) / span
    )


def overlap(a: Circuit, b: Circuit) -> dict[str, float]:
    """`jaccard` |a and b| / |a or b|, and `share` |a and b| / |a|, over the nodes of both circuits.

    Raises:
      UserError: the circuits have nodes of different arrays.
    """
    if set(a) != set(b):
        raise UserError(f"the circuits have nodes of different arrays: {sorted(set(a) ^ set(b))[:3]}.")
    both = sum(int(np.sum(np.asarray(a[name]) & np.asarray(b[name]))) for name in a)
    either = sum(int(np.sum(np.asarray(a[name]) | np.asarray(b[name]))) for name in a)
    return {"jaccard": both / max(either, 1), "share": both / max(circuit_size(a), 1)}


def stability(
    effects: Mapping[str, Array | np.ndarray],
    *,
    threshold: float | None = None,
    top: int | None = None,
    resamples: int = 100,
    seed: int = 0,
) -> Float[np.ndarray, " resamples"]:
    """Jaccard overlap of the circuit with that of prompts drawn again with replacement, one number a draw.

    Args:
      effects: by array name `[batch, *nodes]`, from `node_effects`.
    """
    effects = {name: np.asarray(value) for name, value in effects.items()}
    whole = select_nodes(effects, threshold=threshold, top=top)
    batch = next(iter(effects.values())).shape[0]
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        rows = draw.integers(0, batch, batch)
        again = select_nodes({name: value[rows] for name, value in effects.items()}, threshold=threshold, top=top)
        found.append(overlap(whole, again)["jaccard"])
    return np.asarray(found)


def _cut(kept: np.ndarray, shapes: Mapping[str, np.ndarray]) -> Circuit:
    circuit, start = {}, 0
    for name, like in shapes.items():
        circuit[name] = jnp.asarray(kept[start : start + like.size].reshape(like.shape))
        start += like.size
    return circuit
