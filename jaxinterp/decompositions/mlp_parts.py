"""An MLP whose matrices are sums of rank-one parts, of which every token uses those that matter to it.

    g = importance of every part, from what its matrix reads in the whole MLP          (the network of `gates`)
    c = (x V^T) * m,   m = g  or  1 where g > 0 ("rounded")                            codes of one matrix
    hidden = f(c_gate U_gate) * (c_up U_up);   y = c_down U_down

Codes are those of all matrices, one after another. c_down belongs to the masked hidden activations, so that decoding
needs the codes of the down projection alone; what is in no part is left out.

Source: parameter decomposition (SPD, arXiv 2506.20790) of one MLP, read as a decomposition of its output.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import PARAMETER, STATE
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.models.layers import Linear
from jaxinterp.models.rules import activate

MaskKind = Literal["importance", "rounded"]


def mlp_linear(mlp: PyTree, name: str) -> Linear:
    """A projection of an MLP by the name of its field."""
    found = {"up_proj": mlp.up_proj, "down_proj": mlp.down_proj, "gate_proj": mlp.gate_proj}[name]
    assert isinstance(found, Linear)
    return found


def mlp_with(
    mlp: PyTree, x: Float[Array, "*axes d_in"], linear: Callable[[str, Array], Array]
) -> Float[Array, "*axes d_out"]:
    """The MLP with `linear(name, what it reads)` in the place of every projection."""
    if mlp.gate_proj is None:
        return linear("down_proj", activate(mlp.activation, linear("up_proj", x)))
    return linear("down_proj", activate(mlp.activation, linear("gate_proj", x)) * linear("up_proj", x))


class MLPParts(eqx.Module):
    """The decomposition of the module's equation.

    Attributes:
      importance: (what each matrix reads, by name) -> (g of its parts, by name).
      read, write: by the name of a projection, V [parts, d_in] and U [parts, d_out].
    """

    importance: Any = eqx.field(metadata=PARAMETER)
    read: dict[str, Float[Array, "parts _in"]] = eqx.field(metadata=PARAMETER)
    write: dict[str, Float[Array, "parts _out"]] = eqx.field(metadata=PARAMETER)
    mlp: PyTree = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    mask: MaskKind = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """Parts of all matrices."""
        return sum(len(read) for read in self.read.values())

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Array | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> DenseCodes:
        """c of all matrices, in the order gate, up, down."""
        x = x.astype(jnp.float32)
        hidden = self.mlp.hidden(x)
        names = self.mlp.projections()
        g = self.importance({name: hidden if name == "down_proj" else x for name in names})
        codes: dict[str, Array] = {}

        def linear(name: str, x: Array) -> Array:
            mask = g[name] if self.mask == "importance" else (g[name] > 0).astype(x.dtype)
            codes[name] = (x @ self.read[name].T) * mask
            return self._write(name, codes[name])

        mlp_with(self.mlp, x, linear)
        return DenseCodes(jnp.concatenate([codes[name] for name in names], axis=-1))

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y from the codes of the down projection."""
        return self._write("down_proj", codes.dense()[..., -len(self.read["down_proj"]) :])

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)

    def _write(self, name: str, codes: Array) -> Array:
        bias = mlp_linear(self.mlp, name).bias
        y = codes @ self.write[name]
        return y if bias is None else y + bias
