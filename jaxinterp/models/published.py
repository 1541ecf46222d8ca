"""Which neurons and weights the authors' code chooses: their counts, their rounding, their thresholds.

`selection` has the scores and the selectors, which take a number to keep or a threshold. What the published code
makes of a *share* differs from paper to paper: it is written down here, one function a rule, for comparison.

    method      rule of the code                                                         function
    TEAL        icdf(0.5 + s/2) of a histogram of x, taken as symmetric about 0          teal_threshold
    WINA        the int(d (1 - s)) largest of each token                                 wina_mask
    CATS        the edge of the first bin whose cumulative share exceeds s               cats_threshold
    CHESS       the importance of rank int(s n) of s_j^2 E[u_j^2] over all               chess_importance
    R-Sparse    d_in (1 - s) ρ channels, the rest of the weights as a low rank           r_sparse_sizes
    CoreInfer   the int(d β) neurons that are in most tokens' cores                      core_neurons
    magnitude   |W| above the entry of rank int(n s), counted from 0                     magnitude_mask
    Wanda, DaSS int(d s) weights of a group go, of equal ones the first          pruning.weight_mask
    AMP         round(r heads) heads, and neurons that make up for what the rounding left out    amp_counts
    MAW (PPM)   min(int(p d / 100), d - 1) neurons go                                    peak_to_peak_kept

Weights are `(d_in, d_out)`, the transpose of a PyTorch `Linear.weight`.

Sources (arXiv): TEAL 2408.14690, WINA 2505.19427, CATS 2404.08763, CHESS 2409.01366, R-Sparse 2504.19449, CoreInfer
2410.18311, Wanda 2306.11695 (its code prunes by magnitude, too), AMP 2504.21174, MAW 2512.22671.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.models.selection import (
    Values,
    Vector,
    Weight,
    check_not_negative,
    core_counts,
    peak_to_peak,
    top_k,
    wina,
)


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"{name}={share} must lie in 0 to 1.")


def teal_threshold(x: Values, sparsity: float, *, bins: int = 10_000, outliers: float = 0.01) -> float:
    """t for |x| > t: the quantile 0.5 + sparsity / 2 of a histogram of x itself, linear between the bins' centres.

    It leaves out the share `sparsity` only where x is symmetric about 0; `selection.above_quantile` does so always.

    Args:
      bins: of the histogram; all but the first and the last lie evenly between the quantiles `outliers` and
        1 - `outliers` of x.
    Raises:
      UserError: the sparsity is out of range, or x has fewer than 1 / outliers entries.
    """
    _check_share("sparsity", sparsity)
    values = np.sort(np.asarray(x, np.float64).reshape(-1))
    cut = int(outliers * len(values))
    if not 1 <= cut < len(values) - cut:
        raise UserError(f"outliers={outliers} of {len(values)} entries must be at least 1 and less than half of them.")
    edges = np.concatenate([values[:1], np.linspace(values[cut], values[-cut], bins - 1), values[-1:]])
    counts = np.cumsum(np.histogram(values, edges)[0])
    centres = (edges[:-1] + edges[1:]) / 2
    wanted = (0.5 + sparsity / 2) * counts[-1]
    place = int(np.searchsorted(counts, wanted))
    if place == 0 or place == len(centres):
        return float(centres[min(place, len(centres) - 1)])
    part = (wanted - counts[place - 1]) / (counts[place] - counts[place - 1])
    return float(centres[place - 1] + part * (centres[place] - centres[place - 1]))


def wina_mask(
    x: Float[Array | np.ndarray, "*batch d_in"], weight: Weight, sparsity: float
) -> Bool[Array, "*batch d_in"]:
    """True for the int(d_in (1 - sparsity)) largest |x_j| |W[j, :]| of each token.

    Raises:
      UserError: the sparsity is out of range.
    """
    _check_share("sparsity", sparsity)
    return top_k(wina(x, weight), int(x.shape[-1] * (1 - sparsity)))


def cats_threshold(
    edges: Float[Array | np.ndarray, " edges"],
    counts: Float[Array | np.ndarray, " bins"] | Int[Array | np.ndarray, " bins"],
    sparsity: float,
) -> float:
    """t for |silu(gate)| > t: the lower edge of the first bin with which the cumulative share exceeds the sparsity.

    Args:
      edges: of the histogram of |silu(gate)|, one more than bins; the authors': -inf, 998 from -1 to 1, inf.
    Raises:
      UserError: the sparsity is not in 0 to below 1, or there is not one edge more than bins.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity={sparsity} must be at least 0 and below 1.")
    edges, counts = np.asarray(edges), np.asarray(counts, np.float64)
    if len(edges) != len(counts) + 1:
        raise UserError(f"edges has {len(edges)} entries, but {len(counts)} bins have {len(counts) + 1}.")
    return float(edges[np.searchsorted(np.cumsum(counts / counts.sum()), sparsity, side="right")])


