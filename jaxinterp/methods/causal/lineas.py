"""LinEAS: affine maps of activations, one a layer, trained together so that source prompts look like target prompts.

    T_l(z) = omega_l * z + b_l                                 start: omega 1, b 0
    U_l    pooled activations of source prompts, running through the *steered* model   [n, d]
    V_l    pooled activations of target prompts in the model as it is                  [n, d]
    loss   sum_l (1/n) sum_channels sum_i (sort(U_l)_i - sort(V_l)_i)^2                 (1-D Wasserstein distances)
    prox   omega - 1 and b: soft threshold tau * l1, then group threshold tau * l2, tau = rate * gamma

Prompts are pooled by their mean over positions from `first` on; both sides have equally many. The rate falls as a
cosine.

The closed forms for one layer (`gaussian_map`, `sorted_map`) are baselines: sorted_map is LinEAS with one layer and
gamma = 0.

Source: LinEAS, arXiv 2503.10679, equations 3-6 and algorithm 1 (whose tau = gamma leaves nothing: see
docs/oracles/causes.md); Lin-AcT, arXiv 2410.23054 (closed forms).
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER
from jaxinterp.core.metrics import Metrics, number
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.methods.checks import check_not_negative, check_positive, check_whole
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.edits import Edit
from jaxinterp.models.run import run

Rows = tuple[tuple[int, ...], ...]
"""Token ids, prompt by prompt, all of one length: a method holds no arrays."""


def check_rows_of_ids(where: str, rows: Rows) -> None:
    """Raises UserError unless the rows are prompts of one length, at least one."""
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or not lengths[0]:
        raise UserError(f"{where} has {len(rows)} prompts of lengths {lengths}: give prompts of one length.")


class Affine(eqx.Module):
    """The edit z + strength * (omega z + b - z)."""

    scale: Float[Array, " d"]
    shift: Float[Array, " d"]
    strength: Float[Array, ""]

    def __call__(self, z: Array) -> Array:
        return (z + self.strength * (self.scale * z + self.shift - z)).astype(z.dtype)


class Transport(eqx.Module):
    """The maps of all layers.

    Attributes:
      scale, shift: omega and b by layer.
      targets: V by layer.
      names: which arrays are mapped.
    """

    scale: tuple[Float[Array, " _d"], ...] = eqx.field(metadata=PARAMETER)
    shift: tuple[Float[Array, " _d"], ...] = eqx.field(metadata=PARAMETER)
    targets: tuple[Float[Array, "_n _d"], ...]
    names: tuple[str, ...] = eqx.field(static=True)

    def edits(self, strength: float | Array = 1.0) -> dict[str, Edit]:
        """The edits for `run` and `generate`; strength 0 changes nothing, 1 is the whole map."""
        strong = jnp.asarray(strength, self.scale[0].dtype)
        maps = zip(self.names, self.scale, self.shift, strict=True)
        return {name: Affine(scale, shift, strong) for name, scale, shift in maps}

    def support(self) -> int:
        """How many entries of omega - 1 and b are not zero."""
        return sum(int(jnp.sum(scale != 1)) for scale in self.scale) + sum(int(jnp.sum(b != 0)) for b in self.shift)


@dataclass(frozen=True)
class LinEAS:
    """LinEAS's settings; `fit(LinEAS(...), subject, steps=1000)` takes no text.

    Attributes:
      source, target: prompts as tuples of ids, equally many on both sides.
      sites: the arrays that are mapped.
      gamma: strength of the penalty, 0 for none.
      l1, l2: weights of the sparse and the group part.
      rate: start of the cosine.
      first: positions from here on are pooled.
    """

    source: Rows
    target: Rows
    sites: tuple[str, ...]
    gamma: float = 0.0
    l1: float = 1.0
    l2: float = 1.0
    rate: float = 0.1
    first: int = 1

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, first=0)
        check_positive(self, "rate")
        check_not_negative(self, "gamma", "l1", "l2")

    def needs(self, site: Site = None) -> Needs:
        return Needs(rows="none")

    def recipe(self, steps: int) -> Recipe:
        if len(self.source) != len(self.target):
            raise UserError(f"{len(self.source)} source and {len(self.target)} target prompts: give equally many.")
        for where, rows in (("source", self.source), ("target", self.target)):
            check_rows_of_ids(where, rows)
            if self.first >= len(rows[0]):
                raise UserError(
                    f"first={self.first} leaves no position of {where}'s {len(rows[0])}: give a smaller one."
                )
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise UserError(f"sites={self.sites}: give at least one array, each once.")
        schedule = optax.cosine_decay_schedule(self.rate, steps)

        def init(key: Array, sample: Batch, model: PyTree) -> Transport:
            targets = pooled(model, self.target, self.sites, self.first)
            ones = tuple(jnp.ones(value.shape[1], jnp.float32) for value in targets)
            return Transport(ones, tuple(jnp.zeros_like(one) for one in ones), targets, self.sites)

        def objective(
            decomposition: PyTree, batch: Batch, key: Array, *, model: PyTree = None
        ) -> tuple[Array, Metrics]:
            moved = pooled(model, self.source, self.sites, self.first, decomposition.edits())
            distances = [transport_cost(u, v) for u, v in zip(moved, decomposition.targets, strict=True)]
            cost = sum(distances, jnp.zeros((), jnp.float32))
            return cost, {"cost": number(cost)}

        def shrink(state: MethodState, batch: Batch, metrics: Metrics, key: Array) -> MethodState:
            tau = schedule(batch.step) * self.gamma
            maps = state.decomposition
            scale = tuple(1 + prox(omega - 1, tau * self.l1, tau * self.l2) for omega in maps.scale)
            shift = tuple(prox(b, tau * self.l1, tau * self.l2) for b in maps.shift)
            changed = eqx.tree_at(lambda maps: (maps.scale, maps.shift), maps, (scale, shift))
            return eqx.tree_at(lambda state: state.decomposition, state, changed)

        return gradient_method(init, objective, optax.sgd(schedule), after_step=shrink)


def pooled(
    model: PyTree, rows: Rows, names: tuple[str, ...], first: int = 1, edits: dict[str, Edit] | None = None
) -> tuple[Float[Array, "_n _d"], ...]:
    """The mean over positions from `first` on of every named array, prompt by prompt, float32."""
    trace = run(model, jnp.asarray(rows, jnp.int32), edits=edits or {}, keep=names)
    return tuple(jnp.mean(trace[name][:, first:].astype(jnp.float32), axis=1) for name in names)


def transport_cost(u: Float[Array, "n d"], v: Float[Array, "n d"]) -> Float[Array, ""]:
    """(1/n) sum over channels and ranks of the squared difference of sorted columns; the order is held constant."""
    order = jax.lax.stop_gradient(jnp.argsort(u, axis=0))
    return jnp.sum((jnp.take_along_axis(u, order, axis=0) - jnp.sort(v, axis=0)) ** 2) / u.shape[0]


def prox(x: Float[Array, " d"], sparse: Any, group: Any) -> Float[Array, " d"]:
    """argmin_y |y - x|^2 / 2 + sparse |y|_1 + group |y|_2: soft threshold, then the whole vector towards 0."""
    soft = jnp.sign(x) * jnp.maximum(jnp.abs(x) - sparse, 0)
    length = jnp.linalg.norm(soft)
    return soft * jnp.maximum(0, 1 - group / jnp.maximum(length, 1e-30))


def sorted_map(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """(omega, b) of the least-squares line between sorted columns: Cov(x, y) / Var(x), mean(y) - omega mean(x)."""
    x, y = jnp.sort(x, axis=0), jnp.sort(y, axis=0)
    covariance = jnp.mean((x - x.mean(0)) * (y - y.mean(0)), axis=0)
    omega = covariance / jnp.maximum(jnp.var(x, axis=0), 1e-30)
    return omega, y.mean(0) - omega * x.mean(0)


def gaussian_map(
    x: Float[Array, "n d"], y: Float[Array, "m d"], least: float = 1e-4
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """(omega, b) between normal distributions: std(y) / std(x), with n - 1; channels with std(x) < least are left."""
    spread = jnp.std(x, axis=0, ddof=1)
    flat = spread < least
    omega = jnp.where(flat, 1.0, jnp.std(y, axis=0, ddof=1) / jnp.maximum(spread, least))
    return omega, jnp.where(flat, 0.0, y.mean(0) - omega * x.mean(0))
