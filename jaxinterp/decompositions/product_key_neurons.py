"""Product-key neurons in place of an MLP: thousands of single neurons, of which every token uses a few.

    y' = sum over channels and chosen neurons of a_n v_n + b
    a_n = s_n (x' . u_n)  (linear: sgatlin)   or   softmax(s)_n gelu(x' . u_n)  (peer)

Training and start values: `jaxinterp.methods.factor.product_key_neurons`.

Source: Schug 2026 (arXiv 2606.07414); He 2024 (PEER, arXiv 2407.04153).
"""

import equinox as eqx
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import SparseCodes, weighted_rows
from jaxinterp.decompositions.scales import Scales
from jaxinterp.models.mixtures.product_keys import DenseScores, KeyScores, Kind, choose, neuron_values, weigh


class ProductKeyNeurons(eqx.Module):
    """The decomposition; a feature is a neuron."""

    scores: DenseScores | KeyScores = eqx.field(metadata=PARAMETER)
    read: Float[Array, "features d_in"] = eqx.field(metadata=PARAMETER_ROWS)
    write: Float[Array, "features d_out"] = eqx.field(metadata=PARAMETER_ROWS)
    bias: Float[Array, " d_out"] = eqx.field(metadata=PARAMETER)
    scales: Scales = eqx.field(metadata=STATE)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    knn: int = eqx.field(static=True)
    kind: Kind = eqx.field(static=True)
    sites: Sites = eqx.field(static=True)

    @property
    def features(self) -> int:
        """How many neurons there are."""
        return self.read.shape[0]

    def encode(
        self,
        x: Float[Array, "*axes d_in"],
        *,
        k: Int[Array, ""] | None = None,
        weight: Float[Array, "*axes"] | None = None,
        training: bool = False,
    ) -> SparseCodes:
        """a of the chosen neurons, of either sign: knn a channel."""
        x = self.scales.normalise(x)
        scores = self.scores(x)
        how_much, index = weigh(choose(scores, self.knn), self.kind, scores.shape[-1])
        return SparseCodes(neuron_values(x, how_much, index, self.read, self.kind), index, self.features)

    def combine(self, codes: Codes) -> Float[Array, "*axes d_out"]:
        """The weighted sum of write vectors, in normalised units."""
        return weighted_rows(codes, self.write)

    def decode(self, codes: Codes, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        """y of the module's equation."""
        return self.scales.restore(self.combine(codes) + self.bias)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return self.decode(self.encode(x), x).astype(x.dtype)