def chess_importance(s: Values, mean_square_u: Vector, sparsity: float) -> float:
    """T, the importance s_j^2 E[u_j^2] of rank int(sparsity n) over all entries: what is at most T goes.

    `chess_thresholds(T, mean_square_u)` are the channels' thresholds for |s_j| > t_j.

    Raises:
      UserError: the sparsity is out of range, or a mean square is negative.
    """
    _check_share("sparsity", sparsity)
    check_not_negative("mean_square_u", mean_square_u)
    importance = np.sort((np.asarray(s, np.float64) ** 2 * np.asarray(mean_square_u)).reshape(-1))
    rank = int(sparsity * len(importance))
    return float(importance[rank - 1]) if rank else 0.0


def r_sparse_sizes(d_in: int, d_out: int, sparsity: float, share: float) -> tuple[int, int]:
    """(channels, rank) with channels d_out + rank (d_in + d_out) weights, at most (1 - sparsity) d_in d_out.

    Args:
      share: ρ, of the kept weights that are whole channels.
    Raises:
      UserError: the sparsity or the share is out of range.
    """
    _check_share("sparsity", sparsity)
    _check_share("share", share)
    channels = int(d_in * (1 - sparsity) * share)
    return channels, int((d_in * d_out * (1 - sparsity) - channels * d_out) / (d_in + d_out))


def core_neurons(
    a: Float[Array | np.ndarray, "tokens d"], token_share: float, share: float
) -> Int[np.ndarray, " kept"]:
    """The int(d share) neurons that `core_counts` finds in most tokens, rising; of equal counts the lower ones.

    Args:
      a: hidden activations of the prompt's tokens.
      token_share: of a token's positive activations that are its core.
    Raises:
      UserError: a share is out of range.
    """
    _check_share("share", share)
    return np.flatnonzero(top_k(core_counts(a, token_share), int(a.shape[1] * share)))


def magnitude_mask(weight: Weight, sparsity: float) -> Bool[Array, "d_in d_out"]:
    """True where |W| exceeds the entry of rank int(n sparsity), counted from 0: one more goes than the share says.

    Raises:
      UserError: the sparsity is not in 0 to below 1.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity={sparsity} must be at least 0 and below 1.")
    sizes = jnp.abs(jnp.asarray(weight))
    return sizes > jnp.sort(sizes.reshape(-1))[int(sizes.size * sparsity)]


def amp_counts(heads: int, d_mlp: int, ratio: float) -> tuple[int, int]:
    """(heads, neurons) that go from each layer: round(ratio heads), and round(heads (ratio - gone / heads) + ratio
    d_mlp) neurons; at least one of each stays.

    Args:
      ratio: of attention and MLP together: the wanted share of all parameters times all / (attention + MLP).
    Raises:
      UserError: the ratio is out of range.
    """
    _check_share("ratio", ratio)
    gone = min(round(ratio * heads), heads - 1)
    neurons = round(d_mlp * ((heads / d_mlp) * (ratio - gone / heads) + ratio))
    return gone, min(neurons, d_mlp - 1)


def peak_to_peak_kept(gate: Weight, up: Weight, percent: int | float) -> Int[np.ndarray, " kept"]:
    """The neurons that stay, rising: all but the min(int(percent d / 100), d - 1) of least `peak_to_peak`.

    Raises:
      UserError: the percentage is not in 0 to 100.
    """
    if not 0 <= percent <= 100:
        raise UserError(f"percent={percent} must lie in 0 to 100.")
    neurons = gate.shape[1]
    return np.flatnonzero(top_k(peak_to_peak(gate, up), neurons - min(int(percent / 100 * neurons), neurons - 1)))
