"""The local interaction basis: directions of an array that matter for what comes next, each on its own.

From the output backwards, for an array f [tokens, d] and the map from it to the next array, in whose basis C_next the
outputs are read:

    G  = E[f f^T] = U D U^T, D <= threshold dropped      R = Y U D^-1/2,   R+ = D^1/2 U^T Y^-1      (Y centres)
    M' = E[J^T J],  J = d(f_next C_next) / d f            M = R+ M' R+^T = V L V^T
    C  = R V L^1/2 [d, k],   C+ = L^-1/2 V^T R+ [k, d],   L sorted, L <= threshold dropped
    f̂  = f C

Identities: C+ C = I; diag(C^T G C) = L, so that a direction is as long as what follows depends on it; f̂ does not
change (up to sign) where f is rotated. `f` has a constant coordinate, its last, where biases count; `centre` then
makes the first direction the constant one and the others mean-free.

Thresholds are absolute (1e-15 for modular addition, 1e-5 else in the authors' code) or, with `relative`, in units of
the largest eigenvalue. Moments add over batches; everything after them is float64 on the host.

Source: Bushnaq et al. 2024 (arXiv 2405.10928), `basis_formula="jacobian"` of its code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch, Needs, Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Site
from jaxinterp.decompositions.directions import Directions
from jaxinterp.methods.checks import check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import Recipe, streaming_method
from jaxinterp.models.sites import select

Function = Callable[[Array], Array]
"""One token's (or one sample's) array [*axes, d] to the next array, of any shape whose last axis is d_next."""


@dataclass(frozen=True)
class LocalInteractionBasis:
    """Hyperparameters of the basis of an MLP's input by what the MLP makes of it.

    One pass: the next basis is that of the output's principal components with none dropped, a rotation, which leaves
    M' as it is. Activations are centred, which is the same as a constant coordinate that is held.
    """

    directions: int | None = None
    """How many are kept, the most important first; None: all above the threshold."""
    probes: int = 8
    """Probes of ±1 a token in place of one derivative an output."""
    threshold: float = 1e-6
    """Eigenvalues below this share of the largest are dropped."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter is out of range."""
        check_whole(self, directions=1, probes=1)
        check_positive(self, "threshold")

    def needs(self, site: Site) -> Needs:
        """The MLP's input; the output's derivative comes from the model."""
        return Needs(f"{one_leaf(site)}/in", f"{site}/in")

    def recipe(self, steps: int) -> Recipe:
        """Moments over the stream, then eigenvectors in float64."""
        return streaming_method(
            _no_moments, self._moments, self._solve, start=lambda key, sample, model: _Named(sample)
        )

    def _moments(self, given: "_Named", batch: Batch, key: PRNGKeyArray, model: PyTree) -> dict[str, Array]:
        mlp = select(model, batch.sites.leaf).get()
        x, weight = batch.inputs.astype(jnp.float32), batch.weight
        signs = jax.random.rademacher(key, (self.probes, *jax.eval_shape(mlp, x).shape), jnp.float32)
        moment = jacobian_moment_probed(mlp, x, signs * jnp.sqrt(weight)[:, None])
        return {
            "count": jnp.sum(weight),
            "mean": weight @ x,
            "gram": (weight[:, None] * x).T @ x,
            "jacobian": moment * x.shape[0],
        }

    def _solve(self, given: "_Named", sums: PyTree) -> Directions:
        count = float(sums["count"])
        mean = sums["mean"] / count
        covariance = sums["gram"] / count - np.outer(mean, mean)
        basis = interaction_basis(covariance, sums["jacobian"] / count, threshold=self.threshold, relative=True)
        kept = slice(None, self.directions)
        narrow = lambda array: jnp.asarray(array, jnp.float32)
        return Directions(
            narrow(basis.into.T[kept]),
            narrow(basis.out_of[kept]),
            narrow(basis.importance[kept]),
            narrow(mean),
            narrow(np.trace(covariance)),
            given.sites,
        )


class _Named(eqx.Module):
    """The sites, which stay fixed during the stream."""

    sites: Sites = eqx.field(static=True)

    def __init__(self, sample: Batch) -> None:
        self.sites = sample.sites


def _no_moments(sample: Batch) -> dict[str, Array]:
    d = sample.inputs.shape[1]
    return {
        "count": jnp.zeros((), jnp.float32),
        "mean": jnp.zeros(d, jnp.float32),
        "gram": jnp.zeros((d, d), jnp.float32),
        "jacobian": jnp.zeros((d, d), jnp.float32),
    }


class Basis(NamedTuple):
    """f̂ = f C; f ≈ f̂ C+. `importance` is L, largest first (a constant direction, where there is one, stands first)."""

    into: Float[np.ndarray, "d k"]
    out_of: Float[np.ndarray, "k d"]
    importance: Float[np.ndarray, " k"]


def second_moment(rows: Float[Array, "tokens d"]) -> Float[Array, "d d"]:
    """G: the mean of f f^T over tokens."""
    return rows.T @ rows / rows.shape[0]


