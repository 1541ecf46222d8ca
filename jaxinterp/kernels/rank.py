"""What a selection goes by, where it is not the pre-activation itself.

    v, i = the k features of greatest score(a), with their pre-activations a = x W^T + b

A score of -inf forbids a feature. Scores are computed a few tokens at a time, on the shard that holds the features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Rank(NamedTuple):
    """A score of features: `score(pre, tokens, features)`, a function of the module level (it is a static argument).

    `tokens`: a tree of arrays with one row per token; `features`: a tree of arrays with one row per feature.
    """

    score: Callable[[Float[Array, "tokens features"], Any, Any], Float[Array, "tokens features"]]
    tokens: Any = ()
    features: Any = ()


def _size(pre: Array, tokens: Any, scale: Array | tuple[()]) -> Array:
    return jnp.abs(pre) if isinstance(scale, tuple) else jnp.abs(pre) * scale


def _above(pre: Array, tokens: Any, threshold: Array) -> Array:
    return jnp.where(pre <= threshold, -jnp.inf, pre)  # NaN is not forbidden, so that it shows


def _effect(pre: Array, tokens: tuple[Array, Array], decoder: Array) -> Array:
    gradient, own = tokens
    effect = jnp.abs(jnp.matmul(gradient, decoder.T, preferred_element_type=jnp.float32))
    return jnp.maximum(pre, 0) * (own[:, None] + effect)


def by_size(scale: Float[Array, " features"] | None = None) -> Rank:
    """Score |a|, or |a| * scale (with the norms of the write vectors: the size of what a feature writes)."""
    return Rank(_size, (), () if scale is None else scale)


def above(threshold: Float[Array, " features"]) -> Rank:
    """Score a where a > threshold, else forbidden: the selection of JumpReLU."""
    return Rank(_above, (), threshold)


def by_effect(
    gradient: Float[Array, "*axes d"], decoder: Float[Array, "features d"], own: Float[Array, ""] | float = 0.0
) -> Rank:
    """Score relu(a) (own + |gradient . D|): activation and first-order effect (Olmo et al. 2024, arXiv 2411.10397)."""
    return Rank(_effect, (gradient, jnp.full(gradient.shape[:-1], own, jnp.float32)), decoder)
