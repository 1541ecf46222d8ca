"""Matrices as sums of parts: what SPD, VPD and APD learn, and which parts an input needs.

    W = sum_c v_c u_c^T + D        rank one (SPD, VPD): `Parts`, with a gate for each, `Gates`; both: `ParameterParts`
    W = sum_c A_c B_c              of some rank (APD): `Blocks`; together `AttributionParts`

    g = lower(h), penalised as upper(h);   h_c = b' + w' . gelu(w (v_c . x) + b)

Masks, losses and training: `jaxinterp.methods.factor.parameters`, `vpd`, `attribution_parameters`.

Source: Bushnaq, Braun, Sharkey 2025 (arXiv 2506.20790); Braun et al. 2025 (arXiv 2501.14926).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS


class Parts(eqx.Module):
    """The rank-one parts of one matrix: sum_c outer(read[c], write[c])."""

    read: Float[Array, "parts d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    write: Float[Array, "parts d_out"] = eqx.field(metadata=PARAMETER_ROWS)


class Gates(eqx.Module):
    """One small network a part, from v_c . x to the logit h_c."""

    weight: Float[Array, "parts hidden"] = eqx.field(metadata=PARAMETER_ROWS)
    bias: Float[Array, "parts hidden"] = eqx.field(metadata=PARAMETER_ROWS)
    out_weight: Float[Array, "parts hidden"] = eqx.field(metadata=PARAMETER_ROWS)
    out_bias: Float[Array, " parts"] = eqx.field(metadata=PARAMETER_ROWS)

    def __call__(self, inner: Float[Array, "*axes parts"]) -> Float[Array, "*axes parts"]:
        hidden = jax.nn.gelu(inner[..., None] * self.weight + self.bias, approximate=False)
        return jnp.sum(hidden * self.out_weight, axis=-1) + self.out_bias


class Importances(NamedTuple):
    """Of one matrix: what masks are made of, and what is penalised."""

    lower: Float[Array, "*axes parts"]
    upper: Float[Array, "*axes parts"]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def lower(h: Float[Array, "*axes"], leak: float = 0.01) -> Float[Array, "*axes"]:
    """clip(h, 0, 1), with the derivative leak at h <= 0 for negative cotangents: a gate that is shut can open."""
    return jnp.clip(h, 0, 1)


def _lower_forward(h: Array, leak: float) -> tuple[Array, Array]:
    return jnp.clip(h, 0, 1), h


def _lower_backward(leak: float, h: Array, cotangent: Array) -> tuple[Array]:
    below = jnp.where(cotangent < 0, leak * cotangent, 0)
    return (jnp.where(h <= 0, below, jnp.where(h <= 1, cotangent, 0)).astype(h.dtype),)


lower.defvjp(_lower_forward, _lower_backward)


def upper(h: Float[Array, "*axes"], leak: float = 0.01) -> Float[Array, "*axes"]:
    """clip(h, 0, 1) below 1, 1 + leak (h - 1) above: a gate that is wide open can shut. Slope 1 at 0 and at 1."""
    inside = jnp.where(h >= 0, h, 0)  # not `clip`, whose derivative at 0 and 1 is 1/2
    return jnp.where(h > 1, 1 + leak * (h - 1), inside)


def lower_of_the_paper(h: Float[Array, "*axes"], leak: float = 0.01) -> Float[Array, "*axes"]:
    """leak h below 0, h, 1 above 1: the paper's own lower sigmoid, whose values below 0 are kept."""
    return jnp.where(h > 0, jnp.where(h > 1, 1, h), leak * h)


def causal_importances(
    x: Float[Array, "*axes d_in"],
    parts: Parts,
    gates: Gates,
    *,
    leak: float = 0.01,
    squash: Callable[[Array, float], Array] = lower,
) -> Importances:
    """lower(h) and upper(h) of what a matrix reads in the unmasked model; call it once a step for all terms."""
    h = gates(x @ parts.read.T)
    return Importances(squash(h, leak), upper(h, leak))


class ParameterParts(eqx.Module):
    """Parts and gates of several matrices, by name."""

    parts: dict[str, Parts] = eqx.field(metadata=PARAMETER)
    gates: dict[str, Gates] = eqx.field(metadata=PARAMETER)
    leak: float = eqx.field(static=True, default=0.01)

    def importances(self, reads: dict[str, Float[Array, "..."]]) -> dict[str, Importances]:
        """g of every matrix for what it reads: one node of `lower` each."""
        return {
            name: causal_importances(x, self.parts[name], self.gates[name], leak=self.leak) for name, x in reads.items()
        }


class Lower(eqx.Module):
    """g of every matrix, as `MLPParts` asks for it."""

    learned: ParameterParts

    def __call__(self, reads: dict[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        return {name: g.lower for name, g in self.learned.importances(reads).items()}


class Blocks(eqx.Module):
    """Of one matrix, a block of rank m for every part: sum_c A_c B_c."""

    read: Float[Array, "parts d_in m"] = eqx.field(metadata=PARAMETER_ROWS)
    write: Float[Array, "parts m d_out"] = eqx.field(metadata=PARAMETER_ROWS)


class AttributionParts(eqx.Module):
    """Blocks of every matrix, by name: part c is block c of each."""

    blocks: dict[str, Blocks] = eqx.field(metadata=PARAMETER)
