"""The Matryoshka loss: the first features of a dictionary must do on their own, at several sizes at once.

With prefix sizes m_1 < ... < m_g = features, codes z and write vectors D:

    x̂_i = x̂_(i-1) + s sum over m_(i-1) < j <= m_i of z_j D_j,   x̂_0 = the output without codes
    prefixes = 1/g sum_i |y - x̂_i|^2 / V,   V = `decomposition.target_variance`

Codes are chosen once, over the whole dictionary. Prefixes are partial sums: of dense codes each group is decoded by
itself, which costs as much as one decoding of all; of sparse codes every group but the first passes over all k slots,
those of other groups set to 0, which costs g - 1 decodings more.
"""

from itertools import pairwise

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Codes, Features, Revivable
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term, ratio


def prefixes(*sizes: int) -> Term:
    """Mean over prefixes of the squared error per token over the target's variance.

    Metrics: `fvu` of the whole dictionary, and `fvu_first_<size>` of every smaller prefix.

    Args:
      sizes: rising numbers of features, the last one all of them.
    Raises:
      UserError: sizes do not rise from 1 or more; when it is first traced: the last is not the dictionary's size.
    """
    check_sizes(sizes)

    def term(decomposition: Revivable, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        if sizes[-1] != decomposition.features:
            raise UserError(f"prefixes={sizes} must end with features={decomposition.features}.")
        value, metrics = jnp.zeros((), jnp.float32), {}
        # From the whole downwards: what is left when the later groups are taken away is the prefix, biases and any
        # path beside the codes included.
        output, ends = forward.output, (*sizes[1:], sizes[-1])
        for low, high in reversed(list(zip(sizes, ends, strict=True))):
            if low < high:
                output = output - decomposition.output_scale * group_sum(decomposition, forward.codes, low, high)
            error = jnp.sum((batch.targets - output) ** 2, axis=-1) / decomposition.target_variance
            fvu: Ratio = ratio(error, batch.weight)
            value += fvu.value() / len(sizes)
            metrics["fvu" if low == sizes[-1] else f"fvu_first_{low}"] = fvu
        return value, metrics

    return term


def group_sum(decomposition: Features, codes: Codes, low: int, high: int) -> Float[Array, "tokens d_out"]:
    """What features low <= j < high write, in normalised units: sum_j z_j D_j."""
    if isinstance(codes, SparseCodes):
        inside = (codes.indices >= low) & (codes.indices < high)
        return decomposition.combine(SparseCodes(jnp.where(inside, codes.values, 0.0), codes.indices, codes.features))
    return codes.dense()[:, low:high] @ decomposition.decoder[low:high]


def check_sizes(sizes: tuple[int, ...]) -> None:
    """Raises UserError if sizes are not rising numbers of features."""
    if not sizes or sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
        raise UserError(f"prefixes={sizes} must be rising numbers of features, each at least 1.")
