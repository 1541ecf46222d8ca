"""Selection, encoding and decoding with k codes per token, and their sparse backward passes.

    encode_topk    v, i = top-k over features of a = x W^T + b
    encode_ranked  v, i = the k best by another score of a, among those that the score allows
    encode_groups  v, i = the largest a of each of k groups of features
    select_topk    the first two, of pre-activations a that are there already
    sparse_decode  y_n  = sum_j v_nj W[i_nj]

Their gradients touch only the selected rows; the residuals of the forward pass are x, W, v and i. Plain autodiff would
scatter the gradient of `top_k` into a dense tokens x features array and multiply that by x, which costs one and a half
encoder matmuls more. `sampled_dot` and `sparse_outer` are the passes that the gradients are made of, for other uses.

Everywhere: values are float32 (float64 for float64 arrays, chosen by float32 sums), best first, ties to the lowest
index; NaN counts as the greatest number, so that it shows. Where fewer than k features may be chosen, the last values
are -inf (a ReLU makes zeros of them) and their indices are those of features all the same. An index that is negative or
at least the number of features names no row. The dtype of x is that of an encoder's products: rows are rounded to
bfloat16 where x is bfloat16; the gradients of float32 rows are float32 all the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import sharded
from jaxinterp.kernels.platforms import as_products
from jaxinterp.kernels.rank import Rank


def encode_topk(
    x: Float[Array, "*axes d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    *,
    k: int,
    keep: Int[Array, "..."] | int | None = None,
    allowed: Bool[Array, " features"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*axes k"], Int[Array, "*axes k"]]:
    """The k largest pre-activations x W^T + b of each token, and their features.

    Args:
      keep: a smaller k, traced, for all tokens or one for each: the values after it are -inf (a schedule of k needs no
        new program).
      allowed: the features that may be chosen (AuxK: the dead ones).
      implementation: which code runs it (`dispatch.NAMES`); None lets the table choose.

    Raises:
      UserError: k is not a valid number of features, or the implementation cannot run here.
    """
    _check_k(k, rows.shape[0])
    masked = bias if allowed is None else jnp.where(allowed, bias, -jnp.inf)
    if _is_double(x, rows):
        x32, rows32, bias32 = (jax.lax.stop_gradient(array.astype(jnp.float32)) for array in (x, rows, masked))
        chosen, indices = encode_topk(x32, rows32, bias32, k=k, keep=keep, implementation=implementation)
        return _again(chosen, indices, x, rows, bias), indices
    values, indices = _encode(_flat(x), rows, masked, k, implementation)
    return _kept(_as(x, values), keep), _as(x, indices)


def encode_ranked(
    x: Float[Array, "*axes d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    rank: Rank,
    *,
    k: int,
    keep: Int[Array, "..."] | int | None = None,
) -> tuple[Float[Array, "*axes k"], Int[Array, "*axes k"], Int[Array, "*axes"]]:
    """The pre-activations of the k best features by `rank`, the features, and how many the rank allowed.

    With `rank.above(threshold)` this is the selection of JumpReLU with the cap k: a token whose count exceeds k lost
    count - k features, the smallest. Arrays of `rank.tokens` have the leading axes of x. Scores carry no gradient.

    Raises:
      UserError: k is not a valid number of features.
    """
    _check_k(k, rows.shape[0])
    if _is_double(x, rows):
        x32, rows32, bias32 = (jax.lax.stop_gradient(array.astype(jnp.float32)) for array in (x, rows, bias))
        chosen, indices, count = encode_ranked(x32, rows32, bias32, rank, k=k, keep=keep)
        return _again(chosen, indices, x, rows, bias), indices, count
    score, arrays = _split(rank, x.ndim - 1)
    values, indices, count = _encode_ranked(_flat(x), rows, bias, arrays, score, k)
    return _kept(_as(x, values), keep), _as(x, indices), count.reshape(x.shape[:-1])


def encode_groups(
    x: Float[Array, "*axes d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], *, k: int
) -> tuple[Float[Array, "*axes k"], Int[Array, "*axes k"]]:
    """The largest pre-activation of each of k groups of neighbouring features, in the order of the groups.

    Raises:
      UserError: k does not divide the number of features.
    """
    _check_k(k, rows.shape[0])
    if rows.shape[0] % k:
        raise UserError(f"k={k} groups cannot share features={rows.shape[0]} evenly: take a divisor.")
    values, indices = _encode_groups(_flat(x), rows, bias, k)
    return _as(x, values), _as(x, indices)


def select_topk(
    pre: Float[Array, "*axes features"],
    *,
    k: int,
    keep: Int[Array, "..."] | int | None = None,
    allowed: Bool[Array, " features"] | None = None,
    rank: Rank | None = None,
) -> tuple[Float[Array, "*axes k"], Int[Array, "*axes k"]]:
    """The k largest of pre-activations (or the k best by `rank`) of each token, and their features.

    Raises:
      UserError: k is not a valid number of features.
    """
    _check_k(k, pre.shape[-1])
    masked = pre if allowed is None else jnp.where(allowed, pre, -jnp.inf)
    score, arrays = (None, ((), ())) if rank is None else _split(rank, pre.ndim - 1)
    values, indices = _select(_flat(masked.astype(jnp.float32)), arrays, score, k)
    values, indices = _kept(_as(pre, values), keep), _as(pre, indices)
    if pre.dtype == jnp.float64:
        exact = jnp.take_along_axis(pre, indices, axis=-1)
        values = jnp.where(jax.lax.stop_gradient(values) == -jnp.inf, -jnp.inf, exact)
    return values, indices


def sparse_decode(
    values: Float[Array, "*axes k"],
    indices: Int[Array, "*axes k"],
    rows: Float[Array, "features d"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*axes d"]:
    """Per token, the sum of the rows at its indices, weighted by its values; float32 (float64 for float64)."""
    if _is_double(values, rows):
        chosen = rows.at[_places(indices, rows.shape[0]).reshape(indices.shape)].get(mode="fill", fill_value=0)
        return jnp.einsum("...k,...kd->...d", values, chosen)
    return _as(values, _decode(_flat(values), _places(indices, rows.shape[0]), rows, implementation))


def sampled_dot(
    g: Float[Array, "*axes d"],
    rows: Float[Array, "features d"],
    indices: Int[Array, "*axes k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*axes k"]:
    """Per token, the inner products of g with the rows at its indices; float32. Not differentiable."""
    dots = sharded.sampled_dot(_flat(g), rows, _places(indices, rows.shape[0]), implementation)
    return _as(g, _constant(dots, "sampled_dot"))


def sparse_outer(
    values: Float[Array, "*axes k"],
    indices: Int[Array, "*axes k"],
    g: Float[Array, "*axes d"],
    features: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "features d"]:
    """Per feature, the sum over its tokens of value times g: the gradient of `sparse_decode`. Not differentiable."""
    sums = sharded.outer_sum(_flat(values), _places(indices, features), _flat(g), features, implementation)
    return _constant(sums, "sparse_outer")


def sum_by_feature(
    values: Float[Array, "*axes k"], indices: Int[Array, "*axes k"], features: int
) -> Float[Array, " features"]:
    """Per feature, the sum of its values (with ones: how often it occurs).

    On accelerators exact for whole numbers, whose sum is below 2^24, and within float32 rounding of the whole batch's
    sum otherwise. Not differentiable.
    """
    return _constant(sharded.value_sum(_flat(values), _places(indices, features), features), "sum_by_feature")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _encode(x: Array, rows: Array, bias: Array, k: int, implementation: str | None) -> tuple[Array, Array]:
    return sharded.encode(x, as_products(rows, x), bias, k, implementation)


def _encode_forward(x: Array, rows: Array, bias: Array, k: int, implementation: str | None):
    values, indices = sharded.encode(x, as_products(rows, x), bias, k, implementation)
    return (values, indices), (x, rows, bias, values, indices)


def _encode_backward(k: int, implementation: str | None, residuals, gradients):
    return _encoder_gradients(residuals, gradients[0], implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _encode_ranked(
    x: Array, rows: Array, bias: Array, arrays: Any, score: Callable[..., Array], k: int
) -> tuple[Array, Array, Array]:
    return sharded.encode_ranked(x, as_products(rows, x), bias, k, Rank(score, *arrays))


def _encode_ranked_forward(x: Array, rows: Array, bias: Array, arrays: Any, score: Callable[..., Array], k: int):
    values, indices, count = sharded.encode_ranked(x, as_products(rows, x), bias, k, Rank(score, *arrays))
    return (values, indices, count), (x, rows, bias, values, indices)


def _encode_ranked_backward(score: Callable[..., Array], k: int, residuals, gradients):
    return *_encoder_gradients(residuals, gradients[0], None), None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _encode_groups(x: Array, rows: Array, bias: Array, k: int) -> tuple[Array, Array]:
    return sharded.encode_groups(x, as_products(rows, x), bias, k)


def _encode_groups_forward(x: Array, rows: Array, bias: Array, k: int):
    values, indices = sharded.encode_groups(x, as_products(rows, x), bias, k)
    return (values, indices), (x, rows, bias, values, indices)


def _encode_groups_backward(k: int, residuals, gradients):
    return _encoder_gradients(residuals, gradients[0], None)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _select(pre: Array, arrays: Any, score: Callable[..., Array] | None, k: int) -> tuple[Array, Array]:
    return sharded.select(pre, k, None if score is None else Rank(score, *arrays))[:2]


def _select_forward(pre: Array, arrays: Any, score: Callable[..., Array] | None, k: int):
    values, indices = _select(pre, arrays, score, k)
    return (values, indices), (values, indices, pre.shape[1])


def _select_backward(score: Callable[..., Array] | None, k: int, residuals, gradients):
    values, indices, features = residuals
    tokens = jnp.arange(values.shape[0])[:, None]
    g = jnp.where(values == -jnp.inf, 0, gradients[0])
    return jnp.zeros((values.shape[0], features), jnp.float32).at[tokens, indices].add(g), None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _decode(values: Array, indices: Array, rows: Array, implementation: str | None) -> Array:
    return sharded.gather_sum(values, indices, rows, implementation)


def _decode_forward(values: Array, indices: Array, rows: Array, implementation: str | None):
    return sharded.gather_sum(values, indices, rows, implementation), (values, indices, rows)


def _decode_backward(implementation: str | None, residuals, g):
    values, indices, rows = residuals
    d_rows = sharded.outer_sum(values, indices, g, rows.shape[0], implementation)
    # The encoder's gradient waits for d_values, and so for d_rows: of two such large sums only one is in memory.
    g, d_rows = jax.lax.optimization_barrier((g, d_rows))
    d_values = sharded.sampled_dot(g, rows, indices, implementation).astype(values.dtype)
    return d_values, None, d_rows.astype(rows.dtype)


_encode.defvjp(_encode_forward, _encode_backward)
_encode_ranked.defvjp(_encode_ranked_forward, _encode_ranked_backward)
_encode_groups.defvjp(_encode_groups_forward, _encode_groups_backward)
_select.defvjp(_select_forward, _select_backward)
_decode.defvjp(_decode_forward, _decode_backward)


def _encoder_gradients(residuals, g: Array, implementation: str | None) -> tuple[Array, Array, Array]:
    x, rows, bias, values, indices = residuals
    g = jnp.where(values == -jnp.inf, 0, g)
    indices = _places(indices, rows.shape[0])  # as in `sparse_decode`, so that one sort serves both weight gradients
    d_rows, d_bias = sharded.outer_and_value_sum(g, indices, x, rows.shape[0], implementation)
    d_x = sharded.gather_sum(g, indices, rows, implementation).astype(
        x.dtype
    )  # dropped by the compiler where x is data
    return d_x, d_rows.astype(rows.dtype), d_bias.astype(bias.dtype)


def _is_double(*arrays: Array) -> bool:
    return any(array.dtype == jnp.float64 for array in arrays)


def _again(chosen: Array, indices: Array, x: Array, rows: Array, bias: Array) -> Array:
    """Pre-activations in float64 at features that were chosen by float32 sums."""
    exact = jnp.einsum("...d,...kd->...k", x, rows[indices]) + bias[indices]
    return jnp.where(chosen == -jnp.inf, -jnp.inf, exact)


def _check_k(k: int, features: int) -> None:
    if not 0 < k <= features:
        raise UserError(f"k={k} must lie between 1 and features={features}.")


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _constant(result: Array, name: str) -> Array:
    return result


@_constant.defjvp
def _no_derivative(name: str, primals: Any, tangents: Any) -> Any:
    raise UserError(f"{name} has no derivative: differentiate sparse_decode, or stop the gradient of what goes in.")


def _kept(values: Array, keep: Array | int | None) -> Array:
    if keep is None:
        return values
    return jnp.where(jnp.arange(values.shape[-1]) < jnp.asarray(keep)[..., None], values, -jnp.inf)


def _split(rank: Rank, axes: int) -> tuple[Callable[..., Array], Any]:
    """The score function, and its arrays with the leading axes of the tokens flattened."""
    tokens = jax.tree.map(lambda array: array.reshape(-1, *array.shape[axes:]), rank.tokens)
    return rank.score, jax.lax.stop_gradient((tokens, rank.features))


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


# Inside `jax.jit` it is inlined; outside it is one program, not one for each operation.
@partial(jax.jit, static_argnames="rows", inline=True)
def _places(indices: Array, rows: int) -> Array:
    """Indices with one leading axis; `rows` for all that name no row: kernels read wherever they are told to."""
    flat = _flat(indices)
    return jnp.where(flat < 0, rows, jnp.minimum(flat, rows))


def _as(like: Array, array: Array) -> Array:
    return array.reshape(*like.shape[:-1], array.shape[-1])
