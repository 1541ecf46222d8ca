"""An MLP that reads only the neurons it uses: the weights of the others stay in memory, untouched.

    g = x W_gate            all neurons
    chosen: the k neurons (or blocks of `block` neighbours) with the largest |f(g_j)| scale_j; blocks by the root of
            summed squares
    y = sum over chosen j of  f(g_j) (x . W_up[:, j]) W_down[j, :]

With one token (decoding at batch 1) the rows of W_up^T and W_down of chosen neurons are read one block after another;
with more tokens the same function is computed by a mask. It is what the edit `LeaveOut(BySize(scale, f), TopK(k))` at
`pre` does, to rounding; CATS' and CHESS' scores need the gate only, so that two of three matrices are read in part.

W_up is kept transposed, so that a neuron is a row. Its `sites` are `in` and `out`; the inside is not offered to `tap`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import Activation, activate
from jaxinterp.models.selection import top_k


class GatheredMLP(eqx.Module):
    """A gated MLP that uses `k` blocks of `block` neurons of each token. Make it by `gathered(mlp, ...)`."""

    gate_proj: Linear
    up_rows: Float[Array, "d_mlp d_model"]
    up_bias: Float[Array, " d_mlp"] | None
    down_rows: Float[Array, "d_mlp d_model"]
    down_bias: Float[Array, " d_model"] | None
    scale: Float[Array, " d_mlp"]
    k: int = eqx.field(static=True)
    block: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*axes d_model"]) -> Float[Array, "*axes d_model"]:
        s = activate(self.activation, self.gate_proj(x))
        sizes = jnp.linalg.norm((jnp.abs(s) * self.scale).reshape(*s.shape[:-1], -1, self.block), axis=-1)
        one = x.size == x.shape[-1]
        y = (
            self._rows(x.reshape(-1), s.reshape(-1), sizes.reshape(-1)).reshape(x.shape)
            if one
            else self._mask(x, s, sizes)
        )
        return y if self.down_bias is None else y + self.down_bias

    def _rows(self, x: Array, s: Array, sizes: Array) -> Array:
        """One token: block after block."""
        chosen = jax.lax.top_k(sizes, self.k)[1]
        blocked = lambda rows: rows.reshape(-1, self.block, rows.shape[-1])
        up_rows, down_rows, size = blocked(self.up_rows), blocked(self.down_rows), self.block
        bias = jnp.zeros(s.shape, s.dtype) if self.up_bias is None else self.up_bias

        def add(step: Array, y: Array) -> Array:
            place = chosen[step]
            take = lambda rows: jax.lax.dynamic_index_in_dim(rows, place, keepdims=False)
            part = lambda vector: jax.lax.dynamic_slice_in_dim(vector, place * size, size)
            hidden = part(s) * (take(up_rows) @ x + part(bias))
            return y + hidden @ take(down_rows)

        return jax.lax.fori_loop(0, self.k, add, jnp.zeros(self.down_rows.shape[1], x.dtype))

    def _mask(self, x: Array, s: Array, sizes: Array) -> Array:
        up = x @ self.up_rows.T
        up = up if self.up_bias is None else up + self.up_bias
        mask = jnp.repeat(top_k(sizes, self.k), self.block, axis=-1)
        return jnp.where(mask, s * up, 0) @ self.down_rows


def gathered(mlp: PyTree, keep: int, *, scale: Float[Array, " d_mlp"] | None = None, block: int = 1) -> GatheredMLP:
    """The MLP with `keep` neurons a token.

    Args:
      scale: of |f(g)|, such as CHESS' sqrt(E[u^2]), or that times the row norms of W_down; default: 1, CATS.
      block: neurons that are chosen together; more than one reads memory in longer pieces.
    Raises:
      UserError: the MLP is not a gated one, or `block` does not divide `keep` and the neurons.

    Example:
      fast = replace(model, {"blocks/3/mlp": gathered(model.blocks[3].mlp, 460)})
      generate(Subject(fast, tokenizer, "fast"), prompt)
    """
    if not isinstance(mlp, MLP) or mlp.gate_proj is None:
        raise UserError(f"mlp is a {type(mlp).__name__} without a gate: the score needs a gated MLP.")
    d_mlp = mlp.down_proj.weight.shape[0]
    if block < 1 or d_mlp % block or keep % block:
        raise UserError(f"block={block} must be positive and divide keep={keep} and the {d_mlp} neurons.")
    if not 0 < keep <= d_mlp:
        raise UserError(f"keep={keep} must lie in 1 to {d_mlp}, the number of neurons.")
    return GatheredMLP(
        gate_proj=mlp.gate_proj,
        up_rows=mlp.up_proj.weight.T,
        up_bias=mlp.up_proj.bias,
        down_rows=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
        scale=jnp.ones(d_mlp, mlp.down_proj.weight.dtype) if scale is None else scale,
        k=keep // block,
        block=block,
        activation=mlp.activation,
    )
