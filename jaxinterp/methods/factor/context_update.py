"""Learning without training: the weight update of rank one that does to an MLP what a context does.

z_C = what the MLP reads at a position with the context, z = without it (both after the norm), delta = z_C - z; W
[d_in, d_out] the first matrix, so that x W is what it computes:

    dW = z (delta W) / |z|^2        =>   z (W + dW) = z_C W          rank one, exact

For a gated MLP the same for gate and up, each of rank one. With a residual stream the shift of the stream itself,
r_C - r, is added to the output's bias:

    r_C + f_W(z_C) = r + f_(W + dW)(z) + db,     db = r_C - r

The update belongs to one position of one prompt, and blows up where |z| goes to 0.

Source: Dherin et al. 2025 (arXiv 2507.16003); norms and gates: Innocenti and Achour 2025 (arXiv 2512.11255), Goldwaser
et al. 2025 (arXiv 2511.17864).
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear
from jaxinterp.models.mlp import MLP


class RankOne(NamedTuple):
    """column [d_in], row [d_out]: the matrix column row^T, without building it."""

    column: Float[Array, " d_in"]
    row: Float[Array, " d_out"]

    def matrix(self) -> Float[Array, "d_in d_out"]:
        """column row^T."""
        return jnp.outer(self.column, self.row)

    def size(self) -> Float[Array, ""]:
        """Its Frobenius norm: |column| |row|."""
        return jnp.linalg.norm(self.column) * jnp.linalg.norm(self.row)


def weight_update(
    weight: Float[Array, "d_in d_out"], with_context: Float[Array, " d_in"], without: Float[Array, " d_in"]
) -> RankOne:
    """dW of the module's equation, for one matrix at one position.

    Args:
      with_context: z_C, what the matrix reads with the context.
      without: z, what it reads without.
    """
    return RankOne(without / jnp.sum(without**2), (with_context - without) @ weight)


def update_size(
    weight: Float[Array, "d_in d_out"], with_context: Float[Array, " d_in"], without: Float[Array, " d_in"]
) -> Float[Array, ""]:
    """|dW| = |delta W| / |z|."""
    return weight_update(weight, with_context, without).size()


def updated_mlp(
    mlp: MLP,
    with_context: Float[Array, " d_model"],
    without: Float[Array, " d_model"],
    stream_shift: Float[Array, " d_model"] | None = None,
) -> MLP:
    """The MLP whose first matrices took the context in: it does at `without` what `mlp` does at `with_context`.

    Args:
      stream_shift: r_C - r, added to the bias of the output where the block adds the stream; None: the MLP alone.
    """

    def taken_in(linear: Linear) -> Linear:
        update = weight_update(linear.weight, with_context, without)
        return eqx.tree_at(lambda one: one.weight, linear, linear.weight + update.matrix())

    new = eqx.tree_at(lambda one: one.up_proj, mlp, taken_in(mlp.up_proj))
    if mlp.gate_proj is not None:
        new = eqx.tree_at(lambda one: one.gate_proj, new, taken_in(mlp.gate_proj))
    if stream_shift is None:
        return new
    bias = mlp.down_proj.bias
    shifted = stream_shift if bias is None else bias + stream_shift
    return eqx.tree_at(lambda one: one.down_proj.bias, new, shifted, is_leaf=lambda leaf: leaf is None)


def token_updates(
    weight: Float[Array, "d_in d_out"], read: Float[Array, "prefixes d_in"], without: Float[Array, " d_in"]
) -> Float[Array, " steps"]:
    """|dW_(i+1) - dW_i| as the context grows token by token: the steps of the implicit gradient descent.

    Args:
      read: z at the query with a context of 0, 1, 2, ... tokens.
      without: z that every dW_i belongs to (its column is the same, so the difference has rank one).
    """
    if read.shape[0] < 2:
        raise UserError(f"read has {read.shape[0]} rows: steps need at least 2 prefixes.")
    return jnp.linalg.norm((read[1:] - read[:-1]) @ weight, axis=-1) / jnp.linalg.norm(without)


def implicit_loss_gradient(
    weight: Float[Array, "d_in d_out"],
    before: Float[Array, " d_in"],
    after: Float[Array, " d_in"],
    without: Float[Array, " d_in"],
) -> Float[Array, "d_in d_out"]:
    """grad_W L_i with L_i = trace(D_i^T W): -1/h (dW_(i+1) - dW_i), h = 1 / |z|^2, so dW_(i+1) = dW_i - h grad."""
    return -jnp.outer(without, (after - before) @ weight)
