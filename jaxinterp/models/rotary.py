"""Rotary positions: every pair of dimensions of a query or key turns by position times frequency.

    frequency_i = base^(-2i / dimensions),   i < dimensions / 2,   radians per position

Longer contexts than a model was trained for are reached by slower frequencies (`RopeScaling`):

    linear        frequency / factor
    llama3        slow frequencies / factor, fast ones kept, those between interpolated (Llama 3.1's reference code)
    dynamic       base * (factor L / C - (factor - 1))^(d / (d - 2)) for a text of L tokens, more than C; else unscaled
                  (NTK-aware, bloc97 and emozilla)
    yarn          as llama3, with a ramp over the dimensions (arXiv 2309.00071, section 3.2); cos and sin times
                  `attention_factor`
    longrope      frequency / short_factors_i, or / long_factors_i for more than C tokens (arXiv 2402.13753); cos and
                  sin times `attention_factor`
    proportional  the first `fraction` of the pairs of the whole head turn, at base^(-2i / head_dim) / factor (Gemma 4)

C is `original_context`. The length L is the largest position of the batch plus one, as in Hugging Face transformers:
with "dynamic" and "longrope" a text's numbers depend on the longest text beside it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.core.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts; see the module's equations.

    Attributes:
      low_frequency_factor, high_frequency_factor: llama3: at most so many turns within the original context are
        slowed down, at least so many are kept.
      original_context: C of the equations, in tokens.
      attention_factor: cos and sin are multiplied by it (yarn, longrope).
      fast_turns, slow_turns: yarn: between so many turns within the original context the ramp rises (32 and 1).
      whole_dimensions: yarn: the ramp begins and ends at whole dimensions.
      short_factors, long_factors: longrope: one a pair of dimensions.
      fraction: proportional: of the pairs that turn.
    """

    kind: Literal["linear", "llama3", "dynamic", "yarn", "longrope", "proportional"]
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    whole_dimensions: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    fraction: float = 1.0

    def check(self, dimensions: int) -> None:
        """Raises UserError where the scaling does not fit so many rotated dimensions."""
        for name, factors in (("short_factors", self.short_factors), ("long_factors", self.long_factors)):
            if self.kind == "longrope" and len(factors) != dimensions // 2:
                raise UserError(
                    f"{name} has {len(factors)} numbers for {dimensions} rotated dimensions: give {dimensions // 2}, "
                    "one a pair."
                )
        if self.kind == "dynamic" and dimensions < 4:
            raise UserError(f"rope_type 'dynamic' needs at least 4 rotated dimensions, not {dimensions}.")


# Inside `jax.jit` they are inlined; outside they are one program, not one for each operation.
@partial(jax.jit, static_argnames=("dimensions", "base", "scaling"), inline=True)
def rotary_frequencies(
    dimensions: int, base: float, scaling: RopeScaling | None, length: int | Int[Array, ""] = 0
) -> Float[Array, " half"]:
    """The frequency of each pair of dimensions, stretched by `scaling`; radians per position.

    Args:
      length: L of the module's equations; only "dynamic" and "longrope" look at it.
    """
    exponents = jnp.arange(0, dimensions, 2, dtype=jnp.float32) / dimensions
    frequencies = base**-exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "dynamic":
        longer = jnp.maximum(jnp.asarray(length, jnp.float32), scaling.original_context)
        stretch = scaling.factor * longer / scaling.original_context - (scaling.factor - 1)
        return (base * stretch ** (dimensions / (dimensions - 2))) ** -exponents
    if scaling.kind == "longrope":
        long = jnp.asarray(length) > scaling.original_context
        return frequencies / jnp.where(
            long, jnp.asarray(scaling.long_factors, jnp.float32), jnp.asarray(scaling.short_factors, jnp.float32)
        )
    if scaling.kind == "proportional":
        turning = int(scaling.fraction * dimensions // 2)
        return jnp.where(jnp.arange(dimensions // 2) < turning, frequencies / scaling.factor, 0.0)
    keep = _kept(frequencies, scaling) if scaling.kind == "llama3" else _yarn_ramp(dimensions, base, scaling)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _kept(frequencies: Float[Array, " half"], scaling: RopeScaling) -> Float[Array, " half"]:
    """llama3: 1 for frequencies that are kept, 0 for those that are slowed down."""
    turns = scaling.original_context * frequencies / (2 * jnp.pi)  # full turns within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return jnp.clip((turns - low) / (high - low), 0.0, 1.0)


def _yarn_ramp(dimensions: int, base: float, scaling: RopeScaling) -> Float[Array, " half"]:
    """yarn: 1 - clip((i - low) / (high - low), 0, 1), low and high where fast_turns and slow_turns fit C."""

    def pair(turns: float) -> float:
        return dimensions * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.fast_turns), pair(scaling.slow_turns)
    if scaling.whole_dimensions:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    high = high + 0.001 if high == low else high
    return 1 - jnp.clip((jnp.arange(dimensions // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all: float | None = None) -> float:
    """What yarn multiplies cos and sin by: 0.1 ln(factor) + 1, or with both scales the quotient of two such numbers."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all) if mscale and mscale_all else of(1.0)


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """What longrope multiplies cos and sin by: sqrt(1 + ln(factor) / ln(original_context)), 1 for factor <= 1."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context))


@partial(jax.jit, static_argnames=("interleaved", "amplitude"), inline=True)
def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    frequencies: Float[Array, " half"],
    positions: Int[Array, "batch seq"] | None = None,
    *,
    interleaved: bool = False,
    amplitude: float = 1.0,
) -> Float[Array, "batch seq heads head_dim"]:
    """Turn the first 2 * half dimensions of every head by position times frequency.

    Args:
      positions: by default 0, 1, 2, ... for every row.
      interleaved: dimension 2i is paired with 2i + 1 (GPT-J, Cohere, Llama 4); otherwise i with i + half, the layout of
        most Hugging Face files. The dimensions after 2 * half pass unchanged.
      amplitude: cos and sin are multiplied by it.
    """
    half = frequencies.shape[0]
    if positions is None:
        angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    else:
        angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos = (amplitude * jnp.cos(angles))[..., None, :].astype(x.dtype)
    sin = (amplitude * jnp.sin(angles))[..., None, :].astype(x.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return jnp.concatenate([pairs.reshape(turned.shape), rest], axis=-1)
    first, second = turned[..., :half], turned[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
