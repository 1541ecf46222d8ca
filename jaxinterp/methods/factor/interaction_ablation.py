"""Nodes and edges that a network needs in a basis: how many directions, and how many connections between two layers.

    nodes    f -> (f C * keep) C+                        the first `m` directions, in the order of their importance
    edges    f̂_next,i = [F((f C * keep_i) C+) C_next]_i   output direction i sees only the inputs of its own edges
             f_next = f̂_next C_next+

The number that is needed is the smallest at which the network does as well as asked, by bisection: edges are ordered by
their strength E_ij (`interaction_basis.edges`), the strongest kept.

Source: Bushnaq et al. 2024 (arXiv 2405.10928), sections on node and edge ablation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxinterp.methods.factor.interaction_basis import Basis, Function


def with_nodes(samples: Float[Array, "batch d"], basis: Basis, keep: Float[Array, " k"]) -> Float[Array, "batch d"]:
    """The samples with only some directions kept: (f C * keep) C+."""
    return ((samples @ jnp.asarray(basis.into)) * keep) @ jnp.asarray(basis.out_of)


def with_edges(
    function: Function,
    samples: Float[Array, "batch d"],
    basis: Basis,
    next_basis: Basis | None,
    keep: Bool[Array | np.ndarray, "k_next k"],
) -> Float[Array, "batch d_next"]:
    """The next array where each of its directions sees only the directions that its edges come from.

    Args:
      function: one sample [d] to the next array [d_next].
      next_basis: None: the coordinates of the next array themselves.
      keep: True at the edges that stay, [output direction, input direction].
    """
    into, out_of = jnp.asarray(basis.into), jnp.asarray(basis.out_of)
    read = None if next_basis is None else jnp.asarray(next_basis.into)

    def column(index: Array, kept: Array) -> Array:
        after = jax.vmap(function)(((samples @ into) * kept) @ out_of)
        return after[:, index] if read is None else after @ read[:, index]

    count = keep.shape[0]
    columns = jax.lax.map(lambda each: column(*each), (jnp.arange(count), jnp.asarray(keep, samples.dtype)))
    return columns.T if next_basis is None else columns.T @ jnp.asarray(next_basis.out_of)


def strongest(strength: Float[Array | np.ndarray, "k_next k"], number: int) -> Bool[np.ndarray, "k_next k"]:
    """True at the `number` largest entries (ties: the first)."""
    flat = np.asarray(strength).ravel()
    keep = np.zeros(flat.shape, bool)
    keep[np.argsort(-flat, kind="stable")[:number]] = True
    return keep.reshape(strength.shape)


def least(most: int, enough: Callable[[int], bool]) -> int | None:
    """The smallest number in 0..most that is enough, if what is enough stays so above it; None where `most` is not."""
    if not enough(most):
        return None
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
