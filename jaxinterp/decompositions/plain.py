"""Decompositions that need no training: what a learned one has to beat.

neurons               the k neurons of an MLP with the largest |a_j - mean_j| |w_j|, the others at their training mean
principal components  y ≈ mean + (y - mean) V^T V, the k directions of largest variance of the output
linear map            y ≈ mean_out + (x - mean_in) A
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.fields import STATE
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.decompositions.offered import replaced
from jaxinterp.kernels import rank, select_topk, sparse_decode
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules


class Neurons(eqx.Module):
    """The MLP's own neurons as components: a_j - mean_j for the k with the largest |a_j - mean_j| |w_j|.

    a = the hidden activations, w_j = row j of the down projection. Write vectors are the MLP's own.
    """

    mlp: PyTree = eqx.field(metadata=STATE)
    hidden_mean: Float[Array, " d_mlp"] = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    k: int = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> SparseCodes:
        """The k neurons that matter most for each token, as differences from their mean."""
        difference = self.mlp.hidden(x).astype(jnp.float32) - self.hidden_mean
        lengths = jnp.linalg.norm(self.mlp.down_proj.weight.astype(jnp.float32), axis=1)
        values, indices = select_topk(difference, k=self.k, rank=rank.by_size(lengths))
        return SparseCodes(values, indices, self.hidden_mean.shape[0])

    def decode(self, codes: SparseCodes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """The kept differences written, on top of what the mean neurons write."""
        base = self.mlp.write(self.hidden_mean).astype(jnp.float32)
        return base + sparse_decode(codes.values, codes.indices, self.mlp.down_proj.weight)

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        return replaced(self, x, tap)


class PrincipalComponents(eqx.Module):
    """The k directions of the output with the largest variance over the training tokens; it reads the output itself."""

    directions: Float[Array, "k d_out"] = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    def encode(
        self,
        x: Float[Array, "*axes d_out"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> DenseCodes:
        """Coordinates along the directions."""
        return DenseCodes((x.astype(jnp.float32) - self.target_mean) @ self.directions.T)

    def decode(self, codes: DenseCodes, x: Float[Array, "*axes d_out"]) -> Float[Array, "*axes d_out"]:
        """The mean plus coordinates times directions."""
        return codes.values @ self.directions + self.target_mean

    def __call__(
        self, x: Float[Array, "*axes d_out"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        return replaced(self, x, tap)


class LinearMap(eqx.Module):
    """The best linear map from input to output; its components are the input's coordinates."""

    matrix: Float[Array, "d_in d_out"] = eqx.field(metadata=STATE)
    input_mean: Float[Array, " d_in"] = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> DenseCodes:
        """x about its mean."""
        return DenseCodes(x.astype(jnp.float32) - self.input_mean)

    def decode(self, codes: DenseCodes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """mean_out + (x - mean_in) A."""
        return codes.values @ self.matrix + self.target_mean

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        return replaced(self, x, tap)
