"""A dictionary whose codes are chosen by what they do to the model's loss, not by how large they are.

    a = x' E^T + b_E,   g = gradient of the next-token loss by x, over its own root mean square
    S = the k features of largest  relu(a_j) (own + strength |s D_j . g| / sqrt(V / d)),   z = relu(a) on S

x, g [tokens, d]; E, D [features, d]; s = `output_scale`; V = `target_variance`. |s D_j . g| relu(a_j) is the
first-order change of the loss when feature j is taken away; over the standard deviation of a dimension it has no unit,
and in a dictionary that normalises (s^2 = V / d) it is |D_j . g|: what is chosen does not depend on the units of x.
Where g is 0 (no next token has a loss: the last of a window) `own` counts as 1, and the k largest a are chosen.

The gradient chooses; it does not weight, and no gradient goes through it. It reads a pair (x, gradient of x). Given x
alone, as in the place of its leaf, it falls back to the k largest a: report which of the two a number belongs to.

Source: Olmo et al. 2025, gradient sparse autoencoders, arXiv 2411.10397. The form of the score is recalled (no code is
public): `own` = 0 is the pure attribution score, `own` = 1 the mixture.
"""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.kernels import encode_ranked, rank
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules

Pair = tuple[Float[Array, "*axes d_in"], Float[Array, "*axes d_in"]]


class EffectDictionary(eqx.Module):
    """A TopK `dictionary` of x that selects by effect; it reads (x, x/gradient). Its fields are seen through."""

    dictionary: Dictionary
    sites: Sites = eqx.field(static=True)
    own: float = eqx.field(static=True, default=1.0)
    strength: float = eqx.field(static=True, default=1.0)

    def __check_init__(self) -> None:
        """Raises UserError if the dictionary does not select k features."""
        if not isinstance(self.dictionary.activation, TopK):
            name = type(self.dictionary.activation).__name__
            raise UserError(f"activation={name} does not select by a score: take TopK.")

    def encode(
        self,
        x: Pair | Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Array | None = None,
        training: bool = False,
    ) -> Codes:
        """The codes of (x, gradient), or those of plain TopK where x is alone."""
        own, activation = self.dictionary, self.dictionary.activation
        if not isinstance(x, tuple):
            return own.encode(x, k=k, weight=weight, training=training)
        assert isinstance(activation, TopK)  # __check_init__
        x, gradient = x
        size = jnp.sqrt(jnp.mean(gradient**2, axis=-1, keepdims=True))
        unit = jnp.sqrt(own.target_variance / own.decoder.shape[1])
        effect = self.strength * (own.output_scale / unit) * gradient / jnp.maximum(size, 1e-30)
        # Without a gradient all scores would be 0 where own is, and the first features be chosen.
        alone = jnp.where(size[..., 0] > 0, self.own, 1.0)
        by = rank.by_effect(effect, own.decoder)._replace(tokens=(effect, alone))
        values, indices, _ = encode_ranked(own.normalise(x), own.encoder, own.encoder_bias, by, k=activation.k, keep=k)
        return SparseCodes(jax.nn.relu(values), indices, own.features)

    def decode(self, codes: Codes, x: PyTree) -> Float[Array, "*axes d_out"]:
        """The dictionary's own: what the codes say the target is."""
        return self.dictionary.decode(codes, x[0] if isinstance(x, tuple) else x)

    def encode_among(self, x: PyTree, allowed: Bool[Array, " features"], k: int) -> SparseCodes:
        """The k largest positive codes among the allowed features, whatever their effect."""
        return self.dictionary.encode_among(x[0] if isinstance(x, tuple) else x, allowed, k)

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """z D, in normalised units."""
        return self.dictionary.combine(codes)

    def __call__(
        self, x: Float[Array, "*axes d_in"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        return self.dictionary(x, tap=tap, rules=rules)

    def pre(self, x: PyTree) -> dict[str, Float[Array, "*axes features"]]:
        """The dictionary's own pre-activations."""
        return self.dictionary.pre(x[0] if isinstance(x, tuple) else x)

    def from_pre(self, pre: Mapping[str, Array], x: PyTree) -> Codes:
        """The codes of plain TopK."""
        return self.dictionary.from_pre(pre, x[0] if isinstance(x, tuple) else x)

    @property
    def features(self) -> int:
        """The size of the dictionary."""
        return self.dictionary.features

    @property
    def encoder(self) -> PyTree:
        """Read vectors."""
        return self.dictionary.encoder

    @property
    def decoder(self) -> PyTree:
        """Write vectors."""
        return self.dictionary.decoder

    @property
    def activation(self) -> PyTree:
        """TopK."""
        return self.dictionary.activation

    @property
    def tokens_since_fired(self) -> PyTree:
        """Tokens since each feature fired."""
        return self.dictionary.tokens_since_fired

    @property
    def output_scale(self) -> PyTree:
        """The scale of the target."""
        return self.dictionary.output_scale

    @property
    def target_mean(self) -> PyTree:
        """The mean of the target over the training sample."""
        return self.dictionary.target_mean

    @property
    def target_variance(self) -> PyTree:
        """The variance of the target over the training sample."""
        return self.dictionary.target_variance
