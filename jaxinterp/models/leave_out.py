"""Edits that leave out neurons or channels: a score, a selector and a fill, by the name of the array.

    run(model, tokens, edits={"blocks/3/mlp/hidden": LeaveOut(BySize(row_norms(w_down)), TopK(400))})

    method                     array      score                          selector       fill
    TEAL                       in/hidden  BySize()                       Above(t)       0
    WINA                       in/hidden  BySize(row_norms(W))           TopK(k)        0
    CETT, PPL-p                hidden     BySize(row_norms(W_down))      Above(t)       0
    CATS                       pre        BySize(activation="silu")      Above(t)       0
    CHESS                      pre        BySize(rms_u, "silu")          Above(t)       0
    R-Sparse                   in/hidden  BySize(row_norms(W))           Above(t)       LowRank(basis)
    CoreInfer                  hidden     Fixed(core_counts(prompt))     TopK(k)        0
    AMP, MAW (as an ablation)  hidden     Fixed(score)                   TopK(k)        0 or a mean

An edit at `pre` with fill 0 leaves a neuron out where f(0) = 0, which holds for every activation here.

A *score* maps the array to one number a channel, large for what is kept; a *selector* maps scores to a mask; a *fill*
is a number, an array (a mean, another run's), or a callable `fill(a, mask)` that returns what flows on. Masks carry no
gradient, what is kept does.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models import selection
from jaxinterp.models.rules import Activation, activate
from jaxinterp.models.selection import Count
from jaxinterp.models.sites import sites


class BySize(eqx.Module):
    """|f(a_j)| scale_j."""

    scale: Float[Array, " d"] | float = 1.0
    activation: Activation = eqx.field(static=True, default="identity")

    def __call__(self, a: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return jnp.abs(activate(self.activation, a)) * self.scale


class Fixed(eqx.Module):
    """The same scores for every token."""

    values: Float[Array, " d"]

    def __call__(self, a: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return jnp.broadcast_to(self.values, a.shape)


class Core(eqx.Module):
    """CoreInfer's counts over the first `prompt` positions of each sequence; a is [batch, seq, d]."""

    share: float = eqx.field(static=True)
    prompt: int = eqx.field(static=True)

    def __call__(self, a: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        counts = jax.vmap(lambda rows: selection.core_counts(rows[: self.prompt], self.share))(a)
        return jnp.broadcast_to(counts[:, None], a.shape)


class TopK(eqx.Module):
    """The k largest of each token."""

    k: Count

    def __call__(self, score: Float[Array, "*batch d"]) -> Bool[Array, "*batch d"]:
        return selection.top_k(score, self.k)


class BatchTopK(eqx.Module):
    """`per_row` a token on average: the largest of the whole array."""

    per_row: Count

    def __call__(self, score: Float[Array, "*batch d"]) -> Bool[Array, "*batch d"]:
        return selection.batch_top_k(score, self.per_row)


class Above(eqx.Module):
    """score > threshold."""

    threshold: Float[Array, "..."] | float

    def __call__(self, score: Float[Array, "*batch d"]) -> Bool[Array, "*batch d"]:
        return selection.above(score, self.threshold)


class NOfM(eqx.Module):
    """The n largest of every m neighbours."""

    n: int = eqx.field(static=True)
    m: int = eqx.field(static=True)

    def __call__(self, score: Float[Array, "*batch d"]) -> Bool[Array, "*batch d"]:
        return selection.n_of_m(score, self.n, self.m)


class Blocks(eqx.Module):
    """The k blocks of `size` neighbouring channels with the largest root of summed squares, for each token."""

    size: int = eqx.field(static=True)
    k: Count

    def __call__(self, score: Float[Array, "*batch d"]) -> Bool[Array, "*batch d"]:
        if score.shape[-1] % self.size:
            raise UserError(f"size={self.size} must divide {score.shape[-1]}, the number of channels.")
        norms = jnp.linalg.norm(score.reshape(*score.shape[:-1], -1, self.size), axis=-1)
        return jnp.repeat(selection.top_k(norms, self.k), self.size, axis=-1)


class Forced(eqx.Module):
    """Another selector, with some channels always kept and others never."""

    selector: Callable[[Array], Array]
    on: tuple[int, ...] = eqx.field(static=True, default=())
    off: tuple[int, ...] = eqx.field(static=True, default=())

    def __call__(self, score: Float[Array, "*batch d"]) -> Bool[Array, "*batch d"]:
        return selection.forced(self.selector(score), self.on, self.off)


class LowRank(eqx.Module):
    """a m + (a (1 - m)) U U^T: what is left out goes through a map of low rank; U from `low_rank_basis` of the weight
    that reads the array."""

    basis: Float[Array, "d rank"]

    def __call__(self, a: Float[Array, "*batch d"], mask: Bool[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return jnp.where(mask, a, 0) + (jnp.where(mask, 0, a) @ self.basis) @ self.basis.T


class Affine(eqx.Module):
    """where(m, a, slope a + offset)."""

    slope: Float[Array, "..."] | float
    offset: Float[Array, "..."] | float

    def __call__(self, a: Float[Array, "*batch d"], mask: Bool[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return jnp.where(mask, a, self.slope * a + self.offset)


class LeaveOut(eqx.Module):
    """The edit that keeps what the selector chooses and fills the rest.

    `dense_before`: tokens at earlier positions stay as they are (TEAL and WINA leave part of the prompt dense).

    Example:
      run(model, tokens, edits={"blocks/0/mlp/hidden": LeaveOut(BySize(), TopK(8), fill=means)})
    """

    score: Callable[[Array], Array]
    selector: Callable[[Array], Array]
    fill: Callable[[Array, Array], Array] | Float[Array, "..."] | float = 0.0
    dense_before: int = eqx.field(static=True, default=0)

    def __call__(
        self, a: Float[Array, "*batch d"], *, positions: Int[Array, "batch seq"] | None = None
    ) -> Float[Array, "*batch d"]:
        mask = self.selector(self.score(a))
        if self.dense_before:
            if positions is None or positions.shape != a.shape[:-1]:
                raise UserError(f"dense_before={self.dense_before} needs an array [batch, seq, d] and its positions.")
            mask = mask | (positions < self.dense_before)[..., None]
        filled = self.fill(a, mask) if callable(self.fill) else selection.masked(a, mask, self.fill)
        return filled.astype(a.dtype)


class FATReLU(eqx.Module):
    """x where x >= threshold, else 0: an edit at `pre` of a ReLU model makes its activation x [x >= threshold].

    Source: ProSparse 2402.13516, section 3.3 (threshold 0.01).
    """

    threshold: float | Float[Array, ""] = 0.01

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return jnp.where(x >= self.threshold, x, 0).astype(x.dtype)


def every(model: PyTree, array: str, make: Callable[[str], Any]) -> dict[str, PyTree]:
    """`make(leaf)` as the edit at `<leaf>/<array>` of every MLP: `every(model, "hidden", lambda leaf: ...)`.

    Raises:
      UserError: the model has no such array in an MLP.
    """
    names = sites(model, f"**/mlp/{array}")
    if not names:
        raise UserError(f"array={array!r} is not an array of this model's MLPs: take in, pre, up, hidden or out.")
    return {name: make(name.rpartition("/")[0]) for name in names}
