"""A hidden mixture of experts and its dense rival: an MLP imitated by few active neurons.

    x' = (x - mean_in) / s_in
    ŷ  = s_out (act(x' A^T + a) B + sum over e in T(x) of w_e act(u_e . x' + c_e) v_e + b) + mean_out

Equations of router, T and w: `jaxinterp.methods.factor.experts`. The codes are w_e act(...) of the k chosen experts,
with read vectors u_e and write vectors v_e; the shared part lies beside the codes, like a skip path. With 100,000
experts nothing of size tokens x experts x d is built: scores, dots and sums are passes of the sparse core.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes, weighted_rows
from jaxinterp.kernels import as_products, encode_topk, sampled_dot, sparse_decode, sparse_outer


class Scaling(eqx.Module):
    """Means and scales of what is read and of what is written."""

    input_mean: Float[Array, " d_in"]
    input_scale: Float[Array, ""]
    output_mean: Float[Array, " d_out"]
    output_scale: Float[Array, ""]

    def read(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_in"]:
        """x' of the module's equation; float64 stays float64, bfloat16 rounds to bfloat16 after float32 sums."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return as_products((wide - self.input_mean) / self.input_scale, x)

    def write(self, y: Float[Array, "*axes d_out"]) -> Float[Array, "*axes d_out"]:
        """s_out y + mean_out."""
        return self.output_scale * y + self.output_mean


class DenseNeurons(eqx.Module):
    """act(x A^T + a) B: neurons that every token uses."""

    encoder: Float[Array, "shared d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    encoder_bias: Float[Array, " shared"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder: Float[Array, "shared d_out"] = eqx.field(metadata=PARAMETER_ROWS)

    def values(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes shared"]:
        """act(x A^T + a)."""
        return jax.nn.gelu(x @ self.encoder.T + self.encoder_bias, approximate=False)


class Router(eqx.Module):
    """s = (x inner^T) outer^T + bias; `inner` None is the full router, where outer is [experts, d_in]."""

    inner: Float[Array, "rank d_in"] | None = eqx.field(metadata=PARAMETER)
    outer: Float[Array, "experts rank_or_d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    bias: Float[Array, " experts"] = eqx.field(metadata=PARAMETER_ROWS)

    def keys(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes rank_or_d_in"]:
        """x inner^T, which `outer` is multiplied with."""
        return x if self.inner is None else x @ self.inner.T


class Experts(eqx.Module):
    """The student of the module's equation."""

    shared: DenseNeurons
    router: Router
    encoder: Float[Array, "experts d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    encoder_bias: Float[Array, " experts"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder: Float[Array, "experts d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder_bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    scaling: Scaling = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    k: int = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """The number of experts."""
        return self.encoder.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Array | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> SparseCodes:
        """w_e act(u_e . x' + c_e) of the k experts with the largest scores, the best first."""
        read = self.scaling.read(x)
        scores, chosen = encode_topk(self.router.keys(read), self.router.outer, self.router.bias, k=self.k)
        inner = gathered_dot(read, self.encoder, chosen) + self.encoder_bias[chosen]
        values = jax.nn.softmax(scores, axis=-1) * jax.nn.gelu(inner, approximate=False)
        return SparseCodes(values, chosen, self.features)

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """The weighted sum of the experts' write vectors, in normalised units."""
        return weighted_rows(codes, self.decoder)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """ŷ of the module's equation; x is read by the shared part."""
        dense = self.shared.values(self.scaling.read(x)) @ self.shared.decoder
        return self.scaling.write(dense + self.combine(codes) + self.decoder_bias)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)


class DenseStudent(eqx.Module):
    """The dense rival: s_out (act(x' A^T + a) B + b) + mean_out; its codes are its neurons."""

    neurons: DenseNeurons
    decoder_bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    scaling: Scaling = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    @property
    def encoder(self) -> Float[Array, "shared d_in"]:
        """The neurons' read vectors."""
        return self.neurons.encoder

    @property
    def decoder(self) -> Float[Array, "shared d_out"]:
        """The neurons' write vectors."""
        return self.neurons.decoder

    @property
    def features(self) -> int:
        """The number of neurons."""
        return self.neurons.encoder.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Array | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> DenseCodes:
        """act(x' A^T + a)."""
        return DenseCodes(self.neurons.values(self.scaling.read(x)))

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """The weighted sum of write vectors, in normalised units."""
        return codes.dense() @ self.neurons.decoder

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """ŷ of the class's equation."""
        return self.scaling.write(self.combine(codes) + self.decoder_bias)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)


@jax.custom_vjp
def gathered_dot(
    x: Float[Array, "*axes d"], rows: Float[Array, "features d"], indices: Int[Array, "*axes k"]
) -> Float[Array, "*axes k"]:
    """Per token, the inner products of x with the rows at its indices; both sides have gradients, all sparse."""
    return sampled_dot(x, as_products(rows, x), indices)


def _forward(x: Array, rows: Array, indices: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return gathered_dot(x, rows, indices), (x, rows, indices)


def _backward(residuals: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, rows, indices = residuals
    d_x = sparse_decode(g, indices, rows).astype(x.dtype)
    return d_x, sparse_outer(g, indices, x, rows.shape[0]).astype(rows.dtype), None


gathered_dot.defvjp(_forward, _backward)
