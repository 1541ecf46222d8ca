"""A linear map as a sum of rank-one parts: a masked forward pass is an edit.

    c   = x V^T                                    x [..., d_in], V = `read` [components, d_in]
    y   = c U + x R + b                            U = `write` [components, d_out], R = `rest` [d_in, d_out] or None

In the place of a projection it offers c and x R to `tap`:

    model = replace(model, {"blocks/3/mlp/up_proj": Components.of(linear, read, write)})
    run(model, tokens, edits={"blocks/3/mlp/up_proj/components": Scale(mask)})     mask [components], or one a token
    run(model, tokens, edits={"blocks/3/mlp/up_proj/rest": Scale(mask[..., None])})

Parts have no unit of their own: (a V_i, U_i / a) is the same part.

Sources: the form is that of parameter decomposition (APD, arXiv 2501.14926; SPD, arXiv 2506.20790, whose "delta
component" is R).
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER_ROWS, STATE
from jaxinterp.models.layers import Linear, Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules


class Components(eqx.Module):
    """y = c U + x R + b with c = x V^T: stands where a `Linear` stood, and offers `components` (c) and `rest` (x R).

    `rest` None: the parts are all there is. `cut` is that of the linear map (see `Linear`).
    """

    read: Float[Array, "components d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    write: Float[Array, "components d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    rest: Float[Array, "d_in d_out"] | None = eqx.field(metadata=STATE)
    bias: Float[Array, " d_out"] | None = eqx.field(metadata=STATE)
    cut: Literal["out", "in"] | None = eqx.field(static=True, default=None)

    @classmethod
    def of(
        cls,
        linear: Linear,
        read: Float[Array, "components d_in"],
        write: Float[Array, "components d_out"],
        *,
        keep_rest: bool = True,
    ) -> "Components":
        """A linear map with these parts taken out of it.

        Args:
          keep_rest: R = W - V^T U, so that the map stays what it is; False: R = 0, and the map is the sum of its parts.
        Raises:
          UserError: the vectors have other lengths than the map's inputs and outputs.
        """
        d_in, d_out = linear.weight.shape
        if read.shape != (write.shape[0], d_in) or write.shape[1] != d_out:
            raise UserError(
                f"read {read.shape} and write {write.shape} do not fit a linear map of {d_in} inputs and {d_out} "
                f"outputs: give (components, {d_in}) and (components, {d_out})."
            )
        rest = linear.weight - (read.T @ write).astype(linear.weight.dtype) if keep_rest else None
        return cls(read, write, rest, linear.bias, linear.cut)

    @property
    def weight(self) -> Float[Array, "d_in d_out"]:
        """W of the whole map: V^T U + R."""
        parts = self.read.T @ self.write
        return parts if self.rest is None else parts + self.rest

    def linear(self) -> Linear:
        """The same function as one matrix."""
        return Linear(self.weight, self.bias, self.cut)

    def cuts(self) -> dict[str, int | None]:
        """A part's vector is cut on the side on which the linear map is cut."""
        outputs, inputs = self.cut == "out", self.cut == "in"
        return {
            "read": 1 if inputs else None,
            "write": 1 if outputs else None,
            "rest": 1 if outputs else 0 if inputs else None,
            "bias": 0 if outputs else None,
        }

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        y = tap("components", x @ self.read.T.astype(x.dtype)) @ self.write.astype(x.dtype)
        if self.rest is not None:
            y = y + tap("rest", x @ self.rest)
        return y if self.bias is None else y + self.bias


class Scale(eqx.Module):
    """The edit x * factor (broadcast): masks components by numbers between 0 and 1."""

    factor: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        return (x * self.factor).astype(jnp.result_type(x))
