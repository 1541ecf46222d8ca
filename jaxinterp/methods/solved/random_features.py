"""A dictionary whose read vectors are random, with the write vectors that are best for them.

c = TopK(E (x - mean) / scale),    E: random unit rows
[D; b] = argmin E|y - c D - b|^2 + ridge mean(diag Cov(c)) |D|^2
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.kernels import sparse_outer, sum_by_feature
from jaxinterp.methods.checks import check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import streaming_method
from jaxinterp.methods.solved.moments import Sums, covariance, least_squares, narrow
from jaxinterp.methods.sparse.dictionary import TrainingFields, empty_dictionary, unit_rows


@dataclass(frozen=True)
class RandomFeatures:
    """Random read vectors, TopK codes, and the decoder that least squares gives for them.

    Attributes:
      features: how many; the Gram matrix of their codes has features^2 entries.
      k: active features per token.
      ridge: in units of the mean variance of a code.
    """

    features: int = 4096
    k: int = 32
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        """Raises UserError if a number is not positive."""
        check_whole(self, features=1, k=1)
        check_positive(self, "ridge")

    def needs(self, site: Site) -> Sites:
        """Input and output of the leaf."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Moments of the codes over the stream, then one linear system in float64."""
        return streaming_method(self._zero, _moments, self._solve, start=self._random)

    def _random(self, key: Array, sample: Batch, model: PyTree) -> Dictionary:
        """Random unit read vectors, normalised by the sample; nothing is written yet."""
        activation = TopK(min(self.k, self.features))
        empty = empty_dictionary(TrainingFields(self.features), activation, sample, skip=False, normalise=True)
        rows = jax.random.normal(key, empty.encoder.shape, dtype=jnp.float32)
        return eqx.tree_at(lambda d: d.encoder, empty, unit_rows(rows))

    def _zero(self, sample: Batch) -> dict[str, Array]:
        d_out = sample.targets.shape[1]
        shapes: dict[str, tuple[int, ...]] = {
            "count": (), "codes": (self.features,), "y": (d_out,), "codes_codes": (self.features, self.features),
            "codes_y": (self.features, d_out),
        }  # fmt: skip
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    def _solve(self, given: Dictionary, sums: Sums) -> Dictionary:
        """The dictionary with its decoder, in the target's own units."""
        count = float(sums["count"])
        mean_codes, mean_y = sums["codes"] / count, sums["y"] / count
        gram = covariance(sums["codes_codes"] / count, mean_codes, mean_codes)
        decoder = least_squares(gram, covariance(sums["codes_y"] / count, mean_codes, mean_y), self.ridge)
        one, mean = jnp.ones((), jnp.float32), narrow(mean_y)
        solved = narrow(decoder), narrow(-mean_codes @ decoder), one, mean, mean
        return eqx.tree_at(
            lambda d: (d.decoder, d.decoder_bias, d.output_scale, d.output_mean, d.target_mean), given, solved
        )


def _moments(given: Dictionary, batch: Batch, key: Array, model: PyTree) -> dict[str, Array]:
    codes = given.encode(batch.inputs)
    assert isinstance(codes, SparseCodes)  # TopK
    values, y, w = codes.values * batch.weight[:, None], batch.targets.astype(jnp.float32), batch.weight
    return {
        "count": jnp.sum(w),
        "codes": sum_by_feature(values, codes.indices, codes.features),
        "y": w @ y,
        "codes_codes": outer_of_codes(values, codes),
        "codes_y": sparse_outer(values, codes.indices, y, codes.features),
    }


def outer_of_codes(weighted: Float[Array, "tokens k"], codes: SparseCodes) -> Float[Array, "features features"]:
    """sum_t (w_t c_t) c_t^T, by the k^2 entries of a token that are not 0.

    Args:
      weighted: w_t c_t, at the places of the codes.
    """
    rows, columns = codes.indices[:, :, None], codes.indices[:, None, :]
    zero = jnp.zeros((codes.features, codes.features), jnp.float32)
    return zero.at[rows, columns].add(weighted[:, :, None] * codes.values[:, None, :])
