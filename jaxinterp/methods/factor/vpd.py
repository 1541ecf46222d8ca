"""Adversarial parameter decomposition (VPD): SPD whose masks are also chosen by an adversary that persists.

    loss = faithful * sum over matrices |D|^2 / |W|^2      (or its mean square: the paper's)
         + stochastic * KL(model || masked by random sources, a random subset of the matrices at each position)
         + adversarial * KL(model || masked by the adversary's sources, all matrices)
         + importance * sum_c f_c + frequency * sum_c f_c log2(1 + count f_c), f_c = batch mean of s(upper(h_c))

    s(g) = g^2 / (g^2 + gamma^2)      smooth L0, gamma falls from 1 to 0.01; or (g + 1e-12)^p with p falling (the paper)

The adversary holds a source in [0, 1] for every part of every matrix, and one for D, which no importance protects:
g = 0 there. It climbs the adversarial term by Adam (rate 0.01, betas 0.5 and 0.99) and is cut to [0, 1]; it lives on
from step to step, with its moments. `warmup` climbs come before each step on the same batch, and one more comes from
the gradient that the step computes anyway.

f_c must be the mean over the whole batch before the logarithm, on all devices: sums here are global.

Scopes of sources: one for every input and position ("each", the paper's runs), or shared by all ("shared").

Source: Goodfire 2026 (VPD), its code and specification; the shared definitions are those of `parameters`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxinterp.methods.factor.parameters import (
    Distance,
    Importances,
    Mask,
    Masked,
    Parts,
    distance,
    left_over,
    mask_from,
)


class Adversary(NamedTuple):
    """Sources with their Adam moments, by matrix: `sources[name]` [*scope, parts + 1], the last one for D."""

    sources: dict[str, Float[Array, "*_scope _with_rest"]]
    first: dict[str, Float[Array, "*_scope _with_rest"]]
    second: dict[str, Float[Array, "*_scope _with_rest"]]
    steps: Int[Array, ""]


def relative_faithfulness(
    weights: Mapping[str, Float[Array, "_in _out"]], parts: Mapping[str, Parts]
) -> Float[Array, ""]:
    """The mean over matrices of |D|^2 / |W|^2."""
    each = [jnp.sum(left_over(weight, parts[name]) ** 2) / jnp.sum(weight**2) for name, weight in weights.items()]
    return jnp.mean(jnp.stack(each))


def smooth_l0(
    g: Float[Array, "*axes"], gamma: Float[Array, ""] | float | int, *, at_one: bool = False
) -> Float[Array, "*axes"]:
    """g^2 / (g^2 + gamma^2); `at_one`: times 1 + gamma^2, so that g = 1 counts 1 whatever gamma is."""
    count = g**2 / (g**2 + gamma**2)
    return count * (1 + gamma**2) if at_one else count


def power(g: Float[Array, "*axes"], p: Float[Array, ""] | float | int, epsilon: float = 1e-12) -> Float[Array, "*axes"]:
    """(g + epsilon)^p: the paper's measure of activity."""
    return (g + epsilon) ** p


def annealed(
    step: Int[Array, ""] | int,
    steps: int,
    start: float | int,
    end: float | int,
    begin: float | int = 0.0,
    until: float | int = 1.0,
) -> Float[Array, ""]:
    """From `start` to `end` in a straight line between the shares `begin` and `until` of the steps."""
    progress = jnp.clip((step / steps - begin) / max(until - begin, 1e-9), 0, 1)
    return start + (end - start) * progress


def frequency_penalty(frequency: Float[Array, " parts"], count: Float[Array, ""] | float | int) -> Float[Array, ""]:
    """sum_c f_c log2(1 + count f_c); count: inputs of the global batch, or a constant."""
    return jnp.sum(frequency * jnp.log2(1 + count * frequency))


def adversarial_masks(
    importances: Mapping[str, Importances], sources: Mapping[str, Float[Array, "*_scope _with_rest"]]
) -> dict[str, Mask]:
    """g + (1 - g) s for the parts, s itself for D."""
    masks = {}
    for name, g in importances.items():
        source = jnp.broadcast_to(sources[name], (*g.lower.shape[:-1], g.lower.shape[-1] + 1))
        masks[name] = Mask(mask_from(g.lower, source[..., :-1]), source[..., -1])
    return masks


