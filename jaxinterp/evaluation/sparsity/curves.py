"""CETT of a whole model, from one table a layer: thresholds for any target without another pass over the activations.

    cett_curve(a, W)      CETT(ε_g), and the share of neurons above ε_g, at quantiles ε_g of the |n_j| that are not 0
    curve.at(c)           a crossing of CETT(ε) = c, by bisection in the table, with the value that it achieves
    cett_ppl(model, ...)  PPL-p %: the largest CETT c, one for all layers, that costs at most p percent of perplexity

`cett_threshold` gives the same as `curve.at` where it gets the curve's own candidates; it costs a product with W for
every step of every bisection, which a search over c repeats in every layer.

Source: Sparsing Law, arXiv 2411.02335, section 3. The grid is one of quantiles, as in `experiments.sparsity`: equally
spaced thresholds, the authors' choice, put most of their points where few neurons are.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.budgets import ppl_percent
from jaxinterp.evaluation.sparsity.measures import Threshold
from jaxinterp.models.leave_out import Above, BySize, LeaveOut
from jaxinterp.models.run import run
from jaxinterp.models.selection import row_norms
from jaxinterp.models.sites import select, sites


class CETTCurve(NamedTuple):
    """CETT and the share of neurons that stay, at rising thresholds."""

    epsilon: Float[np.ndarray, " grid"]
    achieved: Float[np.ndarray, " grid"]
    ratio: Float[np.ndarray, " grid"]

    def at(self, target: float) -> Threshold:
        """A threshold with CETT <= target, by bisection: the largest one where CETT is monotone; 0 where none is.

        Raises:
          UserError: the target is negative.
        """
        if not target >= 0:
            raise UserError(f"target={target} must be at least 0: CETT is a share of the output's norm.")
        low, high = -1, len(self.epsilon)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.achieved[middle] <= target else (low, middle)
        if low < 0:
            return Threshold(0.0, 0.0, float(self.nonzero))
        return Threshold(float(self.epsilon[low]), float(self.achieved[low]), float(self.ratio[low]))

    @property
    def nonzero(self) -> float:
        """The share of neurons with |n_j| > 0: the first candidate lies just below the least of them."""
        return float(self.ratio[0])


def cett_curve(
    a: Float[Array | np.ndarray, "tokens d"],
    weight: Float[Array, "d d_out"],
    *,
    points: int = 64,
    counts: Float[Array | np.ndarray, " tokens"] | None = None,
) -> CETTCurve:
    """The curve of activations `a` that the matrix `weight` reads; a token whose output is zero does not count.

    Args:
      points: thresholds: 0 and quantiles of the |n_j| that are not 0, from 0 to 0.99.
      counts: 0 for padding.
    Raises:
      UserError: points is below 2, or no neuron of a token that counts is active.
    """
    if points < 2:
        raise UserError(f"points={points} must be at least 2.")
    a = jnp.asarray(a)
    weights = jnp.ones(a.shape[0], jnp.float32) if counts is None else jnp.asarray(counts, jnp.float32)
    sizes = np.asarray(jnp.abs(a) * row_norms(weight))[np.asarray(weights) > 0]
    sizes = sizes[sizes > 0]
    if not sizes.size:
        raise UserError("a has no active neuron in a token that counts: CETT is not defined.")
    grid = np.concatenate([[0.0], np.quantile(sizes, np.linspace(0, 0.99, points - 1))]).astype(np.float32)
    achieved, ratio = _curve(a, weight, jnp.asarray(grid), weights)
    return CETTCurve(grid, np.asarray(achieved), np.asarray(ratio))


@jax.jit
def _curve(a: Array, weight: Array, grid: Array, counts: Array) -> tuple[Array, Array]:
    sizes, whole = jnp.abs(a) * row_norms(weight), jnp.linalg.norm(a @ weight, axis=-1)
    counts = counts * (whole > 0)

    def one(epsilon: Array) -> tuple[Array, Array]:
        tail = jnp.linalg.norm(jnp.where(sizes <= epsilon, a, 0) @ weight, axis=-1)
        above = jnp.mean(sizes > epsilon, axis=-1, dtype=jnp.float32)
        shares = jnp.stack([jnp.sum(counts * tail / jnp.where(whole > 0, whole, 1)), jnp.sum(counts * above)])
        found = shares / jnp.sum(counts)
        return found[0], found[1]

    return jax.lax.map(one, grid)


def hidden_activations(
    model: PyTree, batches: Iterable[Mapping[str, Any]], *, dense_before: int = 0
) -> dict[str, Float[np.ndarray, "tokens d"]]:
    """By MLP, the hidden activations of the tokens with weight at positions from `dense_before` on.

    Raises:
      UserError: the model has no MLP whose hidden array can be read, or no token has weight.
    """
    names = sites(model, "**/mlp/hidden")
    if not names:
        raise UserError("the model has no MLP with an array `hidden`.")
    kept: dict[str, list[np.ndarray]] = {name.rpartition("/")[0]: [] for name in names}
    for batch in batches:
        arrays = _hidden(model, jnp.asarray(batch["tokens"]), tuple(names))
        weight = np.asarray(batch["weight"]) > 0
        weight[:, :dense_before] = False
        for name in names:
            kept[name.rpartition("/")[0]].append(np.asarray(arrays[name], np.float32)[weight])
    joined = {leaf: np.concatenate(parts) for leaf, parts in kept.items() if parts}
    if not joined or not len(next(iter(joined.values()))):
        raise UserError("no token of the text has weight: give longer documents, or more windows.")
    return joined


@eqx.filter_jit
def _hidden(model: PyTree, tokens: Array, names: tuple[str, ...]) -> dict[str, Array]:
    return dict(run(model, tokens, keep=names).arrays)


def out_matrix(model: PyTree, leaf: str) -> Float[Array, "d d_out"]:
    """W_down of an MLP."""
    return select(model, f"{leaf}/down_proj").get().weight


def cett_curves(
    model: PyTree, hidden: Mapping[str, Float[Array | np.ndarray, "_tokens _d"]], *, points: int = 64
) -> dict[str, CETTCurve]:
    """The curve of every MLP, of `hidden_activations`."""
    return {leaf: cett_curve(a, out_matrix(model, leaf), points=points) for leaf, a in hidden.items()}


def edits_at(model: PyTree, thresholds: Mapping[str, Threshold], *, dense_before: int = 0) -> dict[str, LeaveOut]:
    """The edits that leave out neurons with |a_j| |W_down[j]| <= ε, each MLP at its own ε."""
    return {
        f"{leaf}/hidden": LeaveOut(
            BySize(row_norms(out_matrix(model, leaf))),
            Above(jnp.asarray(found.epsilon, jnp.float32)),
            dense_before=dense_before,
        )
        for leaf, found in thresholds.items()
    }


class CETTPPL(NamedTuple):
    """One CETT for all layers: the mean share of neurons kept, the rise of perplexity, and what each layer achieved."""

    cett: float
    ratio: float
    percent: float
    layers: dict[str, Threshold]


def cett_ppl(
    model: PyTree,
    curves: Mapping[str, CETTCurve],
    loss: Callable[[Mapping[str, LeaveOut]], float],
    dense_loss: float,
    percent: float,
    *,
    tolerance: float = 2e-3,
    dense_before: int = 0,
) -> CETTPPL:
    """CETT-PPL-p %: thresholds from the curves' text, the loss from whatever text `loss` takes.

    Args:
      loss: edits -> nats. Any number whose rise is exp(loss - dense_loss) - 1 does, of an encoder log(1 + distance).
      tolerance: of the CETT, absolute.
    Raises:
      UserError: percent or tolerance is not positive.
    """
    layers: dict[float, dict[str, Threshold]] = {0.0: {leaf: curve.at(0.0) for leaf, curve in curves.items()}}

    def measure(target: float) -> tuple[float, float]:
        layers[target] = {leaf: curve.at(target) for leaf, curve in curves.items()}
        ratio = float(np.mean([found.ratio for found in layers[target].values()]))
        return loss(edits_at(model, layers[target], dense_before=dense_before)), ratio

    found = ppl_percent(measure, dense_loss, percent, tolerance=tolerance)
    ratio = float(np.mean([each.ratio for each in layers[found.cett].values()]))
    return CETTPPL(found.cett, ratio, found.percent, layers[found.cett])
