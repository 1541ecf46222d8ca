"""Bilinear spectra: a bilinear MLP is a symmetric third-order tensor, and its eigenvectors are its features.

    g(x) = ((x L) * (x R)) P                      L, R [d, hidden], P [hidden, d_out]: gate, up and down projection
    u . g(x) = x^T Q_u x = sum_i lambda_i (v_i . x)^2
    Q_u = (L diag(P u) R^T + R diag(P u) L^T) / 2

Only the symmetric part acts, so that swapping L and R, or scaling (a L, R / a), changes nothing. Eigenvectors are in
rows, ordered by |lambda|, and have length 1; the sign of each is arbitrary. (The authors return ascending eigenvalues
and eigenvectors times the embedding.)

Without an output basis, the higher-order SVD finds one: g_o(x) = sum_r U_ro s_r x^T Q_r x with orthonormal U_r and Q_r.
It needs the d_out x d_out Gram matrix P^T ((L^T L * R^T R + L^T R * R^T L) / 2) P only; the d^2 x d_out tensor is never
built.

Biases: `with_bias` appends them as a row, for inputs with a constant 1 appended. A norm in front of the MLP is not part
of the tensor.

Source: Pearce, Dooms, Rigg, Oramas, Sharkey 2024 (arXiv 2410.08417), sections 3 and 4.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Spectrum(NamedTuple):
    """Eigenvalues of an interaction matrix by falling size, and the unit eigenvectors, one a row."""

    values: Float[Array, " d"]
    vectors: Float[Array, "d d"]


class HigherOrderSVD(NamedTuple):
    """g_o(x) = sum_r directions[r, o] * sizes[r] * x^T matrices[r] x, by falling size."""

    directions: Float[Array, "r d_out"]
    sizes: Float[Array, " r"]
    matrices: Float[Array, "r d d"]


def bilinear(
    x: Float[Array, "*axes d"],
    left: Float[Array, "d hidden"],
    right: Float[Array, "d hidden"],
    down: Float[Array, "hidden d_out"],
) -> Float[Array, "*axes d_out"]:
    """The layer itself: ((x L) * (x R)) P."""
    return ((x @ left) * (x @ right)) @ down


def interaction_matrix(
    left: Float[Array, "d hidden"],
    right: Float[Array, "d hidden"],
    down: Float[Array, "hidden d_out"],
    direction: Float[Array, " d_out"],
) -> Float[Array, "d d"]:
    """Q_u, symmetric: u . g(x) = x^T Q_u x.

    Example: AND of two inputs, left = [[1], [0]], right = [[0], [1]], gives [[0, 1/2], [1/2, 0]].
    """
    half = (left * (down @ direction)) @ right.T
    return (half + half.T) / 2


def interaction_tensor(
    left: Float[Array, "d hidden"], right: Float[Array, "d hidden"], down: Float[Array, "hidden d_out"]
) -> Float[Array, "d_out d d"]:
    """All interaction matrices, one an output: for small layers (d^2 d_out numbers)."""
    tensor = jnp.einsum("ih,jh,ho->oij", left, right, down)
    return (tensor + jnp.swapaxes(tensor, 1, 2)) / 2


def with_bias(weight: Float[Array, "d hidden"], bias: Float[Array, " hidden"]) -> Float[Array, "d+1 hidden"]:
    """The matrix that reads (x, 1) and gives x W + b."""
    return jnp.concatenate([weight, bias[None]])


def spectrum(matrix: Float[Array, "d d"]) -> Spectrum:
    """Eigenvalues and eigenvectors of a symmetric matrix, the largest |eigenvalue| first."""
    values, columns = jnp.linalg.eigh(matrix)
    order = jnp.argsort(-jnp.abs(values))
    return Spectrum(values[order], columns[:, order].T)


def eigen_terms(x: Float[Array, "*axes d"], found: Spectrum) -> Float[Array, "*axes d"]:
    """lambda_i (v_i . x)^2 for every i: their sum is u . g(x)."""
    return found.values * (x @ found.vectors.T) ** 2


def truncated(found: Spectrum, rank: int) -> Float[Array, "d d"]:
    """The matrix of the `rank` largest |eigenvalues|: the best approximation of Q of that rank."""
    vectors = found.vectors[:rank]
    return (vectors.T * found.values[:rank]) @ vectors


def effective_rank(values: Float[Array, "*axes d"]) -> Float[Array, "*axes"]:
    """(sum |lambda| / sqrt(sum lambda^2))^2: n for n eigenvalues of equal size, 1 for a single one."""
    return (jnp.sum(jnp.abs(values), axis=-1) / jnp.linalg.norm(values, axis=-1)) ** 2


def inner_product(
    first: tuple[Float[Array, "d hidden"], Float[Array, "d hidden"], Float[Array, "hidden d_out"]],
    second: tuple[Float[Array, "d other"], Float[Array, "d other"], Float[Array, "other d_out"]],
) -> Float[Array, ""]:
    """The inner product of the symmetric tensors of two layers (L, R, P), which are never built.

    Divided by both norms it is the similarity that a low-rank layer is fitted by.
    """
    (l1, r1, p1), (l2, r2, p2) = first, second
    return jnp.sum((p1 @ p2.T) * ((l1.T @ l2) * (r1.T @ r2) + (l1.T @ r2) * (r1.T @ l2)) / 2)


def output_gram(
    left: Float[Array, "d hidden"], right: Float[Array, "d hidden"], down: Float[Array, "hidden d_out"]
) -> Float[Array, "d_out d_out"]:
    """The inner products of the symmetric interaction matrices of every pair of outputs."""
    cross = left.T @ right
    return down.T @ (((left.T @ left) * (right.T @ right) + cross * cross.T) / 2) @ down


def higher_order_svd(
    left: Float[Array, "d hidden"], right: Float[Array, "d hidden"], down: Float[Array, "hidden d_out"], rank: int
) -> HigherOrderSVD:
    """The `rank` output directions that carry most of the tensor, and an interaction matrix for each.

    Directions whose size is 0 have interaction matrix 0.
    """
    squares, columns = jnp.linalg.eigh(output_gram(left, right, down))
    directions = columns[:, ::-1][:, :rank].T
    sizes = jnp.sqrt(jnp.maximum(squares[::-1][:rank], 0))
    matrices = jnp.stack([interaction_matrix(left, right, down, direction) for direction in directions])
    safe = jnp.where(sizes > 0, sizes, 1)
    return HigherOrderSVD(directions, sizes, jnp.where(sizes > 0, 1 / safe, 0)[:, None, None] * matrices)


def between_features(
    matrix: Float[Array, "d d"], features: Float[Array, "features d"]
) -> Float[Array, "features features"]:
    """D Q D^T: how pairs of features interact, for x = codes @ D with one write vector a row of D."""
    return features @ matrix @ features.T


def adversarial_input(
    x: Float[Array, "*axes d"],
    vector: Float[Array, " d"],
    strength: float | int,
    *,
    against: Float[Array, "n d"] | None = None,
    mask: Float[Array, " d"] | None = None,
) -> Float[Array, "*axes d"]:
    """x + strength * v / |v|, v an eigenvector made orthogonal to `against` and cut to the coordinates of `mask`."""
    if against is not None:
        basis, _ = jnp.linalg.qr(against.T)
        vector = vector - basis @ (basis.T @ vector)
    if mask is not None:
        vector = vector * mask
    return x + strength * vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)