def adversarial(
    masked: Masked,
    clean: Float[Array, "*axes d"],
    importances: Mapping[str, Importances],
    sources: Mapping[str, Float[Array, "*_scope _with_rest"]],
    kind: Distance,
    weight: Float[Array, "*axes"] | None = None,
) -> Float[Array, ""]:
    """The distance under the adversary's masks, every matrix masked."""
    return distance(clean, masked(adversarial_masks(importances, sources)), kind, weight)


def subset_routing(key: PRNGKeyArray, names: tuple[str, ...], axes: tuple[int, ...]) -> dict[str, Bool[Array, "*axes"]]:
    """For every input, k ~ U{1..matrices} and k matrices at random: True where a matrix is masked."""
    count_key, order_key = jax.random.split(key)
    count = jax.random.randint(count_key, (*axes, 1), 1, len(names) + 1)
    luck = jax.random.uniform(order_key, (*axes, len(names)), jnp.float32)
    chosen = jnp.argsort(jnp.argsort(luck, axis=-1), axis=-1) < count
    return {name: chosen[..., index] for index, name in enumerate(names)}


def routed(masks: Mapping[str, Mask], chosen: Mapping[str, Bool[Array, "*axes"]]) -> dict[str, Mask]:
    """The masks where a matrix is chosen, and elsewhere all ones, D included: the model's own matrix, to rounding."""
    found = {}
    for name, mask in masks.items():
        here = chosen[name]
        rest = jnp.ones(here.shape, mask.parts.dtype) if mask.rest is None else mask.rest
        found[name] = Mask(jnp.where(here[..., None], mask.parts, 1), jnp.where(here, rest, 1))
    return found


def start_adversary(
    key: PRNGKeyArray, parts: Mapping[str, int], scope: tuple[int, ...] = (), initial: str = "random"
) -> Adversary:
    """Sources U(0, 1) ("random") or all 1 ("ones"), moments 0. `scope`: () shared, (batch,) or (batch, seq) each."""
    sources = {}
    for name, count in parts.items():
        key, own = jax.random.split(key)
        shape = (*scope, count + 1)
        sources[name] = (
            jax.random.uniform(own, shape, jnp.float32) if initial == "random" else jnp.ones(shape, jnp.float32)
        )
    zeros = jax.tree.map(jnp.zeros_like, sources)
    return Adversary(sources, zeros, jax.tree.map(jnp.zeros_like, sources), jnp.zeros((), jnp.int32))


def ascend(
    adversary: Adversary,
    gradient: Mapping[str, Float[Array, "*_scope _with_rest"]],
    *,
    rate: Float[Array, ""] | float | int = 0.01,
    betas: tuple[float, float] = (0.5, 0.99),
    epsilon: float = 1e-8,
) -> Adversary:
    """One step of Adam up the gradient, cut to [0, 1]."""
    steps = adversary.steps + 1
    first = {n: betas[0] * adversary.first[n] + (1 - betas[0]) * g for n, g in gradient.items()}
    second = {n: betas[1] * adversary.second[n] + (1 - betas[1]) * g**2 for n, g in gradient.items()}

    def moved(n: str) -> Array:
        """In the dtype of the sources, whatever that of whole numbers and rates is."""
        source = adversary.sources[n]
        one, two, size = (jnp.asarray(x, source.dtype) for x in (1 - betas[0] ** steps, 1 - betas[1] ** steps, rate))
        return jnp.clip(source + size * (first[n] / one) / (jnp.sqrt(second[n] / two) + epsilon), 0, 1)

    return Adversary({n: moved(n) for n in gradient}, first, second, steps)


def projected_ascent(
    loss: Callable[[dict[str, Float[Array, "*_scope _with_rest"]]], Float[Array, ""]],
    sources: Mapping[str, Float[Array, "*_scope _with_rest"]],
    *,
    steps: int = 20,
    rate: float = 0.1,
) -> dict[str, Float[Array, "*_scope _with_rest"]]:
    """The evaluation's adversary: fresh sources, `steps` steps of `rate` times the gradient's sign, cut to [0, 1]."""

    def climb(sources: dict[str, Array], _: None) -> tuple[dict[str, Array], None]:
        gradient = jax.grad(loss)(sources)
        return {n: jnp.clip(s + rate * jnp.sign(gradient[n]), 0, 1) for n, s in sources.items()}, None

    return jax.lax.scan(climb, dict(sources), None, length=steps)[0]
