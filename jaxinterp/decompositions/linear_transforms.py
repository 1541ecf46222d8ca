"""A mixture of linear transforms (MOLT): sparsely used linear maps of the input, of several ranks.

    y' = sum_t a_t  x' V_t^T U_t + b,   a = activation(x' E^T + b_E)       t = 1..transforms

The rows of all V_t lie one after another in `read`, those of U_t in `write`; `ranks` says how many belong to each.
Training and start values: `jaxinterp.methods.factor.linear_transforms`.

Source: Lindsey, Chen, Pearce, Hydrie, Conerly 2025 (Sparse mixtures of linear transforms, Transformer Circuits).
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.decompositions.scales import Scales

Gating = Literal["topk", "relu"]


class LinearTransforms(eqx.Module):
    """The decomposition; a feature is a transform."""

    gate: Float[Array, "features d_in"] = eqx.field(metadata=PARAMETER)
    gate_bias: Float[Array, " features"] = eqx.field(metadata=PARAMETER)
    read: Float[Array, "rows d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    write: Float[Array, "rows d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    scales: Scales = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    ranks: tuple[int, ...] = eqx.field(static=True)
    gating: Gating = eqx.field(static=True)
    k: int = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """How many transforms there are."""
        return self.gate.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Float[Array, "*axes"] | None = None,
        training: bool = False,
    ) -> DenseCodes:
        """a, one number a transform."""
        pre = self.scales.normalise(x) @ self.gate.T + self.gate_bias
        return DenseCodes(gates(pre, self.gating, self.k))

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation."""
        x = self.scales.normalise(x)
        return self.scales.restore(transform(x, codes.dense(), self.read, self.write, self.ranks) + self.bias)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)


def gates(pre: Float[Array, "*axes transforms"], gating: Gating, k: int) -> Float[Array, "*axes transforms"]:
    """relu of the gates, of the k largest with "topk"."""
    positive = jax.nn.relu(pre)
    if gating == "relu":
        return positive
    lowest = jax.lax.top_k(positive, k)[0][..., -1:]
    return jnp.where(positive >= lowest, positive, 0)


def transform(
    x: Float[Array, "*axes d_in"],
    gates: Float[Array, "*axes transforms"],
    read: Float[Array, "rows d_in"],
    write: Float[Array, "rows d_out"],
    ranks: tuple[int, ...],
) -> Float[Array, "*axes d_out"]:
    """sum_t a_t x V_t^T U_t for given gates.

    Raises:
      UserError: the ranks do not add up to the rows, or there is not one for every gate.
    """
    if sum(ranks) != read.shape[0] or len(ranks) != gates.shape[-1]:
        raise UserError(
            f"ranks={ranks} has {len(ranks)} transforms of {sum(ranks)} rows in all: there are {gates.shape[-1]} gates "
            f"and {read.shape[0]} rows."
        )
    return ((x @ read.T) * gates[..., owners(ranks)]) @ write


def owners(ranks: tuple[int, ...]) -> np.ndarray:
    """Which transform each row belongs to."""
    return np.repeat(np.arange(len(ranks)), ranks)
