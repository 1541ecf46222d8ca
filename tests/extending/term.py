"""A term of one's own, to be added to others: write vectors should not lie along each other."""

import jax.numpy as jnp

from jaxinterp.objectives import Ratio, reconstruction, scale, total


def overlap():
    """mean over pairs i ≠ j of cos(D_i, D_j)^2; metric `overlap`."""

    def term(decomposition, batch, forward):
        rows = decomposition.decoder
        lengths = jnp.sqrt(jnp.sum(rows**2, axis=1) + 1e-12)
        cosines = (rows @ rows.T) / (lengths[:, None] * lengths)
        count = rows.shape[0] * (rows.shape[0] - 1)
        value = (jnp.sum(cosines**2) - jnp.sum(jnp.diagonal(cosines) ** 2)) / count
        return value, {"overlap": Ratio(value, jnp.ones(()))}

    return term


objective = total(reconstruction(), scale(overlap(), 3.0))
