"""Top-k codes of a linear encoder, and the linear decoder that reads them, with sparse backward passes.

    encode_topk    v, i = top-k over features of x W^T + b
    sparse_decode  y_n  = sum_j v_nj W[i_nj]

Their gradients touch only the k selected rows per token; the residuals of the forward pass are x, W, v and i. Plain
autodiff would scatter the gradient of `top_k` into a dense tokens x features array and multiply that by x, which costs
one and a half encoder matmuls more.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.errors import UserError
from jaxinterp.kernels import sharded


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _encode(x: Array, rows: Array, bias: Array, allowed: Array | None, k: int) -> tuple[Array, Array]:
    return sharded.select(x, rows, bias, allowed, k)


def _encode_forward(x: Array, rows: Array, bias: Array, allowed: Array | None, k: int):
    values, indices = sharded.select(x, rows, bias, allowed, k)
    return (values, indices), (x, rows, bias, values, indices)


def _encode_backward(k: int, residuals, gradients):
    x, rows, bias, values, indices = residuals
    g = jnp.where(jnp.isfinite(values), gradients[0], 0)
    d_rows = sharded.outer_sum(g, indices, x, rows.shape[0]).astype(rows.dtype)
    ones = jnp.ones((x.shape[0], 1), jnp.float32)
    d_bias = sharded.outer_sum(g, indices, ones, rows.shape[0])[:, 0].astype(bias.dtype)
    d_x = sharded.gather_sum(g, indices, rows).astype(x.dtype)  # dropped by the compiler where x is data
    return d_x, d_rows, d_bias, None


_encode.defvjp(_encode_forward, _encode_backward)


@jax.custom_vjp
def _decode(values: Array, indices: Array, rows: Array) -> Array:
    return sharded.gather_sum(values, indices, rows)


def _decode_forward(values: Array, indices: Array, rows: Array):
    return sharded.gather_sum(values, indices, rows), (values, indices, rows)


def _decode_backward(residuals, g):
    values, indices, rows = residuals
    d_values = sharded.sampled_dot(g, rows, indices).astype(values.dtype)
    d_rows = sharded.outer_sum(values, indices, g, rows.shape[0]).astype(rows.dtype)
    return d_values, None, d_rows


_decode.defvjp(_decode_forward, _decode_backward)


def encode_topk(
    x: Float[Array, "*axes d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    *,
    k: int,
    allowed: Bool[Array, " features"] | None = None,
) -> tuple[Float[Array, "*axes k"], Int[Array, "*axes k"]]:
    """The k largest pre-activations x W^T + b of each token, and their features.

    Values are float32, greatest first, ties to the lowest index. Where fewer than k features are `allowed`, the rest
    of the values are -inf (a ReLU makes zeros of them).

    Raises:
      UserError: k exceeds the number of features.
    """
    if not 0 < k <= rows.shape[0]:
        raise UserError(f"k={k} must lie between 1 and features={rows.shape[0]}.")
    axes = x.shape[:-1]
    values, indices = _encode(x.reshape(-1, x.shape[-1]), rows, bias, allowed, k)
    return values.reshape(*axes, k), indices.reshape(*axes, k)


def sparse_decode(
    values: Float[Array, "*axes k"], indices: Int[Array, "*axes k"], rows: Float[Array, "features d"]
) -> Float[Array, "*axes d"]:
    """Per token, the sum of the rows at its indices, weighted by its values; float32."""
    axes, k = values.shape[:-1], values.shape[-1]
    return _decode(values.reshape(-1, k), indices.reshape(-1, k), rows).reshape(*axes, rows.shape[1])
