"""A dictionary of activations that were divided by each token's own scale, which its output is multiplied by again.

    layer_norm      n = (x - m) / (s + 1e-5),  y = s g(n) + m    m: mean over d, s: standard deviation (d - 1 below)
    constant_norm   n = x r,  y = g(n) / r                       r = sqrt(d) / |x|

with g the inner dictionary, in units of n. SAELens calls them `normalize_activations: layer_norm` and
`constant_norm_rescale`; OpenAI's TopK autoencoders have the first. No scale for all tokens does the same, so these
cannot be folded into weights. x and y are the same array.

Source: SAELens 6.54 (saes/sae.py); openai/sparse_autoencoder (model.py: LN).
"""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import STATE
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.offered import replaced
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules

Kind = Literal["layer_norm", "constant_norm"]
EPSILON = 1e-5


def per_token(x: Float[Array, "*axes d"], kind: Kind) -> tuple[Array, Array, Array]:
    """(n, scale, shift) of the module's equations, with y = scale g(n) + shift."""
    if kind == "layer_norm":
        shift = jnp.mean(x, axis=-1, keepdims=True)
        scale = jnp.std(x, axis=-1, keepdims=True, ddof=1)
        return (x - shift) / (scale + EPSILON), scale, shift
    scale = jnp.linalg.norm(x, axis=-1, keepdims=True) / jnp.sqrt(jnp.asarray(x.shape[-1], x.dtype))
    return x / scale, scale, jnp.zeros_like(scale)


class PerToken(eqx.Module):
    """The module's equations; codes are those of the inner dictionary."""

    inner: Dictionary
    target_mean: Float[Array, " d"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    kind: Kind = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises UserError where it would read one array and write another."""
        if self.inner.sites.reads != self.inner.sites.writes:
            raise UserError(f"{self.inner.sites}: a scale of each token is for dictionaries that write what they read.")
        if self.kind not in ("layer_norm", "constant_norm"):
            raise UserError(f"kind={self.kind!r} is unknown; known: layer_norm, constant_norm.")

    @property
    def sites(self) -> Sites:
        """Where it belongs."""
        return self.inner.sites

    @property
    def encoder(self) -> Float[Array, "features d"]:
        """Read vectors, in units of n."""
        return self.inner.encoder

    @property
    def decoder(self) -> Float[Array, "features d"]:
        """Write vectors, in units of n."""
        return self.inner.decoder

    @property
    def features(self) -> int:
        """The size of the dictionary."""
        return self.inner.features

    @property
    def activation(self) -> Activation:
        """What makes its codes."""
        return self.inner.activation

    def encode(
        self,
        x: Float[Array, "*axes d"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Float[Array, "*axes"] | None = None,
        training: bool = False,
    ) -> Codes:
        """The codes of x."""
        return self.inner.encode(per_token(x, self.kind)[0], k=k, weight=weight, training=training)

    def decode(self, codes: Codes, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        """y of the module's equations: the scale is x's own."""
        normalised, scale, shift = per_token(x, self.kind)
        return scale * self.inner.decode(codes, normalised) + shift

    def pre(self, x: Float[Array, "*axes d"]) -> dict[str, Float[Array, "*axes features"]]:
        """What the activation decides on, by name."""
        return self.inner.pre(per_token(x, self.kind)[0])

    def from_pre(self, pre: Mapping[str, Array], x: Float[Array, "*axes d"]) -> Codes:
        """The codes of pre-activations."""
        return self.inner.from_pre(pre, per_token(x, self.kind)[0])

    def __call__(self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT) -> Float[Array, "..."]:
        """decode(encode(x), x) in the dtype of x; its codes are offered to `tap`."""
        return replaced(self, x, tap)
