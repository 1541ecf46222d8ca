"""Rules change the derivatives of a forward pass, never its values.

`EXACT` is ordinary differentiation. `RELEVANCE` replaces three derivatives by the propagation coefficients of relevance
patching (RelP):

    norm        y = x / s(x)      the scale s is a constant for the derivative
    activation  y = f(x)          slope f(x) / x, the secant through the origin, instead of f'(x); f'(0) at x = 0
    gate        y = a * b         half of the product rule: dy = (b da + a db) / 2

so that in a bias-free network  sum_i x_i rho_i = f(x)  for the modified gradient rho. `attention` (off by default, as
in the paper) also holds the attention pattern constant, with the gate behind it and the factor by which values are
clipped, which makes the sum exact through attention layers.

Source: RelP, arXiv 2508.21258; the rules are those of layer-wise relevance propagation (Ali et al. 2022, AttnLRP).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu", "identity"]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Rules:
    """Which derivatives a forward pass replaces; a static value, chosen per call of `run`.

    Example:
      >>> relevance = Rules(norm=True, gate=True, activation=True)
      >>> relevance == RELEVANCE, Rules() == EXACT
      (True, True)
    """

    norm: bool = False
    activation: bool = False
    gate: bool = False
    attention: bool = False  # hold the pattern, the gate behind it, and the factor of a clip


EXACT = Rules()
RELEVANCE = Rules(norm=True, activation=True, gate=True)


def activate(name: Activation, x: Float[Array, "*axes"], rules: Rules = EXACT) -> Float[Array, "*axes"]:
    """The activation `name` of x, with the derivative that `rules` asks for."""
    return _secant(name, x) if rules.activation else ACTIVATIONS[name](x)


def gate_product(a: Float[Array, "*axes"], b: Float[Array, "*axes"], rules: Rules = EXACT) -> Float[Array, "*axes"]:
    """a * b, with the derivative that `rules` asks for."""
    return _half_product(a, b) if rules.gate else a * b


def hold(x: Float[Array, "*axes"], when: bool) -> Float[Array, "*axes"]:
    """x, a constant for the derivative where `when` says so."""
    return jax.lax.stop_gradient(x) if when else x


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _secant(name: Activation, x: Array) -> Array:
    return ACTIVATIONS[name](x)


@_secant.defjvp
def _secant_jvp(name: Activation, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y = ACTIVATIONS[name](x)
    # The quotient is taken in float32: in bfloat16 it is off by up to 0.4 percent near zero.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    near_zero = jnp.abs(x) < 1e-6
    slope_at_zero = jax.grad(ACTIVATIONS[name])(jnp.zeros((), wide))
    slope = jnp.where(near_zero, slope_at_zero, y.astype(wide) / jnp.where(near_zero, 1, x).astype(wide))
    return y, (slope * dx).astype(y.dtype)


@jax.custom_jvp
def _half_product(a: Array, b: Array) -> Array:
    return a * b


@_half_product.defjvp
def _half_product_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (a, b), (da, db) = primals, tangents
    return a * b, (0.5 * (b * da + a * db)).astype(a.dtype)
