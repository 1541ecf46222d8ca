"""The sparse dictionary: sparse autoencoder, transcoder or skip transcoder, by what it reads and writes.

    x'  = (x - input_mean) / input_scale
    z   = activation(x' E^T + b_E)
    y   = output_scale * (z D + b_D [+ x' S]) + output_mean

E = `encoder` and D = `decoder` hold one read and one write vector per feature, both `(features, d)`. The scales and
means are leaves: normalisation is part of the decomposition, and `fold` takes it into the weights. `target_mean` and
`target_variance` describe the target over the training sample; they take no part in the equation.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE, STATE_ROWS
from jaxinterp.decompositions.activations import Activation, ActsOnPre, check_schedule
from jaxinterp.decompositions.adaptive import check_foldable
from jaxinterp.decompositions.codes import SparseCodes, weighted_rows
from jaxinterp.decompositions.offered import replaced
from jaxinterp.kernels import as_products, encode_topk
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules


# Inside `jax.jit` it is inlined; outside it is one program, not one for each operation.
@partial(jax.jit, inline=True)
def normalised(
    x: Float[Array, "*axes d"], mean: Float[Array, " d"], scale: Float[Array, ""]
) -> Float[Array, "*axes d"]:
    """(x - mean) / scale from float32 sums, rounded to bfloat16 where x is bfloat16; float64 stays float64."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return as_products((wide - mean) / scale, x)


class Dictionary(eqx.Module):
    """A sparse dictionary from `sites.reads` to `sites.writes`; `skip` is None where there is no linear path."""

    encoder: Float[Array, "features d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    encoder_bias: Float[Array, " features"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder: Float[Array, "features d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    decoder_bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    skip: Float[Array, "d_in d_out"] | None = eqx.field(metadata=PARAMETER)
    input_mean: Float[Array, " d_in"] = eqx.field(metadata=STATE)
    input_scale: Float[Array, ""] = eqx.field(metadata=STATE)
    output_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    output_scale: Float[Array, ""] = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    tokens_since_fired: Int[Array, " features"] = eqx.field(metadata=STATE_ROWS)
    activation: Activation
    sites: Sites = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises UserError if k exceeds the number of features."""
        k = getattr(self.activation, "k", 1)
        if not 0 < k <= self.encoder.shape[0]:
            raise UserError(f"k={k} must lie between 1 and features={self.encoder.shape[0]}.")

    @property
    def features(self) -> int:
        """The size of the dictionary."""
        return self.encoder.shape[0]

    def normalise(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_in"]:
        """x' of the module's equation: from float32 sums, rounded to bfloat16 where x is bfloat16."""
        return normalised(x, self.input_mean, self.input_scale)

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Float[Array, "*axes"] | None = None,
        training: bool = False,
    ) -> Codes:
        """The codes z of x.

        Args:
          k: for TopK and BatchTopK, how many to keep, at most the activation's own k (a schedule needs no new program).
          weight: which tokens count, where the codes of one token depend on the others.
          training: for BatchTopK, select over this batch instead of by the threshold.
        Raises:
          UserError: k is given, and the activation has none.
        """
        check_schedule(self.activation, k)
        rows, bias = self.encoder, self.encoder_bias
        return self.activation.codes(self.normalise(x), rows, bias, k=k, weight=weight, training=training)

    def encode_among(self, x: Float[Array, "*axes d_in"], allowed: Bool[Array, " features"], k: int) -> SparseCodes:
        """The k largest positive codes among the allowed features (what AuxK does with dead ones)."""
        values, indices = encode_topk(self.normalise(x), self.encoder, self.encoder_bias, k=k, allowed=allowed)
        return SparseCodes(jax.nn.relu(values), indices, self.features)

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """z D: the weighted sum of write vectors, in normalised units."""
        return weighted_rows(codes, self.decoder)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation; x is read by the skip path only."""
        y = self.combine(codes) + self.decoder_bias
        if self.skip is not None:
            y = y + self.normalise(x) @ self.skip
        return self.output_scale * y + self.output_mean

    def pre(self, x: Float[Array, "*axes d_in"]) -> dict[str, Float[Array, "*axes features"]]:
        """What the activation decides on, by name; nothing where its codes cannot be made of it again."""
        if not isinstance(self.activation, ActsOnPre):
            return {}
        return dict(self.activation.pre(self.normalise(x), self.encoder, self.encoder_bias))

    def from_pre(self, pre: Mapping[str, Array], x: Float[Array, "*axes d_in"]) -> Codes:
        """The codes of pre-activations; `from_pre(pre(x), x)` are those of x.

        Raises:
          UserError: the activation has no `from_pre`.
        """
        if not isinstance(self.activation, ActsOnPre):
            raise UserError(f"activation={type(self.activation).__name__} has no codes_pre: edit the codes.")
        return self.activation.from_pre(pre, self.normalise(x))

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        """decode(encode(x), x) in the dtype of x; its codes are offered to `tap`."""
        return replaced(self, x, tap)


def fold(dictionary: Dictionary) -> Dictionary:
    """The same function with input mean 0 and scales 1: normalisation taken into encoder, decoder, skip and biases.

    E' = E / s_in,  b_E' = b_E - E' mean_in,  D' = s_out D,  S' = s_out S / s_in,  b_D' = s_out b_D - mean_in S'.
    Codes do not change; `output_mean` stays.

    Raises:
      UserError: the activation is TopAFA, whose codes depend on the length of x'.
    """
    check_foldable(dictionary.activation)
    encoder = dictionary.encoder / dictionary.input_scale
    decoder_bias = dictionary.output_scale * dictionary.decoder_bias
    skip = dictionary.skip
    if skip is not None:
        skip = dictionary.output_scale * skip / dictionary.input_scale
        decoder_bias = decoder_bias - dictionary.input_mean @ skip
    changes: dict[str, PyTree] = {
        "encoder": encoder,
        "encoder_bias": dictionary.encoder_bias - encoder @ dictionary.input_mean,
        "decoder": dictionary.output_scale * dictionary.decoder,
        "decoder_bias": decoder_bias,
        "skip": skip,
        "input_mean": jnp.zeros_like(dictionary.input_mean),
        "input_scale": jnp.ones_like(dictionary.input_scale),
        "output_scale": jnp.ones_like(dictionary.output_scale),
    }
    return replace(dictionary, **changes)
