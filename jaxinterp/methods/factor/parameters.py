"""Stochastic parameter decomposition (SPD): weight matrices as sums of rank-one parts that most inputs do not need.

    W = sum_c v_c u_c^T + D                         v_c: read vector, u_c: write vector, D: what is left over
    g_c(x) in [0, 1]                                causal importance of part c for this input
    m_c = g_c + (1 - g_c) r_c,   r_c ~ U(0, 1)      a mask: what is not important may be there or not
    y = ((x V^T) * m) U + m_D x D (+ b)             the matrix under the mask; m_D ~ U(0, 1)

x [*, d_in], V [parts, d_in], U [parts, d_out], W and D [d_in, d_out]. Masked, the model must still do what it did:

    loss = faithful * sum |D|^2 / numbers of W            where D has no mask of its own
         + stochastic * distance(model, model with every matrix masked)
         + layerwise * mean over matrices of distance(model, model with this one masked)
         + importance * mean over inputs of sum_c upper(h_c)^p

The gate of part c is a network of its own: h_c = b' + w' . gelu(w (v_c . x) + b), all of `hidden` numbers; g = lower(h)
makes masks, upper(h) is penalised. Both are hard sigmoids that leak, so that no gate is stuck:

    lower   clip(h, 0, 1); its derivative at h <= 0 is `leak`, and only for cotangents that would raise h
    upper   clip(h, 0, 1) below 1 and 1 + leak (h - 1) above, with its own derivative
    (the paper's lower one has slope `leak` below 0 in its values too, so that masks may be negative)

The leak of `lower` is not linear in the cotangent: all terms must share one `lower(h)`, whose cotangents are summed
before the leak looks at their sign. `causal_importances` is that node; `terms` calls it once.

Source: Bushnaq, Braun, Sharkey 2025 (arXiv 2506.20790) with the authors' later rules: the part D with a mask of its
own, and the leak with a derivative only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxinterp.decompositions.parameter_parts import (
    Gates,
    Importances,
    Parts,
    causal_importances,
    lower,
    lower_of_the_paper,
    upper,
)

__all__ = ["Gates", "Importances", "Parts", "causal_importances", "lower", "lower_of_the_paper", "upper"]

Distance = Literal["squares", "kl"]


class Mask(NamedTuple):
    """Of one matrix: m_c for every part, and m_D for what is left over; None: nothing of it."""

    parts: Float[Array, "*axes parts"]
    rest: Float[Array, "*axes"] | None = None


Masked = Callable[[Mapping[str, Mask]], Array]
"""The model's output with these matrices masked; matrices that are not named are the model's own."""


def mask_from(
    importance: Float[Array, "*axes parts"], source: Float[Array, "*others parts"]
) -> Float[Array, "*axes parts"]:
    """g + (1 - g) r: at least g, at most 1. The source r in [0, 1] is random, or an adversary's; it broadcasts."""
    return importance + (1 - importance) * source


def left_over(weight: Float[Array, "d_in d_out"], parts: Parts) -> Float[Array, "d_in d_out"]:
    """D = W - sum_c outer(v_c, u_c)."""
    return weight - parts.read.T @ parts.write


def masked_linear(
    x: Float[Array, "*axes d_in"],
    weight: Float[Array, "d_in d_out"],
    parts: Parts,
    mask: Mask,
    bias: Float[Array, " d_out"] | None = None,
) -> Float[Array, "*axes d_out"]:
    """((x V^T) * m) U + m_D x D + b; `bias` is the model's own and never masked."""
    y = ((x @ parts.read.T) * mask.parts) @ parts.write
    if mask.rest is not None:
        y = y + mask.rest[..., None] * (x @ left_over(weight, parts))
    return y if bias is None else y + bias


def faithfulness(weights: Mapping[str, Float[Array, "_in _out"]], parts: Mapping[str, Parts]) -> Float[Array, ""]:
    """The mean of D^2 over all numbers of all matrices together."""
    squares = sum(jnp.sum(left_over(weight, parts[name]) ** 2) for name, weight in weights.items())
    return jnp.asarray(squares / sum(weight.size for weight in weights.values()))


def distance(
    clean: Float[Array, "*axes d"],
    masked: Float[Array, "*axes d"],
    kind: Distance,
    weight: Float[Array, "*axes"] | None = None,
) -> Float[Array, ""]:
    """squares: the mean over inputs and outputs; kl: the mean over inputs of KL(clean || masked) of their softmax.

    `weight`: of inputs, 0 for those that do not count.
    """
    if kind == "squares":
        return mean_over_inputs(jnp.mean((clean - masked) ** 2, axis=-1, keepdims=True), weight)[0]
    log_p, log_q = jax.nn.log_softmax(clean), jax.nn.log_softmax(masked)
    return mean_over_inputs(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1, keepdims=True), weight)[0]


def mean_over_inputs(
    values: Float[Array, "*axes parts"], weight: Float[Array, "*axes"] | None = None
) -> Float[Array, " parts"]:
    """The (weighted) mean over all axes but the last."""
    axes = tuple(range(values.ndim - 1))
    if weight is None:
        return jnp.mean(values, axis=axes)
    return jnp.sum(values * weight[..., None], axis=axes) / jnp.maximum(jnp.sum(weight), 1e-9)


def importance_minimality(
    upper_importances: Mapping[str, Float[Array, "..."]],
    p: Float[Array, ""] | float | int,
    *,
    epsilon: float = 1e-12,
    weight: Float[Array, "*axes"] | None = None,
) -> Float[Array, ""]:
    """sum over matrices and parts of the mean over inputs of (upper + epsilon)^p. Not divided by matrices or parts."""
    total = jnp.zeros((), jnp.float32)
    for values in upper_importances.values():
        total = total + jnp.sum(mean_over_inputs((values + epsilon) ** p, weight))
    return total


