"""Which neurons, channels or weights may be left out: scores, selectors, fills, and one operation on top.

    masked(a, mask, fill) = where(mask, a, fill)

Weights are `(d_in, d_out)`: the norm that papers take of a column of W is the norm of a row here. A score is large for
what should be kept. Ties: `top_k` keeps exactly k, the lower index first; thresholds are strict (score > t). A score
that is NaN is kept by every selector, first of all, so that it shows in the output.

Sources (arXiv): TEAL 2408.14690, WINA 2505.19427, CATS 2404.08763, CHESS 2409.01366, R-Sparse 2504.19449,
CoreInfer 2410.18311, Wanda 2306.11695, DaSS 2405.01943, AMP 2504.21174, MAW (later PPM) 2512.22671.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError

Values = Float[Array | np.ndarray, "*batch d"]
Scores = Float[Array | np.ndarray, "*batch d"] | Int[Array | np.ndarray, "*batch d"]
Mask = Bool[Array | np.ndarray, "*batch d"]
Weight = Float[Array | np.ndarray, "d_in d_out"]
Vector = Float[Array | np.ndarray, "d"]
Count = int | Int[Array, ""]


def check_not_negative(name: str, statistic: Array | np.ndarray) -> None:
    """Raises UserError if a norm or a mean square has a negative or undefined entry; traced arrays pass."""
    if isinstance(statistic, jax.core.Tracer):
        return
    wrong = np.argwhere(~(np.asarray(statistic) >= 0))
    if len(wrong):
        place = tuple(int(index) for index in wrong[0])
        value = np.asarray(statistic)[place]
        raise UserError(f"{name}{list(place)}={value} must be at least 0: give a mean square or a norm over tokens.")


# Scores of activations, one a token and channel


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


def chess_thresholds(importance: float, mean_square_u: Vector) -> Float[Array, " d"]:
    """t_j = sqrt(T / E[u_j^2]) for |s_j| > t_j, where T is the least importance s_j^2 E[u_j^2] that is kept.

    Raises:
      UserError: T or a mean square is negative.
    """
    check_not_negative("importance", np.asarray([importance]))
    check_not_negative("mean_square_u", mean_square_u)
    return jnp.sqrt(importance / jnp.asarray(mean_square_u))


def gradient_effect(
    a: Values, gradient: Values, fill: Float[Array | np.ndarray, "..."] | float = 0.0
) -> Float[Array, "*batch d"]:
    """|(fill - a) dL/da|: the first-order change of the loss when the fill is put in place of a."""
    return jnp.abs((fill - jnp.asarray(a)) * jnp.asarray(gradient))


# Scores of neurons and heads, one each


def amp(a: Float[Array | np.ndarray, "tokens d"]) -> Float[Array, " d"]:
    """E_tokens |a_j|: AMP's neuron score."""
    return jnp.abs(jnp.asarray(a)).mean(axis=0)


def amp_heads(
    z: Float[Array | np.ndarray, "tokens heads head_dim"], weight: Float[Array | np.ndarray, "heads*head_dim d"]
) -> Float[Array, " heads"]:
    """E_tokens |z_h W_O[h]|_1: AMP's head score; W_O `(heads * head_dim, d)`, the rows of a head next to each other."""
    z = jnp.asarray(z)
    by_head = jnp.asarray(weight).reshape(z.shape[1], z.shape[2], -1)
    return jnp.abs(jnp.einsum("thc,hcd->thd", z, by_head)).sum(-1).mean(0)


def peak_to_peak(gate: Weight, up: Weight) -> Float[Array, " d_out"]:
    """max_i W_ij + |min_i W_ij| summed over gate and up: MAW, later renamed PPM; blind to W_down and to data."""
    gate, up = jnp.asarray(gate), jnp.asarray(up)
    return sum((w.max(0) + jnp.abs(w.min(0)) for w in (gate, up)), jnp.zeros(gate.shape[1], gate.dtype))


