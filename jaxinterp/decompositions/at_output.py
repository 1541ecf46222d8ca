"""A decomposition of an MLP's input or hidden activations, seen at the MLP's output.

    hidden   y = W_down(decode(encode(h))),  h = the hidden activations of x
    in       y = mlp(decode(encode(x)))

So that factors of the hidden activations (semi-NMF) and directions of the input (interaction bases) get the same
numbers as what reads the input and writes the output: FVU of the output, cross-entropy with the output replaced.
"""

from typing import Any, Literal

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes, Decomposition
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER, STATE
from jaxinterp.models.mlp import MLPLeaf


class AtOutput(eqx.Module):
    """The decomposition of the module's equation. `target_mean` is that of the output."""

    inner: Any = eqx.field(metadata=PARAMETER)
    mlp: PyTree = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    port: Literal["in", "hidden"] = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Array | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> Codes:
        """The codes of the inner decomposition, for the MLP's input x."""
        return self.inner.encode(self._read(x), k=k, weight=weight, training=training)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation."""
        inside = self.inner.decode(codes, self._read(x))
        return self.mlp.write(inside) if self.port == "hidden" else self.mlp(inside)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)

    def _read(self, x: Array) -> Array:
        return self.mlp.hidden(x) if self.port == "hidden" else x


def at_output(inner: Decomposition, mlp: MLPLeaf, target_mean: Float[Array, " d_out"]) -> AtOutput:
    """The decomposition of `blocks/3/mlp/hidden` or `blocks/3/mlp/in` as one from the MLP's input to its output.

    Raises:
      UserError: it reads or writes something else.
    """
    reads, writes = inner.sites.reads, inner.sites.writes
    if reads == writes and isinstance(reads, str):
        leaf, _, port = reads.rpartition("/")
        port_word: Literal["in", "hidden"] = "hidden" if port == "hidden" else "in"
        if port in ("in", "hidden"):
            return AtOutput(inner, mlp, target_mean, port_word, Sites(f"{leaf}/in", f"{leaf}/out"))
    raise UserError(
        f"sites reads={reads!r}, writes={writes!r}: only a decomposition of an MLP's `in` or `hidden` into itself can "
        "be seen at the output."
    )
