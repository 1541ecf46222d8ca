"""Activations that decide themselves how many features are active: by the input's norm, or by target frequencies.

    TopAFA     z = max(a, 0) at the largest a, as many as bring the norm of z nearest to the norm of x
    GroupBias  z = gain * a where a + b > 0; b is adapted so that each feature is active as often as its group should be

with a = x E^T + bias. Both give dense codes (TopAFA on request sparse ones, with a cap).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER_ROWS, STATE, STATE_ROWS
from jaxinterp.core.metrics import Metrics
from jaxinterp.decompositions.activations import above, check_k, pre_activations
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.kernels import encode_topk, select_topk
from jaxinterp.kernels.threshold import NOT_A_NUMBER

CLOSE = 1e-6
"""TopAFA: norms that differ by less than this fraction are equal (float32 sums of many squares)."""

DEAD = 1e-6
"""GroupBias: a feature that is active on less than this fraction of tokens is revived."""


class TopAFA(eqx.Module):
    """z = max(a, 0) at the k* largest a, k* = argmin_k | |z_k| - |x| |, z_k the k largest (arXiv 2503.24277).

    Read and write vectors of nearly orthogonal unit features give codes as long as their input: the norm of x tells how
    many are active. It takes write vectors to be unit vectors, and x to be centred.
    """

    cap: int | None = eqx.field(static=True, default=None)
    """None: dense codes. A number: sparse codes of at most so many features a token; the smallest are lost beyond, and
    `at_cap` among the metrics of an objective is the fraction of tokens that reached it."""

    def __check_init__(self) -> None:
        """Raises UserError if the cap is not a positive number."""
        if self.cap is not None:
            check_k(self.cap)

    def codes(
        self,
        x: Array,
        rows: Array,
        bias: Array,
        *,
        k: Int[Array, ""] | None,
        weight: Array | None,
        training: bool,
    ) -> Codes:
        norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        if self.cap is None:
            return DenseCodes(nearest_norm(jax.nn.relu(x @ rows.T + bias), norm))
        # One more is offered than may be kept, as the selection never keeps all: the last slot stays empty.
        values, indices = encode_topk(x, rows, bias, k=min(self.cap + 1, rows.shape[0]))
        kept = nearest_norm(jax.nn.relu(values), norm)
        return SparseCodes(kept[..., : self.cap], indices[..., : self.cap], rows.shape[0], capped=True)

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> Codes:
        """The codes of a; how many is asked of the length of x."""
        a, norm = pre["codes_pre"], jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
        if self.cap is None:
            return DenseCodes(nearest_norm(jax.nn.relu(a), norm))
        values, indices = select_topk(a, k=min(self.cap + 1, a.shape[-1]))
        kept = nearest_norm(jax.nn.relu(values), norm)
        return SparseCodes(kept[..., : self.cap], indices[..., : self.cap], a.shape[-1], capped=True)

    def after_step(self, metrics: Metrics, step: Array) -> "TopAFA":
        return self


def check_foldable(activation: Any) -> None:
    """Raises UserError if codes depend on the length of the normalised input, which folding would change."""
    if isinstance(activation, TopAFA):
        raise UserError(
            "activation=TopAFA compares the codes with the length of the normalised input: folded, it would compare "
            "them with another. Keep the dictionary as it is; its means and scales are leaves of it."
        )


def nearest_norm(values: Float[Array, "*axes n"], norm: Float[Array, "*axes"]) -> Float[Array, "*axes n"]:
    """The k* largest of non-negative values, the others 0: those whose norm is nearest to `norm`.

    Equation: c_k = sqrt(sum of the k largest squares); k* = argmin over 1 <= k < n of |c_k - norm|, the least of them.
    Equal values are kept or dropped together. The gradient is that of the kept values. NaN is kept, so that it shows.

    Float32 numbers >= 0 are ordered as their bit patterns are: 31 rounds of bisection over the bits find the value at
    which the growing norm reaches `norm`, within rounding (`CLOSE`). Sums add over shards; nothing is sorted.
    """
    fixed, goal = jax.lax.stop_gradient((values.astype(jnp.float32), norm.astype(jnp.float32)[..., None]))
    bits = jax.lax.bitcast_convert_type(jnp.where(fixed > 0, fixed, 0.0), jnp.int32)
    bits = jnp.where(jnp.isnan(fixed), NOT_A_NUMBER, bits)  # above infinity, whatever its sign bit
    smallest, largest = jnp.min(bits, axis=-1, keepdims=True), jnp.max(bits, axis=-1, keepdims=True)

    def length(chosen: Bool[Array, "..."]) -> Float[Array, "..."]:
        return jnp.sqrt(jnp.sum(jnp.where(chosen, fixed**2, 0.0), axis=-1, keepdims=True))

    reached = goal * (1 - CLOSE)

    def narrow(step: Array, low: Array) -> Array:
        middle = low | (jnp.int32(1) << (30 - step))
        return jnp.where(length(bits >= middle) >= reached, middle, low)

    place = jnp.minimum(jax.lax.fori_loop(0, 31, narrow, jnp.zeros(goal.shape, jnp.int32)), largest)
    enough = length(bits > smallest) >= reached
    # Where all of them fall short, all but the last are kept without asking how much each adds: that would turn on the
    # rounding of a sum.
    place = jnp.where(enough, place, smallest)
    over, under = length(bits >= place), length(bits > place)
    with_it = (enough & (jnp.abs(over - goal) < jnp.abs(under - goal))) | (place == largest)
    return jnp.where((bits > place) | ((bits == place) & with_it), values, 0.0)


class GroupBias(eqx.Module):
    """z = gain * a where a + b > 0, else 0; b belongs to no gradient (arXiv 2506.14002).

    Features m stand in `groups` groups of neighbours, whose target frequencies p fall geometrically from `highest` to
    `lowest`. Every `every` steps, with f_m = the fraction of the tokens since the last time on which m was active,
    r_m = max(0, max over those tokens of a_m + b_m), R = the mean of the positive r of m's group:

        f_m > p:      b_m <- max(b_m - rate r_m, -1)
        f_m < 1e-6:   b_m <- min(b_m + rate R, 0)

    The objective must report `fired` and `largest`: r of its batch (see methods/group_bias_adaptation.py).
    """

    gain: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    adapted_bias: Float[Array, " features"] = eqx.field(metadata=STATE_ROWS)
    hits: Float[Array, " features"] = eqx.field(metadata=STATE_ROWS)
    largest: Float[Array, " features"] = eqx.field(metadata=STATE_ROWS)
    seen: Float[Array, ""] = eqx.field(metadata=STATE)
    groups: int = eqx.field(static=True)
    highest: float = eqx.field(static=True)
    lowest: float = eqx.field(static=True)
    every: int = eqx.field(static=True)
    rate: float = eqx.field(static=True)

    @classmethod
    def start(
        cls,
        features: int,
        *,
        groups: int,
        highest: float,
        lowest: float,
        every: int,
        rate: float,
        gain: float = 1.0,
    ) -> "GroupBias":
        """Equal gains and biases of 0: at first everything positive is active.

        Raises:
          UserError: a number is invalid.
        """
        if not gain > 0:
            raise UserError(f"gain={gain} must be positive.")
        zeros = jnp.zeros(features, jnp.float32)
        return cls(
            jnp.full(features, gain, jnp.float32),
            zeros,
            zeros,
            zeros,
            jnp.zeros((), jnp.float32),
            groups,
            highest,
            lowest,
            every,
            rate,
        )

    def __check_init__(self) -> None:
        """Raises UserError if groups, frequencies, the interval or the rate are invalid."""
        if self.groups < 1 or self.gain.shape[0] % self.groups:
            raise UserError(f"groups={self.groups} must divide features={self.gain.shape[0]}.")
        if not 0 < self.lowest <= self.highest < 1:
            raise UserError(f"frequencies must fall from highest={self.highest} to lowest={self.lowest} within (0, 1).")
        if self.every < 1 or self.rate < 0:
            raise UserError(f"every={self.every} must be at least 1, and rate={self.rate} not negative.")

    def targets(self) -> Float[Array, " features"]:
        """p: the target frequency of every feature."""
        frequencies = jnp.geomspace(self.highest, self.lowest, self.groups, dtype=jnp.float32)
        return jnp.repeat(frequencies, self.gain.shape[0] // self.groups)

    def codes(
        self,
        x: Array,
        rows: Array,
        bias: Array,
        *,
        k: Int[Array, ""] | None,
        weight: Array | None,
        training: bool,
    ) -> DenseCodes:
        pre = x @ rows.T + bias
        return DenseCodes(above(pre + self.adapted_bias, 0.0, self.gain * pre))

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> DenseCodes:
        """The codes of a."""
        a = pre["codes_pre"]
        return DenseCodes(above(a + self.adapted_bias, 0.0, self.gain * a))

    def after_step(self, metrics: Metrics, step: Array) -> "GroupBias":
        if not {"fired", "largest"} <= set(metrics):
            raise UserError(
                "GroupBias needs the metrics 'fired' and 'largest': add largest() to the objective's terms."
            )
        fired = metrics["fired"]
        counted = eqx.tree_at(
            lambda a: (a.hits, a.seen, a.largest),
            self,
            (
                self.hits + fired.total,
                self.seen + fired.count[0],
                jnp.maximum(self.largest, metrics["largest"].total),
            ),
        )
        return jax.tree.map(partial(jnp.where, (step + 1) % self.every == 0), counted.adapt(), counted)

    def adapt(self) -> "GroupBias":
        """The module's equation applied, and counting begun anew."""
        frequency = self.hits / jnp.maximum(self.seen, 1.0)
        by_group = self.largest.reshape(self.groups, -1)
        mean = jnp.sum(by_group, axis=1) / jnp.maximum(jnp.sum(by_group > 0, axis=1), 1)
        lower = jnp.maximum(self.adapted_bias - self.rate * self.largest, -1.0)
        raised = jnp.repeat(mean, by_group.shape[1])
        higher = jnp.minimum(self.adapted_bias + self.rate * raised, 0.0)
        bias = jnp.where(frequency < DEAD, higher, self.adapted_bias)
        bias = jnp.where(frequency > self.targets(), lower, bias)
        nothing = jnp.zeros_like(self.hits)
        changes = (bias, nothing, nothing, jnp.zeros_like(self.seen))
        return eqx.tree_at(lambda a: (a.adapted_bias, a.hits, a.largest, a.seen), self, changes)
