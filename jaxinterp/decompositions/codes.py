"""Codes: how strongly each component of a decomposition is active for each token.

Sparse codes hold k values and their features per token, dense codes one value per feature; each converts to the other.
A component is active where its value is not zero.
"""

from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.kernels import rank, select_topk, sparse_decode, sum_by_feature


class SparseCodes(eqx.Module):
    """k values per token and the features that they belong to; a padded slot has the value 0.

    `capped`: k is a limit that tokens should not reach, as those that do have lost their smallest values.
    """

    values: Float[Array, "*axes k"]
    indices: Int[Array, "*axes k"]
    features: int = eqx.field(static=True)
    capped: bool = eqx.field(static=True, default=False)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """`np.asarray(codes)`: one value per feature, on the host."""
        return np.asarray(self.dense(), dtype)

    def dense(self) -> Float[Array, "*axes features"]:
        """One value per feature."""
        return _dense(self.values, self.indices, self.features)

    def sparse(self, k: int) -> "SparseCodes":
        """The k values of each token that are largest in size, whatever their sign."""
        values, places = select_topk(self.values, k=min(k, self.values.shape[-1]), rank=rank.by_size())
        return SparseCodes(values, jnp.take_along_axis(self.indices, places, axis=-1), self.features)

    def weighted(self, per_feature: Float[Array, " features"]) -> Float[Array, "*axes"]:
        """Per token, the sum of its values times a number of each feature."""
        return _weighted(self.values, self.indices, per_feature)

    def active(self) -> Float[Array, "*axes"]:
        """The number of active features of each token."""
        return _active(self.values)

    def at_cap(self) -> Float[Array, "*axes"]:
        """1 for a token that uses all its k slots."""
        return jnp.all(self.values != 0, axis=-1).astype(jnp.float32)

    def smallest(self) -> Float[Array, ""]:
        """The smallest positive value, 0 where there is none."""
        return _smallest_positive(self.values)

    def fired(self, weight: Float[Array, "*axes"]) -> Float[Array, " features"]:
        """How many tokens (by weight) each feature is active on."""
        return sum_by_feature((self.values != 0) * weight[..., None], self.indices, self.features)


class DenseCodes(eqx.Module):
    """One value per feature; `pre` are the pre-activations that decided, where a loss wants them."""

    values: Float[Array, "*axes features"]
    pre: Float[Array, "*axes features"] | None = None

    capped: ClassVar[bool] = False
    """There is no limit that tokens could reach."""

    @property
    def features(self) -> int:
        """The number of features."""
        return self.values.shape[-1]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """`np.asarray(codes)`: one value per feature, on the host."""
        return np.asarray(self.values, dtype)

    def dense(self) -> Float[Array, "*axes features"]:
        """One value per feature."""
        return self.values

    def sparse(self, k: int) -> SparseCodes:
        """The k values of each token that are largest in size, whatever their sign."""
        return SparseCodes(*select_topk(self.values, k=k, rank=rank.by_size()), self.features)

    def weighted(self, per_feature: Float[Array, " features"]) -> Float[Array, "*axes"]:
        """Per token, the sum of its values times a number of each feature."""
        return self.values @ per_feature

    def active(self) -> Float[Array, "*axes"]:
        """The number of active features of each token."""
        return _active(self.values)

    def smallest(self) -> Float[Array, ""]:
        """The smallest positive value, 0 where there is none."""
        return _smallest_positive(self.values)

    def fired(self, weight: Float[Array, "*axes"]) -> Float[Array, " features"]:
        """How many tokens (by weight) each feature is active on."""
        hits = (self.values != 0) * weight[..., None]
        return jnp.sum(hits.reshape(-1, self.features), axis=0)


OneLayer = SparseCodes | DenseCodes
"""Codes of one layer, for readers of `values`; any others are `core.decomposition.Codes`."""


def weighted_rows(codes: Codes, rows: Float[Array, "features d"]) -> Float[Array, "*axes d"]:
    """sum_j z_j rows_j: the rows of the active components, each times its value."""
    if isinstance(codes, SparseCodes):
        return sparse_decode(codes.values, codes.indices, rows)
    return codes.dense() @ rows


# Inside `jax.jit` they are inlined; outside they are one program, not one for each operation.
@partial(jax.jit, static_argnames="features", inline=True)
def _dense(values: Array, indices: Array, features: int) -> Array:
    flat_values = values.reshape(-1, values.shape[-1])
    flat_indices = indices.reshape(flat_values.shape)
    tokens = jnp.arange(flat_values.shape[0])[:, None]
    dense = jnp.zeros((flat_values.shape[0], features), flat_values.dtype)
    dense = dense.at[tokens, flat_indices].add(flat_values)
    return dense.reshape(*values.shape[:-1], features)


@partial(jax.jit, inline=True)
def _weighted(values: Array, indices: Array, per_feature: Array) -> Array:
    return jnp.sum(values * per_feature[indices], axis=-1)


@partial(jax.jit, inline=True)
def _active(values: Array) -> Array:
    return jnp.sum(values != 0, axis=-1).astype(jnp.float32)


@partial(jax.jit, inline=True)
def _smallest_positive(values: Array) -> Array:
    smallest = jnp.min(jnp.where(values > 0, values, jnp.inf))
    return jnp.where(jnp.isfinite(smallest), smallest, 0.0)