def core_counts(
    a: Float[Array | np.ndarray, "tokens d"], share: float, weight: Float[Array | np.ndarray, " tokens"] | None = None
) -> Float[Array, " d"]:
    """In how many tokens a neuron is in the core: CoreInfer.

    A token's core are its k largest values (signed), k = int(share * positives / tokens), positives over all tokens.

    Args:
      weight: 0 for tokens that do not count.
    Raises:
      UserError: share is not in 0 to 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"share={share} must lie in 0 to 1.")
    a = jnp.asarray(a)
    counts = jnp.ones(a.shape[0], a.dtype) if weight is None else jnp.asarray(weight)
    positives = jnp.sum((a > 0) * counts[:, None]) / jnp.maximum(jnp.sum(counts), 1)
    core = top_k(a, jnp.floor(share * positives).astype(jnp.int32))
    return jnp.sum(core * counts[:, None], axis=0)


# Scores of weights


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


def block_norms(weight: Weight, block: tuple[int, int]) -> Float[Array, "rows columns"]:
    """S_IJ = |W_IJ|_F of every block of `block` rows and columns: BLaST's score, `[d_in / b0, d_out / b1]`.

    Raises:
      UserError: the block does not divide the matrix.
    """
    return jnp.sqrt(jnp.sum(jnp.square(_blocks(jnp.asarray(weight), block)), axis=(1, 3)))


# Selectors: scores -> what is kept


def top_k(score: Scores, k: Count) -> Bool[Array, "*batch d"]:
    """True for the k largest of the last axis, exactly k a row; k may be traced.

    Bisects over the bits of the numbers: no sort, and nothing but counts cross devices where the axis is spread.

    Raises:
      UserError: k is negative or above the length of the axis.
    """
    d = score.shape[-1]
    if isinstance(k, int) and not 0 <= k <= d:
        raise UserError(f"k={k} must lie in 0 to {d}, the number of scores in a row.")
    return _largest(jnp.asarray(score), jnp.asarray(k))


def n_of_m(score: Scores, n: int, m: int) -> Bool[Array, "*batch d"]:
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


def above(score: Scores, threshold: float | Float[Array | np.ndarray, "..."]) -> Bool[Array, "*batch d"]:
    """score > threshold, one number or one a channel."""
    return ~(jnp.asarray(score) <= threshold)


def batch_top_k(score: Scores, per_row: Count) -> Bool[Array, "*batch d"]:
    """True for the per_row x rows largest of the whole array."""
    rows = score.size // score.shape[-1]
    return top_k(jnp.asarray(score).reshape(-1), per_row * rows).reshape(score.shape)


def above_quantile(score: Scores, sparsity: float) -> Bool[Array, "*batch d"]:
    """True above the quantile `sparsity` of the whole array (linear interpolation): that share is left out.

    Raises:
      UserError: the sparsity is not in 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity={sparsity} must lie in 0 to 1.")
    return above(score, jnp.nanquantile(jnp.asarray(score), sparsity))


def block_top_k(weight: Weight, block: tuple[int, int], k: int) -> Bool[Array, "d_in d_out"]:
    """True in the k blocks of largest `block_norms` of the whole matrix.

    Raises:
      UserError: the block does not divide the matrix, or k is not in 0 to the number of blocks.
    """
    norms = block_norms(weight, block)
    return spread_blocks(top_k(norms.reshape(-1), k).reshape(norms.shape), block)


def spread_blocks(mask: Bool[Array | np.ndarray, "rows columns"], block: tuple[int, int]) -> Bool[Array, "d_in d_out"]:
    """A mask of blocks as a mask of weights."""
    return jnp.repeat(jnp.repeat(jnp.asarray(mask), block[0], axis=0), block[1], axis=1)


