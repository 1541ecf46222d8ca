"""Description length: how many bits a token's codes take, at a stated precision.

Codes are rounded to multiples of a step of their own component's size,

    q_tc = round(c_tc / (step s_c)),   s_c = root mean square of c_tc over the tokens where component c is active

with the largest `step` for which rounding changes the output by at most `tolerance` of the target's variance (by
halving, on given tokens). Then every component is coded on its own, by the entropy of its whole numbers, 0 included:

    bits per token = sum over components c of H(q_c),   H = -sum over values v of p_c(v) log2 p_c(v)

p_c(v): how often component c has the value v on these tokens (a plug-in estimate: too low where a component is active
on few of them). What decodes without codes (a skip path, neurons that every token uses) is not counted: both sides
have the input there.

Source: the idea is that of Ayonrinde, Pearce, Sharkey 2024 (MDL for sparse autoencoders, arXiv 2410.11179); the rule
for the precision is this project's.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Decomposition
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.codes import OneLayer, SparseCodes

COARSEST, FINEST = 4.0, 2.0**-12
"""Steps that are tried lie between these."""

LEAST = 1e-12
"""Of the greatest value: the least size of a component."""


class DescriptionLength(NamedTuple):
    """Bits per token, the step, and the share of the target's variance that rounding changes the output by."""

    bits: float
    step: float
    change: float


def description_length(
    decomposition: Decomposition,
    x: Float[Array, "tokens d_in"],
    variance: float,
    *,
    tolerance: float = 0.01,
    halvings: int = 10,
) -> DescriptionLength:
    """The description length of the codes of x.

    Args:
      x: what the decomposition reads, tokens that count only.
      variance: of the target, summed over dimensions: the unit of `tolerance`.
      tolerance: the largest share of it by which rounding may change the output.
      halvings: of the interval (on a log scale) in which the step is looked for.
    Raises:
      UserError: variance or tolerance is not positive, or the codes are those of several layers.
    """
    if not (variance > 0 and tolerance > 0):
        raise UserError(f"variance={variance} and tolerance={tolerance} must be positive.")
    codes = _encode(decomposition, x)
    sizes = _sizes(codes)
    whole = _decode(decomposition, codes, x)

    def change(step: float) -> float:
        rounded = _rounded(codes, sizes, jnp.float32(step))
        return float(jnp.mean(jnp.sum((_decode(decomposition, rounded, x) - whole) ** 2, axis=-1))) / variance

    low, high = math.log2(FINEST), math.log2(COARSEST)
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if change(2**middle) <= tolerance else (low, middle)
    numbers, component = _whole_numbers(codes, sizes, 2**low)
    return DescriptionLength(entropy_bits(numbers, component, x.shape[0]), 2**low, change(2**low))


def entropy_bits(numbers: Int[np.ndarray, " entries"], component: Int[np.ndarray, " entries"], tokens: int) -> float:
    """sum over components of the entropy of their whole numbers, in bits per token.

    Args:
      numbers, component: what is not 0, and whose it is; on the remaining tokens a component is 0.
    """
    kept = numbers != 0
    _, counts = np.unique(np.stack([component[kept], numbers[kept]]), axis=1, return_counts=True)
    _, active = np.unique(component[kept], return_counts=True)
    zeros = tokens - active
    share = np.concatenate([counts, zeros[zeros > 0]]) / tokens
    return float(-np.sum(share * np.log2(share)))


def _sizes(codes: OneLayer) -> Float[Array, " features"]:
    """s_c of the module's equation; 1 for a component that is never active.

    Squares are taken of values in units of the greatest, so that none is lost; a component that is smaller than that by
    a factor of 1e12 gets this size: its values are rounded to 0.
    """
    count = codes.fired(jnp.ones(codes.values.shape[:-1]))
    values = codes.values.reshape(-1, codes.values.shape[-1])
    greatest = jnp.max(jnp.abs(values))
    unit = jnp.where(greatest > 0, greatest, 1.0)
    squares = (values / unit) ** 2
    if isinstance(codes, SparseCodes):
        total = jnp.zeros(codes.features, squares.dtype).at[codes.indices.reshape(squares.shape)].add(squares)
    else:
        total = jnp.sum(squares, axis=0)
    size = unit * jnp.maximum(jnp.sqrt(total / jnp.maximum(count, 1)), LEAST)
    return jnp.where(count > 0, size, 1.0)


def _per_value(codes: OneLayer, sizes: Array) -> Array:
    return sizes[codes.indices] if isinstance(codes, SparseCodes) else sizes


@eqx.filter_jit
def _rounded(codes: OneLayer, sizes: Array, step: Array) -> OneLayer:
    unit = _per_value(codes, sizes) * step
    return eqx.tree_at(lambda c: c.values, codes, jnp.round(codes.values / unit) * unit)


def _whole_numbers(codes: OneLayer, sizes: Array, step: float) -> tuple[np.ndarray, np.ndarray]:
    """(whole numbers, components) of all entries."""
    numbers = np.asarray(jnp.round(codes.values / (_per_value(codes, sizes) * step))).astype(np.int64)
    if isinstance(codes, SparseCodes):
        return numbers.ravel(), np.asarray(codes.indices).ravel()
    return numbers.ravel(), np.broadcast_to(np.arange(codes.features), numbers.shape).ravel()


@eqx.filter_jit
def _encode(decomposition: Decomposition, x: Array) -> OneLayer:
    codes = decomposition.encode(x)
    if not isinstance(codes, OneLayer):
        raise UserError(f"{type(codes).__name__} of {type(decomposition).__name__}: give the codes of one layer.")
    return codes


@eqx.filter_jit
def _decode(decomposition: Decomposition, codes: OneLayer, x: Array) -> Array:
    return decomposition.decode(codes, x)
