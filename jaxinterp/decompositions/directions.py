"""Linear coordinates of an array about its mean: what an interaction basis, or PCA, makes of it.

    f̂ = (x - mean) C,   x ≈ mean + f̂ C+

C^T = `encoder` and C+ = `decoder` hold one read and one write vector a direction, the most important first; with all
directions nothing is lost within the space that they span.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import STATE, STATE_ROWS
from jaxinterp.decompositions.codes import DenseCodes, weighted_rows


class Directions(eqx.Module):
    """The decomposition of the module's equation; `importance` is Lambda, or a variance."""

    encoder: Float[Array, "features d"] = eqx.field(metadata=STATE_ROWS)
    decoder: Float[Array, "features d"] = eqx.field(metadata=STATE_ROWS)
    importance: Float[Array, " features"] = eqx.field(metadata=STATE_ROWS)
    target_mean: Float[Array, " d"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """How many directions there are."""
        return self.encoder.shape[0]

    def first(self, number: int) -> "Directions":
        """The same with the `number` most important directions only."""
        rows = (self.encoder[:number], self.decoder[:number], self.importance[:number])
        return Directions(*rows, self.target_mean, self.target_variance, self.sites)

    def encode(
        self, x: Float[Array, "*axes d"], *, k: Array | None = None, weight: Array | None = None, training: bool = False
    ) -> DenseCodes:
        """(x - mean) C."""
        return DenseCodes((x.astype(jnp.promote_types(x.dtype, jnp.float32)) - self.target_mean) @ self.encoder.T)

    def combine(self, codes: Codes) -> Float[Array, "*axes d"]:
        """f̂ C+."""
        return weighted_rows(codes, self.decoder)

    def decode(self, codes: Codes, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        """mean + f̂ C+."""
        return self.combine(codes) + self.target_mean

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        return self.decode(self.encode(x), x).astype(x.dtype)
