"""Experts of a mixture switched off and on, in the two meanings of "off".

    renormalise   the router chooses as ever; the weight of a chosen expert that is off becomes 0, and the other chosen
                  ones are scaled to the same sum: no other expert takes its place
    replace       the logit of an expert that is off becomes the lowest: the next best expert is chosen in its place

An expert that is on gets the largest logit of its token plus `margin`, so that it is chosen; in both modes.

Where all chosen experts are off, "renormalise" leaves weights 0: the MLP then writes nothing.

Source: MoTE, arXiv 2502.11096, switches routed experts off and renormalises; masking logits is what most serving code
does. The two differ (see the test).
"""

from typing import Any, Literal, get_args

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.mixtures.moe_x import MoEX
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.sites import replace, select

Mode = Literal["renormalise", "replace"]


class Switched(eqx.Module):
    """A mixture with experts off and on: a leaf that takes the mixture's place, its arrays offered as before."""

    mixture: MoEX
    off: tuple[int, ...] = eqx.field(static=True)
    on: tuple[int, ...] = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    margin: float = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        return self.mixture(x, tap=_Switch(self, tap), rules=rules)


class _Switch:
    """The tap of one pass: it changes logits and weights on their way, then offers them to the tap above."""

    def __init__(self, own: Switched, above: Tap) -> None:
        self.own, self.above = own, above
        self.index: Any = None

    def __call__(self, name: str, value: Array) -> Array:
        own = self.own
        if name == "router":
            top = jnp.max(value, axis=-1, keepdims=True)
            for expert in own.on:
                value = value.at[..., expert].set(top[..., 0] + own.margin)
            if own.mode == "replace" and own.off:
                value = value.at[..., jnp.asarray(own.off)].set(jnp.finfo(value.dtype).min)
        if name == "experts/index":
            value = self.index = self.above(name, value)
            return value
        if name == "experts/weight" and own.mode == "renormalise" and own.off:
            kept = jnp.where(jnp.isin(self.index, jnp.asarray(own.off)), 0.0, value)
            left = jnp.sum(kept, axis=-1, keepdims=True)
            whole = jnp.sum(value, axis=-1, keepdims=True)
            value = jnp.where(left > 0, kept * whole / jnp.where(left > 0, left, 1.0), 0.0).astype(value.dtype)
        return self.above(name, value)


def switch_experts(
    model: PyTree,
    leaf: str,
    *,
    off: tuple[int, ...] = (),
    on: tuple[int, ...] = (),
    mode: str = "renormalise",
    margin: float = 1.0,
) -> PyTree:
    """A new model with experts of the mixture at `leaf` (`blocks/3/mlp`) switched off and on.

    Args:
      off, on: numbers of experts; none may be in both.
      mode: what "off" means, see the module's docstring.
      margin: how far above the largest logit an expert that is on gets.
    Raises:
      UserError: the leaf is not a mixture with one router over all experts, an expert that does not exist, one that is
        both, as many off as leave fewer than k to "replace", an unknown mode, or an unknown leaf.
    """
    if mode not in get_args(Mode):
        raise UserError(f"mode={mode!r} is unknown.{suggest(mode, get_args(Mode))}")
    mixture = select(model, leaf).get()
    if not isinstance(mixture, MoEX):
        raise UserError(
            f"{leaf!r} is a {type(mixture).__name__}: experts are switched where one router chooses among all of them "
            "(MoEX); elsewhere edit 'router' or 'experts/weight'."
        )
    experts = mixture.up.shape[0]
    for number in (*off, *on):
        if not 0 <= number < experts:
            raise UserError(f"expert {number} does not exist: {leaf!r} has {experts}, counted from 0.")
    if both := sorted(set(off) & set(on)):
        raise UserError(f"expert {both[0]} is both off and on.")
    if mode == "replace" and experts - len(set(off)) < mixture.k:
        raise UserError(f"{len(set(off))} of {experts} experts off leaves fewer than k={mixture.k}: switch fewer off.")
    return replace(model, {leaf: Switched(mixture, tuple(off), tuple(on), mode, margin)})
