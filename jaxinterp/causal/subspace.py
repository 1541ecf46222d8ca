"""Patching along directions, and what of a direction the next layer can read.

    a <- a + ((source - a) B^T) B          B [k, d] orthonormal rows; k = 1: one direction

A direction v of an MLP's hidden array (d_mlp numbers) is read by the down projection W [d_mlp, d_model]. With Q an
orthonormal basis of W's column space in R^d_mlp,

    v_row = Q Q^T v     what W can read;     v_null = v - v_row,  v_null W = 0: invisible to everything behind

A direction can look causal because it joins a part that the data does not use (dormant) to a part that nothing reads
(disconnected). `direction_report` gives the numbers that show it: the effect of patching along v, along v_row and
along v_null alone, and along everything. It gives no verdict: the literature disagrees on the word for it.

Q comes from a singular value decomposition: a QR factor spans too much where W has not full rank.

Sources: Makelov et al. 2023, arXiv 2311.17030; Geiger et al. 2023, arXiv 2303.02536 (distributed interchange);
Wu et al. 2024, arXiv 2401.12631 (a reply).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError


class Swap(eqx.Module):
    """The edit a + ((source - a) B^T) B where `where` is true.

    Attributes:
      basis: orthonormal rows; see `orthonormal`.
      source: the other run's array, broadcast to the array.
      where: broadcast to the array; () for everywhere.
    """

    basis: Float[Array, "k d"]
    source: Float[Array, "..."]
    where: Bool[Array, "..."]

    def __call__(self, x: Array) -> Array:
        moved = x + ((self.source - x) @ self.basis.T) @ self.basis
        return jnp.where(self.where, moved, x).astype(x.dtype)


def orthonormal(rows: Float[Array, "k d"], rtol: float = 1e-6) -> Float[Array, "r d"]:
    """Orthonormal rows that span the same space; singular values below rtol times the largest are left out.

    Raises:
      UserError: all rows are zero.
    """
    _, sizes, right = jnp.linalg.svd(rows, full_matrices=False)
    rank = int(jnp.sum(sizes > rtol * sizes[0]))
    if rank == 0:
        raise UserError("the direction is zero: nothing can be patched along it.")
    return right[:rank]


def read_space(weight: Float[Array, "d_in d_out"], rtol: float = 1e-6) -> Float[Array, "d_in r"]:
    """An orthonormal basis of the column space of W in R^d_in: the inputs that y = x W can tell apart."""
    left, sizes, _ = jnp.linalg.svd(weight, full_matrices=False)
    return left[:, : int(jnp.sum(sizes > rtol * sizes[0]))]


def split(
    v: Float[Array, "*axes d"], space: Float[Array, "d r"]
) -> tuple[Float[Array, "*axes d"], Float[Array, "*axes d"]]:
    """(v_row, v_null): the part of v in the space, and the rest."""
    row = (v @ space) @ space.T
    return row, v - row


def retention(v: Float[Array, "*axes d"], weight: Float[Array, "d d_out"]) -> Float[Array, "*axes"]:
    """|v_row| / |v|: the share of a direction's length that W can read; sqrt(rank / d) for a random one."""
    row, _ = split(v, read_space(weight))
    return jnp.linalg.norm(row, axis=-1) / jnp.linalg.norm(v, axis=-1)


class DirectionReport(NamedTuple):
    """Effects of patching along parts of a direction v, and how far two classes lie apart along each.

    Attributes:
      row_norm, null_norm: |v_row| and |v_null| for |v| = 1.
      effect, effect_row, effect_null: mean effect of patching along v, along v_row / |v_row|, along v_null / |v_null|.
      effect_row_as_is: of adding what v's own patch would add, seen through v_row only: (source - a).v v_row.
      effect_full: of patching the whole array: the ceiling. effect > effect_full says that the patch leaves the data.
      separation, separation_row, separation_null: (mean_1 - mean_0) / pooled standard deviation of the data along each.
    """

    row_norm: float
    null_norm: float
    effect: float
    effect_row: float
    effect_null: float
    effect_row_as_is: float
    effect_full: float
    separation: float
    separation_row: float
    separation_null: float


def direction_report(
    effect: Callable[[Callable[[Any], Any]], Any],
    v: Float[Array, " d"],
    weight: Float[Array, "d d_out"],
    source: Float[Array, "..."],
    data: Float[Array, "rows d"],
    label: Bool[Array, " rows"] | Int[Array, " rows"],
    *,
    where: Bool[Array, "..."] | None = None,
    rtol: float = 1e-6,
) -> DirectionReport:
    """The numbers of the row-space test for one direction.

    Args:
      effect: edit -> effects [batch] of running the model with that edit at the array.
      v: the direction, of any length but 0.
      weight: of what reads the array: the down projection's for `mlp/hidden`.
      source: the array of the other run.
      data, label: rows of the array from both classes, for the separations.
      where: places that are patched; default: everywhere.
    Raises:
      UserError: v is zero, or `label` does not tell the rows of `data` into two classes.
    """
    where = jnp.ones((), bool) if where is None else where
    (unit,) = orthonormal(v[None])
    unit = jnp.where(unit @ v < 0, -unit, unit)
    row, null = split(unit, read_space(weight, rtol))
    sizes = jnp.linalg.norm(row), jnp.linalg.norm(null)
    rows, classes = np.asarray(data), np.asarray(label).astype(bool)
    if classes.shape != rows.shape[:1] or classes.all() or not classes.any():
        raise UserError(f"label {classes.shape} for data {rows.shape}: give one a row, with both classes among them.")

    def along(direction: Array, size: Array) -> float:
        return 0.0 if float(size) < 1e-6 else _mean(effect(Swap((direction / size)[None], source, where)))

    def apart(direction: Array) -> float:
        x = rows @ np.asarray(direction)
        a, b = x[classes], x[~classes]
        spread = np.sqrt((a.var() + b.var()) / 2)
        return float((a.mean() - b.mean()) / max(spread, 1e-6 * rows.std()))

    def as_is(x: Array) -> Array:
        return jnp.where(where, x + ((source - x) @ unit)[..., None] * row, x).astype(x.dtype)

    def everything(x: Array) -> Array:
        return jnp.where(where, source, x).astype(x.dtype)

    return DirectionReport(
        row_norm=float(sizes[0]),
        null_norm=float(sizes[1]),
        effect=along(unit, jnp.ones(())),
        effect_row=along(row, sizes[0]),
        effect_null=along(null, sizes[1]),
        effect_row_as_is=_mean(effect(as_is)),
        effect_full=_mean(effect(everything)),
        separation=apart(unit),
        separation_row=apart(row),
        separation_null=apart(null),
    )


def _mean(effects: Array) -> float:
    return float(jnp.mean(effects))
