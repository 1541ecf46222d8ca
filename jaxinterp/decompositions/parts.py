"""Non-negative sums of given features: what semi-NMF makes of an array.

    x ≈ y(x) F,   y(x) = argmin over y >= 0 of |x - y F|^2

F [features, d]: groups of neurons, where x is an MLP's hidden activations. There are no read vectors: the codes of one
feature depend on all the others.
"""

import equinox as eqx
from jaxtyping import Array, Float

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import STATE, STATE_ROWS
from jaxinterp.decompositions.codes import DenseCodes, weighted_rows
from jaxinterp.decompositions.nonnegative import nonnegative_least_squares


class NonnegativeParts(eqx.Module):
    """The decomposition of the module's equation, of an array into itself; `iterations` of least squares."""

    decoder: Float[Array, "features d"] = eqx.field(metadata=STATE_ROWS)
    target_mean: Float[Array, " d"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    iterations: int = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """How many features there are."""
        return self.decoder.shape[0]

    def encode(
        self, x: Float[Array, "*axes d"], *, k: Array | None = None, weight: Array | None = None, training: bool = False
    ) -> DenseCodes:
        """y(x): exactly 0 where the constraint holds a feature down."""
        return DenseCodes(
            nonnegative_least_squares(x.astype(self.decoder.dtype), self.decoder, iterations=self.iterations)
        )

    def combine(self, codes: Codes) -> Float[Array, "*axes d"]:
        """y F."""
        return weighted_rows(codes, self.decoder)

    def decode(self, codes: Codes, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        """y F."""
        return self.combine(codes)

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        return self.decode(self.encode(x), x).astype(x.dtype)
