"""Activations that decide apart from the code's size whether a feature is active: `Gated` and `JumpReLU`.

    Gated      e = x E^T + b_E,  π = e + b_gate,  z = 1[π > 0] max(exp(r) e + b_mag, 0)
    JumpReLU   a = x E^T + b_E,                   z = a 1[a > θ]

A step has no derivative. Gated trains its gate by penalties on π, JumpReLU its thresholds by straight-through
estimators (`jump`, `step`). Both return the π or a that decided beside the codes, so that the terms of
`objectives/gates.py` need no second encoder.

Sources: Rajamanoharan et al. 2024, arXiv 2404.16014 (Gated) and arXiv 2407.14435 (JumpReLU).
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER_ROWS
from jaxinterp.core.metrics import Metrics
from jaxinterp.decompositions.activations import above, pre_activations
from jaxinterp.decompositions.codes import DenseCodes

Parametrisation = Literal["log", "raw"]


class Gated(eqx.Module):
    """e = x E^T + b_E,  π = e + b_gate,  z = 1[π > 0] max(exp(r) e + b_mag, 0).

    Gate and size share the read vectors E; the size has a scale exp(r) and a bias of its own. The paper has no b_E: the
    codes give it no gradient, so that it stays 0 unless another term (AuxK, which has the codes of a ReLU) trains it,
    and it is where `fold` puts the mean of the inputs.
    """

    gate_bias: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    log_scale: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    size_bias: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)

    @classmethod
    def start(cls, features: int) -> "Gated":
        """All zero: gate and size agree, and the codes are those of a ReLU."""
        return cls(*(jnp.zeros(features, jnp.float32) for _ in range(3)))

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
        e = x @ rows.T + jax.lax.stop_gradient(bias)
        gate = e + self.gate_bias
        size = jax.nn.relu(jnp.exp(self.log_scale) * e + self.size_bias)
        return DenseCodes(above(gate, 0.0, size), gate)

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """π (`gate_pre`) and exp(r) e + b_mag (`codes_pre`)."""
        e = pre_activations(x, rows, jax.lax.stop_gradient(bias))
        return {"gate_pre": e + self.gate_bias, "codes_pre": jnp.exp(self.log_scale) * e + self.size_bias}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> DenseCodes:
        """The codes of gate and size."""
        gate = pre["gate_pre"]
        return DenseCodes(above(gate, 0.0, jax.nn.relu(pre["codes_pre"])), gate)

    def after_step(self, metrics: Metrics, step: Int[Array, ""]) -> "Gated":
        return self


class JumpReLU(eqx.Module):
    """z = a 1[a > θ], θ = exp(threshold_parameter) where `parametrisation` is "log", max(threshold_parameter, 0) where
    it is "raw".

    Both are found in published files, and either read as the other gives wrong codes without an error: hence a field
    without a default. `bandwidth` is the ε of `jump` and `step`, in units of a (inputs of unit variance per dimension,
    where the dictionary normalises them). A raw threshold below 0 acts as 0 and is put there after every step.
    """

    threshold_parameter: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    parametrisation: Parametrisation = eqx.field(static=True)
    bandwidth: float = eqx.field(static=True)

    @classmethod
    def start(
        cls, features: int, threshold: float, *, bandwidth: float, parametrisation: Parametrisation = "log"
    ) -> "JumpReLU":
        """The same threshold for every feature.

        Raises:
          UserError: it is below 0, or 0 where its logarithm is stored.
        """
        if threshold < 0 or (threshold == 0 and parametrisation == "log"):
            raise UserError(f"threshold={threshold} must be positive (0 is possible with parametrisation='raw').")
        parameter = jnp.full(features, jnp.log(threshold) if parametrisation == "log" else threshold, jnp.float32)
        return cls(parameter, parametrisation, bandwidth)

    def __check_init__(self) -> None:
        """Raises UserError if a setting is invalid."""
        if self.parametrisation not in ("log", "raw"):
            raise UserError(f"parametrisation={self.parametrisation!r} must be 'log' or 'raw'.")
        if not self.bandwidth > 0:
            raise UserError(f"bandwidth={self.bandwidth} must be positive.")

    @property
    def threshold(self) -> Float[Array, " features"]:
        """θ, not negative."""
        stored = self.threshold_parameter
        if self.parametrisation == "log":
            return jnp.exp(stored)
        # The gradient passes at 0 too, so that a threshold that came there can leave.
        return stored + jax.lax.stop_gradient(jnp.maximum(stored, 0) - stored)

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
        a = x @ rows.T + bias
        return DenseCodes(jump(a, self.threshold, self.bandwidth), a)

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> DenseCodes:
        """The codes of a."""
        a = pre["codes_pre"]
        return DenseCodes(jump(a, self.threshold, self.bandwidth), a)

    def after_step(self, metrics: Metrics, step: Int[Array, ""]) -> "JumpReLU":
        if self.parametrisation == "log":
            return self
        return JumpReLU(jnp.maximum(self.threshold_parameter, 0), self.parametrisation, self.bandwidth)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    a: Float[Array, "*axes features"], threshold: Float[Array, " features"], bandwidth: float
) -> Float[Array, "*axes features"]:
    """a 1[a > θ], with the straight-through estimator for θ.

    ∂/∂a = 1[a > θ],  ∂/∂θ = -(θ / ε) K((a - θ) / ε),  K(u) = 1[|u| < 1/2],  ε = bandwidth
    """
    return above(a, threshold, a)


def _jump_forward(a: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return jump(a, threshold, bandwidth), (a, threshold)


def _jump_backward(bandwidth: float, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, threshold = residuals
    return above(a, threshold, g).astype(a.dtype), -threshold * _near(g, a, threshold, bandwidth)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(
    a: Float[Array, "*axes features"], threshold: Float[Array, " features"], bandwidth: float
) -> Float[Array, "*axes features"]:
    """1[a > θ], with the straight-through estimator for θ: ∂/∂a = 0, ∂/∂θ = -(1 / ε) K((a - θ) / ε)."""
    return (a > threshold).astype(a.dtype)


def _step_forward(a: Array, threshold: Array, bandwidth: float) -> tuple[Array, tuple[Array, Array]]:
    return step(a, threshold, bandwidth), (a, threshold)


def _step_backward(bandwidth: float, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, threshold = residuals
    return jnp.zeros_like(a), -_near(g, a, threshold, bandwidth)


def _near(g: Array, a: Array, threshold: Array, bandwidth: float) -> Array:
    """Per feature, the sum of g / ε over the tokens with |a - θ| < ε / 2."""
    near = jnp.where(jnp.abs(a - threshold) < bandwidth / 2, g, 0.0)
    return (jnp.sum(near, axis=tuple(range(a.ndim - 1))) / bandwidth).astype(threshold.dtype)


jump.defvjp(_jump_forward, _jump_backward)
step.defvjp(_step_forward, _step_backward)
