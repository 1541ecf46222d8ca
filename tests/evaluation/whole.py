"""An MLP as a decomposition that loses nothing."""

import equinox as eqx
import jax

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.codes import DenseCodes


class Whole(eqx.Module):
    """The MLP itself as a decomposition: nothing is lost."""

    mlp: eqx.Module
    target_mean: jax.Array
    sites: Sites = eqx.field(static=True)

    def encode(self, x, **_):
        return DenseCodes(self.mlp.hidden(x))

    def decode(self, codes, x):
        return self.mlp.write(codes.values)

    def __call__(self, x):
        return self.mlp(x)
