"""Which neurons, channels or weights may be left out: scores, selectors, fills, and one operation on top.

    masked(a, mask, fill) = where(mask, a, fill)

Weights are `(d_in, d_out)`: the norm that papers take of a column of W is the norm of a row here. A score is large for
what should be kept. Ties: `top_k` keeps exactly k, the lower index first; thresholds are strict (score > t).

Sources (arXiv): TEAL 2408.14690, WINA 2505.19427, CATS 2404.08763, CHESS 2409.01366, R-Sparse 2504.19449,
Wanda 2306.11695, DaSS 2405.01943, AMP 2504.21174, MAW (later PPM) 2512.22671.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxinterp.core.errors import UserError

Values = Float[Array | np.ndarray, "*batch d"]
Weight = Float[Array | np.ndarray, "d_in d_out"]
Vector = Float[Array | np.ndarray, "d"]


def check_not_negative(name: str, statistic: Array | np.ndarray) -> None:
    """Raises UserError if a norm or a mean square has a negative or undefined entry; traced arrays pass."""
    if isinstance(statistic, jax.core.Tracer):
        return
    wrong = np.argwhere(~(np.asarray(statistic) >= 0))
    if len(wrong):
        place = tuple(int(index) for index in wrong[0])
        value = np.asarray(statistic)[place]
        raise UserError(f"{name}{list(place)}={value} must be at least 0: give a mean square or a norm over tokens.")


def row_norms(weight: Weight) -> Float[Array, " d_in"]:
    """c_j = |W[j, :]|_2, `[d_in]`."""
    return jnp.linalg.norm(jnp.asarray(weight), axis=1)


def magnitude(a: Values) -> Float[Array, "*batch d"]:
    """|a|: TEAL's score, and that of CATS where `a` is silu(gate)."""
    return jnp.abs(jnp.asarray(a))


def wina(a: Float[Array | np.ndarray, "*batch d_in"], weight: Weight) -> Float[Array, "*batch d_in"]:
    """|a_j| |W[j, :]|: WINA; at an MLP's hidden layer with W = W_down it is the neuron norm of CETT."""
    return jnp.abs(jnp.asarray(a)) * row_norms(weight)


def chess(s: Values, mean_square_u: Vector) -> Float[Array, "*batch d"]:
    """|s_j| sqrt(E[u_j^2]): CHESS, s = silu(gate), u = the up projection's output; no row norm, as published.

    Raises:
      UserError: a mean square is negative.
    """
    check_not_negative("mean_square_u", mean_square_u)
    return jnp.abs(jnp.asarray(s)) * jnp.sqrt(jnp.asarray(mean_square_u))


def wanda(weight: Weight, norms: Float[Array | np.ndarray, " d_in"]) -> Float[Array, "d_in d_out"]:
    """|W_ji| |X_j|_2 with `norms` over the calibration tokens; compare within an output (axis 0).

    Raises:
      UserError: a norm is negative.
    """
    check_not_negative("norms", norms)
    return jnp.abs(jnp.asarray(weight)) * jnp.asarray(norms)[:, None]


def dass(weight: Weight, norms: Float[Array | np.ndarray, " d_out"]) -> Float[Array, "d_in d_out"]:
    """|W_ji| |a_i|_2^0.5 of a gate or up matrix, a the hidden activation; compare within an input (axis 1).

    Raises:
      UserError: a norm is negative.
    """
    check_not_negative("norms", norms)
    return jnp.abs(jnp.asarray(weight)) * jnp.sqrt(jnp.asarray(norms))[None, :]


def amp(a: Float[Array | np.ndarray, "tokens d"]) -> Float[Array, " d"]:
    """E_tokens |a_j|: AMP's neuron score."""
    return jnp.abs(jnp.asarray(a)).mean(axis=0)


def peak_to_peak(gate: Weight, up: Weight) -> Float[Array, " d_out"]:
    """max_i W_ij + |min_i W_ij| summed over gate and up: MAW, later renamed PPM; blind to W_down and to data."""
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    return sum((w.max(0) + jnp.abs(w.min(0)) for w in (gate, up)), jnp.zeros(gate.shape[1], gate.dtype))


def top_k(score: Values, k: int) -> Bool[Array, "*batch d"]:
    """True for the k largest of the last axis, exactly k a row.

    Raises:
      UserError: k is negative or above the length of the axis.
    """
    d = score.shape[-1]
    if not 0 <= k <= d:
        raise UserError(f"k={k} must lie in 0 to {d}, the number of scores in a row.")
    order = jnp.argsort(-jnp.asarray(score), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < k


def n_of_m(score: Values, n: int, m: int) -> Bool[Array, "*batch d"]:
    """True for the n largest of every m consecutive scores of the last axis.

    Raises:
      UserError: m does not divide the axis, or n is not in 0 to m.
    """
    d = score.shape[-1]
    if m < 1 or d % m:
        raise UserError(f"m={m} must be positive and divide {d}, the number of scores in a row.")
    if not 0 <= n <= m:
        raise UserError(f"n={n} must lie in 0 to m={m}.")
    return top_k(jnp.asarray(score).reshape(*score.shape[:-1], d // m, m), n).reshape(score.shape)


def above(score: Values, threshold: float | Float[Array | np.ndarray, "..."]) -> Bool[Array, "*batch d"]:
    """score > threshold, one number or one a channel."""
    return jnp.asarray(score) > threshold


def batch_top_k(score: Values, per_row: int) -> Bool[Array, "*batch d"]:
    """True for the per_row x rows largest of the whole array."""
    rows = score.size // score.shape[-1]
    return top_k(jnp.asarray(score).reshape(-1), per_row * rows).reshape(score.shape)


def masked(
    a: Values, mask: Bool[Array | np.ndarray, "*batch d"], fill: Float[Array | np.ndarray, "..."] | float = 0.0
) -> Values:
    """where(mask, a, fill); the fill is a number, a mean `[d]`, or another run's array."""
    return jnp.where(mask, jnp.asarray(a), fill)


def r_sparse(
    x: Float[Array | np.ndarray, "*batch d_in"],
    weight: Weight,
    mask: Bool[Array | np.ndarray, "*batch d_in"],
    rank: int,
) -> Float[Array, "*batch d_out"]:
    """(x m) W + (x (1 - m)) W_r, W_r the best approximation of that rank; exact at full rank.

    Raises:
      UserError: the rank is negative or above the smaller side of the weight.
    """
    if not 0 <= rank <= min(weight.shape):
        raise UserError(f"rank={rank} must lie in 0 to {min(weight.shape)}, the smaller side of the weight.")
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    u, s, v = jnp.linalg.svd(weight, full_matrices=False)
    kept, left = jnp.asarray(masked(x, mask)), jnp.asarray(masked(x, ~mask))
    return kept @ weight + (left @ (u[:, :rank] * s[:rank])) @ v[:rank]


class KeepOnly(eqx.Module):
    """An edit of `run`: keep the k largest |a_j| scale_j of each token, put `fill` in place of the rest.

    Example:
      run(model, tokens, edits={"blocks/0/mlp/hidden": KeepOnly(8, row_norms(w_down))})
    """

    k: int = eqx.field(static=True)
    scale: Float[Array, " d"] | float = 1.0
    fill: Float[Array, " d"] | float = 0.0

    def __call__(self, a: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """The array with all but the k highest scores of each row filled."""
        return jnp.asarray(masked(a, top_k(jnp.abs(a) * self.scale, self.k), self.fill))