def forced(mask: Mask, on: tuple[int, ...] = (), off: tuple[int, ...] = ()) -> Bool[Array, "*batch d"]:
    """The mask with some channels always kept and others never.

    Raises:
      UserError: a channel does not exist, or is both on and off.
    """
    d = mask.shape[-1]
    for name, channels in (("on", on), ("off", off)):
        for channel in channels:
            if not 0 <= channel < d:
                raise UserError(f"{name} has channel {channel}, but there are {d}.")
    if both := sorted(set(on) & set(off)):
        raise UserError(f"channel {both[0]} is in both `on` and `off`: leave it out of one.")
    kept, left = (np.isin(np.arange(d), channels) for channels in (on, off))
    return (jnp.asarray(mask) | kept) & ~left


# Fills


def masked(a: Values, mask: Mask, fill: Float[Array | np.ndarray, "..."] | float = 0.0) -> Float[Array, "*batch d"]:
    """where(mask, a, fill); the fill is a number, a mean `[d]`, or another run's array."""
    return jnp.where(mask, jnp.asarray(a), fill)


def low_rank_basis(weight: Weight, rank: int) -> Float[Array, "d_in rank"]:
    """U_r, the first left singular vectors of W: U_r U_r^T W is the best approximation of W of that rank.

    Raises:
      UserError: the rank is negative or above the smaller side of the weight.
    """
    if not 0 <= rank <= min(weight.shape):
        raise UserError(f"rank={rank} must lie in 0 to {min(weight.shape)}, the smaller side of the weight.")
    return jnp.linalg.svd(jnp.asarray(weight), full_matrices=False)[0][:, :rank]


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
    basis = low_rank_basis(weight, rank)
    kept, left = masked(x, jnp.asarray(mask)), masked(x, ~jnp.asarray(mask))
    return (kept + (left @ basis) @ basis.T) @ jnp.asarray(weight)


def _blocks(weight: Array, block: tuple[int, int]) -> Array:
    """[d_in, d_out] -> [rows, b0, columns, b1]."""
    for side, (size, length) in enumerate(zip(block, weight.shape, strict=True)):
        if size < 1 or length % size:
            raise UserError(f"block[{side}]={size} must be positive and divide {length}, that side of the weight.")
    return weight.reshape(weight.shape[0] // block[0], block[0], weight.shape[1] // block[1], block[1])


def _in_order(score: Array) -> Array:
    """Unsigned integers in the order of the numbers, NaN above all; both zeros are one."""
    if not jnp.issubdtype(score.dtype, jnp.floating):
        score = score.astype(jnp.float32)
    wide = score.astype(jnp.promote_types(score.dtype, jnp.float32)) + 0.0
    kind = jnp.uint64 if wide.dtype == jnp.float64 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(jnp.where(wide == 0, jnp.zeros((), wide.dtype), wide), kind)
    top = jnp.left_shift(jnp.ones((), kind), jnp.asarray(jnp.iinfo(kind).bits - 1, kind))
    keys = jnp.where(bits & top, ~bits, bits | top)
    return jnp.where(jnp.isnan(wide), jnp.asarray(jnp.iinfo(kind).max, kind), keys)


@jax.jit
def _largest(score: Array, k: Array) -> Array:
    """`top_k`: the k-th largest key, found from its highest bit on; of keys that equal it the first ones are taken."""
    keys = _in_order(score)
    bits = jnp.iinfo(keys.dtype).bits

    def narrow(step: Array, low: Array) -> Array:
        middle = low | jnp.left_shift(jnp.ones((), keys.dtype), (bits - 1 - step).astype(keys.dtype))
        return jnp.where(jnp.sum(keys >= middle, axis=-1, keepdims=True) >= k, middle, low)

    least = jax.lax.fori_loop(0, bits, narrow, jnp.zeros((*keys.shape[:-1], 1), keys.dtype))
    greater, tied = keys > least, keys == least
    room = k - jnp.sum(greater, axis=-1, keepdims=True)
    return greater | (tied & (jnp.cumsum(tied, axis=-1) <= room))