def jacobian_moment(
    function: Function, samples: Float[Array, "batch *axes d"], next_basis: Float[Array, "d_next k"] | None = None
) -> Float[Array, "d d"]:
    """M' = the sum over outputs of J^T J, as a mean over samples and their positions. Exact: one derivative per output.

    Args:
      function: maps one sample [*axes, d] to [..., d_next].
      next_basis: C_next; None: the outputs themselves.
    """
    jacobian = jax.vmap(jax.jacrev(_read_in(function, next_basis)))(samples)
    flat = jacobian.reshape(-1, samples.shape[-1])
    return flat.T @ flat / (samples.size // samples.shape[-1])


def jacobian_moment_probed(
    function: Function,
    samples: Float[Array, "batch *axes d"],
    probes: Float[Array, "probes batch *out_axes"],
    next_basis: Float[Array, "d_next k"] | None = None,
) -> Float[Array, "d d"]:
    """M' from given probes of ±1 (Hutchinson): unbiased, one derivative per probe instead of one per output.

    M' ≈ mean over probes p of (J^T p)(J^T p)^T; probes are shaped as the outputs in the basis C_next.
    """

    def one(sample: Array, of_sample: Array) -> Array:
        _, pull = jax.vjp(_read_in(function, next_basis), sample)
        return jax.vmap(lambda probe: pull(probe)[0])(of_sample)

    pulled = jax.vmap(one, in_axes=(0, 1))(samples, probes)
    flat = pulled.reshape(-1, samples.shape[-1])
    return flat.T @ flat / (samples.size // samples.shape[-1] * probes.shape[0])


def _read_in(function: Function, next_basis: Array | None) -> Function:
    return function if next_basis is None else lambda sample: function(sample) @ next_basis


def centring(mean: Float[np.ndarray, " d"]) -> Float[np.ndarray, "d d"]:
    """Y with f Y = f - mean except in the last coordinate, which is the constant 1; centring(-mean) nearly inverts it.

    Raises:
      UserError: the last coordinate's mean is not 1.
    """
    if abs(abs(mean[-1]) - 1) > 1e-6:
        raise UserError(f"mean[-1]={mean[-1]} must be 1: centring needs a constant coordinate, as the last.")
    matrix = np.eye(len(mean))
    matrix[-1, :-1] = -mean[:-1]
    return matrix


def whitened(
    gram: Float[Array | np.ndarray, "d d"],
    *,
    mean: Float[Array | np.ndarray, " d"] | None = None,
    threshold: float = 1e-5,
    relative: bool = False,
) -> tuple[Float[np.ndarray, "d r"], Float[np.ndarray, "r d"]]:
    """(R, R+) of the module's equation.

    Args:
      gram: G; of centred activations (with the constant coordinate) where a mean is given.
      mean: of the activations, for centring; None: Y = I.
    """
    values, vectors = _eigen(np.asarray(gram, np.float64))
    if mean is not None:
        values, vectors = _constant_first(values, vectors)
    keep = values > threshold * (values.max() if relative else 1)
    root, vectors = np.sqrt(values[keep]), vectors[:, keep]
    eye = np.eye(len(vectors))
    centre = eye if mean is None else centring(np.asarray(mean, np.float64))
    back = 2 * eye - centre  # the inverse: centre - I is nilpotent
    return centre @ vectors / root, (root[:, None] * vectors.T) @ back


def interaction_basis(
    gram: Float[Array | np.ndarray, "d d"],
    jacobian: Float[Array | np.ndarray, "d d"],
    *,
    mean: Float[Array | np.ndarray, " d"] | None = None,
    threshold: float = 1e-5,
    relative: bool = False,
) -> Basis:
    """C, C+ and L of the module's equation from given moments.

    Args:
      gram: G [d, d] (centred where a mean is given).
      jacobian: M' [d, d].
      mean: given, the constant direction is the first column of C, and is neither sorted nor dropped.
      threshold: eigenvalues of G not above it, and of M below it, are dropped.
      relative: thresholds in units of the largest eigenvalue.
    Raises:
      UserError: nothing is left.
    """
    into_white, out_of_white = whitened(gram, mean=mean, threshold=threshold, relative=relative)
    moment = out_of_white @ np.asarray(jacobian, np.float64) @ out_of_white.T
    held = 0 if mean is None else 1
    values, vectors = _eigen(moment[held:, held:])
    keep = values >= threshold * (values.max() if relative and len(values) else 1)
    keep &= values > 0
    if not held and not keep.any():
        raise UserError(f"threshold={threshold} drops every direction: the largest of M is {values.max(initial=0)}.")
    rotation = np.zeros((len(moment), held + int(keep.sum())))
    rotation[:held, :held] = 1
    rotation[held:, held:] = vectors[:, keep]
    importance = np.concatenate([np.diag(moment)[:held], values[keep]])
    root = np.sqrt(np.where(importance > 0, importance, 1))
    return Basis(into_white @ rotation * root, (rotation.T @ out_of_white) / root[:, None], importance)


def principal_basis(
    gram: Float[Array | np.ndarray, "d d"],
    *,
    mean: Float[Array | np.ndarray, " d"] | None = None,
    threshold: float = 1e-5,
    relative: bool = False,
) -> Basis:
    """The baseline: C = Y U, C+ = U^T Y^-1, with eigenvalues of G as importance (PCA where a mean is given)."""
    values, vectors = _eigen(np.asarray(gram, np.float64))
    if mean is not None:
        values, vectors = _constant_first(values, vectors)
    keep = values > threshold * (values.max() if relative else 1)
    eye = np.eye(len(vectors))
    centre = eye if mean is None else centring(np.asarray(mean, np.float64))
    return Basis(centre @ vectors[:, keep], vectors[:, keep].T @ (2 * eye - centre), values[keep])


def gradient_points() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(places, weights) of the edges' integral as a single gradient at the end: what the authors' runs use."""
    return (1.0,), (1.0,)


def legendre_points(intervals: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(places, weights) of the Gauss-Legendre rule on [0, 1] with intervals + 1 points."""
    x, w = np.polynomial.legendre.leggauss(intervals + 1)
    return tuple(float(place) for place in (x + 1) / 2), tuple(float(weight) for weight in w / 2)


def trapezoid_points(intervals: int, margin: float = 1e-3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(places, weights) of the authors' trapezoidal rule: intervals + 1 even places from e to 1 - e, the first and the
    last at half weight, with e = margin / (intervals + 1); 0 intervals: the middle alone.

    Raises:
      UserError: intervals is negative.
    """
    if intervals < 0:
        raise UserError(f"intervals={intervals} must not be negative.")
    if intervals == 0:
        return (0.5,), (1.0,)
    edge = margin / (intervals + 1)
    weights = np.full(intervals + 1, 1 / intervals)
    weights[[0, -1]] /= 2
    return tuple(np.linspace(edge, 1 - edge, intervals + 1).tolist()), tuple(weights.tolist())


def edges(
    function: Function,
    samples: Float[Array, "batch *axes d"],
    basis: Basis,
    next_basis: Basis | None = None,
    points: tuple[tuple[float, ...], tuple[float, ...]] = ((1.0,), (1.0,)),
) -> Float[Array, "k_next k"]:
    """E_ij: how strongly direction j of this basis drives direction i of the next.

    E_ij = mean over samples and positions of sum_t [sum_s integral over a in [0, 1] of d f̂_next,i^t(a f̂) / d (a f̂_j^s)
    * f̂_j^s]^2, with the integral replaced by `points` = (places, weights).
    """
    into, out_of = jnp.asarray(basis.into, samples.dtype), jnp.asarray(basis.out_of, samples.dtype)
    following = None if next_basis is None else jnp.asarray(next_basis.into, samples.dtype)
    inner = _read_in(lambda coordinates: function(coordinates @ out_of), following)

    def one(sample: Array) -> Array:
        coordinates = sample @ into
        shares = jnp.zeros((), jnp.float32)
        for place, weight in zip(*points, strict=True):
            jacobian = jax.jacrev(inner)(place * coordinates)  # [*out_axes, k_next, *axes, k]
            product = jacobian * coordinates
            shares = shares + weight * product
        outputs = jax.eval_shape(inner, coordinates).shape
        shares = shares.reshape(*outputs, -1, coordinates.shape[-1]).sum(axis=-2)
        return jnp.sum(shares.reshape(-1, outputs[-1], coordinates.shape[-1]) ** 2, axis=0)

    positions = samples.size // samples.shape[-1]
    return jnp.sum(jax.vmap(one)(samples), axis=0) / positions


def purity(directions: Float[np.ndarray, "d k"], blocks: Float[np.ndarray, "blocks d"]) -> float:
    """How pure directions are: the mean over columns of the largest share of one block in its squared entries.

    Args:
      blocks: row b is 1 at the coordinates of block b and 0 elsewhere; they need not cover all coordinates.
    """
    shares = blocks @ directions**2
    return float((shares.max(axis=0) / np.maximum(shares.sum(axis=0), 1e-300)).mean())


def _eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues by size, largest first (a rounding below 0 counts as its size), and eigenvectors as columns."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    order = np.argsort(-np.abs(values), kind="stable")
    return np.abs(values)[order], vectors[:, order]


def _constant_first(values: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvector along the constant coordinate moved to the front.

    Raises:
      UserError: there is not exactly one: G is not of centred activations.
    """
    constant = np.flatnonzero((np.abs(vectors[-1]) > 1e-6) & (values > 1e-6))
    if len(constant) != 1:
        raise UserError(
            f"{len(constant)} directions have a part of the constant coordinate: centre the activations (all but the "
            "last coordinate) before their second moment is taken."
        )
    order = [constant[0], *(i for i in range(len(values)) if i != constant[0])]
    return values[order], vectors[:, order]
