"""Rank-one edits of facts in one layer's MLP or attention, and how an edit is shared between the two.

    target     δ [d] = argmax M(resid/post <- resid/post + δ at the subject's last position)        gradient steps
    edit       W <- W + u δ^T,   u = C^-1 k / (k^T C^-1 k),   C = mean of key key^T over ordinary text

so that x W gains (x . u) δ: δ for the key k itself, and for others as little as possible (mean square over the text).
The key is `mlp/hidden` (W the down projection) or all heads' `attn/z` (W the output projection) at the subject's last
position. *Balanced*: the MLP writes ρ δ and attention (1 - ρ) δ, ρ = the MLP's share of the causal effect.

Every prompt of a batch has its own edit: the numbers are those of editing a copy of the model for each.

Sources: Meng et al. 2022, arXiv 2202.05262 (ROME: the edit); Hase et al. 2023, arXiv 2301.04213 (localisation does not
predict where to edit); IntAttn-Edit 2025 (attention as well as MLPs, updates balanced by contribution; recalled).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.causal.layerwise import Layers, Look
from jaxinterp.causal.measure import Metric
from jaxinterp.core.errors import UserError

KEYS = {"mlp": ("mlp/hidden", "mlp/out"), "attn": ("attn/z", "attn/out")}
"""Sublayer -> the array that its last matrix reads, and what it writes."""


class Update(NamedTuple):
    """A rank-one edit for every prompt: what the key is multiplied with, and what is written."""

    read: Float[Array, "batch d_key"]
    write: Float[Array, "batch d"]


def key_readers(
    keys: Float[Array, "batch d_key"], covariance: Float[Array, "d_key d_key"], ridge: float = 0.05
) -> Float[Array, "batch d_key"]:
    """u = C^-1 k / (k^T C^-1 k) for every key; C + ridge * mean diagonal * I is inverted.

    Raises:
      UserError: ridge is negative.
    """
    if ridge < 0:
        raise UserError(f"ridge={ridge} must not be negative.")
    size = covariance.shape[0]
    lifted = covariance + ridge * jnp.trace(covariance) / size * jnp.eye(size, dtype=covariance.dtype)
    solved = jnp.linalg.solve(lifted, keys.T).T
    return solved / jnp.sum(solved * keys, axis=1, keepdims=True)


@eqx.filter_jit
def solve_target(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    layer: Int[Array, ""],
    position: int,
    *,
    steps: int = 20,
    rate: float = 0.5,
    decay: float = 0.02,
) -> Float[Array, "batch d"]:
    """δ for every prompt by Adam on metric - decay d |δ|^2 / |x|^2; one program for all layers.

    Args:
      metric: what the edit shall raise.
      position: of `resid/post`, from the front or (negative) the end.
      rate: in units of |x| / sqrt(d) at that position.
    """
    start = layers.ends.embedding(tokens)
    place = position % tokens.shape[1]

    def through(index: Array, x: Array) -> Array:
        return layers.block(index)(x)

    before = jax.lax.fori_loop(0, layer + 1, through, start)
    size = jnp.linalg.norm(before[:, place], axis=-1, keepdims=True)

    def loss(delta: Array) -> Array:
        def step(x: Array, given: tuple[Array, PyTree]) -> tuple[Array, None]:
            after = eqx.combine(given[1], layers.rest)(x)
            return jnp.where(given[0] > layer, after, x), None

        x = before.at[:, place].add(delta)
        x, _ = jax.lax.scan(step, x, (jnp.arange(layers.count), layers.arrays))
        return -jnp.sum(layers.metric(metric, x)) + decay * jnp.sum(jnp.square(delta / size)) * delta.shape[-1]

    unit = size / jnp.sqrt(before.shape[-1])

    def adam(count: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        delta, first, second = state
        slope = jax.grad(loss)(delta)
        first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
        t = count + 1.0
        change = (first / (1 - 0.9**t)) / (jnp.sqrt(second / (1 - 0.99**t)) + 1e-12)
        return delta - rate * unit * change, first, second

    zero = jnp.zeros((tokens.shape[0], before.shape[-1]), before.dtype)
    return jax.lax.fori_loop(0, steps, adam, (zero, zero, zero))[0]


@eqx.filter_jit
def edited_metric(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    layer: Int[Array, ""],
    mlp: Update | None = None,
    attention: Update | None = None,
) -> Float[Array, " batch"]:
    """The metric of every prompt under its own rank-one edit of the down or output projection of one layer."""
    updates = {"mlp": mlp, "attn": attention}

    def step(x: Array, given: tuple[Array, PyTree]) -> tuple[Array, None]:
        keys: dict[str, Array] = {}

        def put(name: str, value: Array) -> Array:
            for part, (key, out) in KEYS.items():
                update = updates[part]
                if update is not None and name == key:
                    keys[part] = value.reshape(*value.shape[:2], -1)
                if update is not None and name == out:
                    amount = jnp.einsum("bsk,bk->bs", keys[part], update.read) * (given[0] == layer)
                    value = value + (amount[..., None] * update.write[:, None]).astype(value.dtype)
            return value

        return eqx.combine(given[1], layers.rest)(x, tap=Look(edit=put)), None

    x, _ = jax.lax.scan(step, layers.ends.embedding(tokens), (jnp.arange(layers.count), layers.arrays))
    return layers.metric(metric, x)


def balanced(
    delta: Float[Array, "batch d"], mlp_effect: Float[Array, " batch"], attention_effect: Float[Array, " batch"]
) -> tuple[Float[Array, "batch d"], Float[Array, "batch d"]]:
    """ρ δ for the MLP and (1 - ρ) δ for attention, ρ = |MLP's effect| / (|MLP's| + |attention's|).

    ρ = 1/2 where both effects are 0.
    """
    one, other = jnp.abs(mlp_effect), jnp.abs(attention_effect)
    share = jnp.where(one + other > 0, one / jnp.maximum(one + other, 1e-30), 0.5)[:, None]
    return share * delta, (1 - share) * delta