def stochastic(
    masked: Masked,
    clean: Float[Array, "*axes d"],
    importances: Mapping[str, Importances],
    sources: Mapping[str, Mask],
    kind: Distance,
    weight: Float[Array, "*axes"] | None = None,
) -> Float[Array, ""]:
    """The distance with every matrix masked at once; `sources`: the r of every matrix, and its m_D."""
    return distance(clean, masked(masks_from(importances, sources)), kind, weight)


def layerwise(
    masked: Masked,
    clean: Float[Array, "*axes d"],
    importances: Mapping[str, Importances],
    sources: Mapping[str, Mask],
    kind: Distance,
    weight: Float[Array, "*axes"] | None = None,
) -> Float[Array, ""]:
    """The mean over matrices of the distance with that one masked and the others the model's own."""
    each = [
        distance(clean, masked({name: mask}), kind, weight) for name, mask in masks_from(importances, sources).items()
    ]
    return jnp.mean(jnp.stack(each))


def masks_from(importances: Mapping[str, Importances], sources: Mapping[str, Mask]) -> dict[str, Mask]:
    """g + (1 - g) r for every matrix, with its m_D as it is."""
    return {name: Mask(mask_from(g.lower, sources[name].parts), sources[name].rest) for name, g in importances.items()}


def uniform_sources(key: PRNGKeyArray, importances: Mapping[str, Importances], *, rest: bool = True) -> dict[str, Mask]:
    """r ~ U(0, 1) for every input and part, and m_D ~ U(0, 1) for every input."""
    sources = {}
    for name, g in importances.items():
        key, part_key, rest_key = jax.random.split(key, 3)
        free = jax.random.uniform(rest_key, g.lower.shape[:-1], g.lower.dtype) if rest else None
        sources[name] = Mask(jax.random.uniform(part_key, g.lower.shape, g.lower.dtype), free)
    return sources


class Coefficients(NamedTuple):
    """What each term counts; 0 leaves it out. The defaults are the authors' for TMS 5-2, with D masked."""

    faithful: float = 0.0
    stochastic: float = 1.0
    layerwise: float = 1.0
    importance: float = 3e-3


def terms(
    masked: Masked,
    clean: Float[Array, "*axes d"],
    weights: Mapping[str, Float[Array, "_in _out"]],
    parts: Mapping[str, Parts],
    importances: Mapping[str, Importances],
    sources: Mapping[str, Mask],
    *,
    kind: Distance,
    p: Float[Array, ""] | float | int,
    coefficients: Coefficients | None = None,
    weight: Float[Array, "*axes"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss with given random sources, and every term before its coefficient.

    `importances` must come from one call of `causal_importances` a matrix (see the module). `sources`: the same draw in
    both distances here; give `stochastic` and `layerwise` their own where the draws differ.
    """
    asked = Coefficients() if coefficients is None else coefficients
    found = {
        "faithful": faithfulness(weights, parts),
        "stochastic": stochastic(masked, clean, importances, sources, kind, weight),
        "layerwise": layerwise(masked, clean, importances, sources, kind, weight)
        if asked.layerwise
        else jnp.zeros((), jnp.float32),
        "importance": importance_minimality({name: g.upper for name, g in importances.items()}, p, weight=weight),
    }
    counts = zip(asked, found.values(), strict=True)
    return sum((coefficient * value for coefficient, value in counts), jnp.zeros((), jnp.float32)), found


def start_parts(key: PRNGKeyArray, parts: int, d_in: int, d_out: int) -> Parts:
    """Normal, with standard deviation 1/sqrt(d_in) for read vectors and 1/sqrt(parts) for write vectors."""
    read_key, write_key = jax.random.split(key)
    read = jax.random.normal(read_key, (parts, d_in), jnp.float32) / math.sqrt(d_in)
    return Parts(read, jax.random.normal(write_key, (parts, d_out), jnp.float32) / math.sqrt(parts))


def start_gates(key: PRNGKeyArray, parts: int, hidden: int) -> Gates:
    """Normal with gain sqrt(2) into the hidden numbers (each reads one), gain 1 over sqrt(hidden) out; biases 0."""
    in_key, out_key = jax.random.split(key)
    weight = math.sqrt(2) * jax.random.normal(in_key, (parts, hidden), jnp.float32)
    out = jax.random.normal(out_key, (parts, hidden), jnp.float32) / math.sqrt(hidden)
    return Gates(weight, jnp.zeros((parts, hidden), jnp.float32), out, jnp.zeros(parts, jnp.float32))


def mean_max_cosine(
    weight: Float[Array, "d_in d_out"], parts: Parts, alive: Bool[Array, " parts"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """MMCS and ML2R: are the rows of W single parts, in direction and in length?

    For input j, the part c nearest to row j of W by cosine of outer(v_c, u_c)[j]; the means over j of that cosine, and
    of the ratio of the two lengths. (The inputs of TMS are features: row j of its first matrix is a mechanism.)

    Args:
      alive: parts that may be the nearest, such as those that are important for some input. None: all, as the authors
        do; then a part that no input uses, of next to no length, can have the largest cosine by chance.
    """
    rows = jnp.einsum("cj,co->jco", parts.read, parts.write)
    length, own = jnp.linalg.norm(rows, axis=-1), jnp.linalg.norm(weight, axis=-1)
    cosines = jnp.einsum("jco,jo->jc", rows, weight) / jnp.maximum(length * own[:, None], 1e-12)
    nearest = jnp.argmax(cosines if alive is None else jnp.where(alive, cosines, -jnp.inf), axis=1)
    chosen = jnp.arange(weight.shape[0]), nearest
    return jnp.mean(cosines[chosen]), jnp.mean(length[chosen] / own)
