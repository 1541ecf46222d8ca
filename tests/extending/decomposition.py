"""A decomposition of a new kind, with the method that finds it: every input is answered by its nearest prototype.

    j(x) = argmin_j |x - centre_j|^2,    y ≈ value_j(x)          (k-means: Lloyd 1982; a table in the place of an MLP)

It is saved by its fields, and loaded with `load_decomposition(folder, kinds=(Prototypes,))`.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.fields import STATE, STATE_ROWS
from jaxinterp.core.metrics import ratio
from jaxinterp.core.sites import Needs, Sites
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.decompositions.offered import replaced
from jaxinterp.methods.recipes import alternating_method
from jaxinterp.models.layers import no_tap
from jaxinterp.models.rules import EXACT


class Prototypes(eqx.Module):
    """One feature is active for each token, with the value 1."""

    encoder: Float[Array, "features d_in"] = eqx.field(metadata=STATE_ROWS)
    decoder: Float[Array, "features d_out"] = eqx.field(metadata=STATE_ROWS)
    target_mean: Float[Array, " d_out"] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    def nearest(self, x):
        return jnp.argmin(jnp.sum(self.encoder**2, axis=1) - 2 * x @ self.encoder.T, axis=-1)

    def encode(self, x, *, k=None, weight=None, training=False):
        indices = self.nearest(x.astype(jnp.float32))[..., None]
        return SparseCodes(jnp.ones(indices.shape, jnp.float32), indices, self.encoder.shape[0])

    def decode(self, codes, x):
        return codes.dense() @ self.decoder

    def __call__(self, x, *, tap=no_tap, rules=EXACT):
        return replaced(self, x, tap)


@dataclass(frozen=True)
class KMeans:
    """Lloyd's two steps, a sweep of all kept rows: assign every row, move every prototype to the mean of its rows."""

    features: int = 8

    def needs(self, site):
        return Needs(f"{site}/in", f"{site}/out", rows="kept")

    def recipe(self, steps):
        def init(key, sample, model):
            rows = jax.random.choice(key, sample.weight.size, (self.features,), False, p=sample.weight)
            mean = sample.weight @ sample.targets / jnp.sum(sample.weight)
            return Prototypes(sample.inputs[rows], sample.targets[rows], mean, sample.sites), None

        def sweep(found, aux, batch, key, model):
            member = jax.nn.one_hot(found.nearest(batch.inputs), self.features) * batch.weight[:, None]
            count = jnp.sum(member, axis=0)[:, None]

            def moved(rows, before):
                return jnp.where(count > 0, member.T @ rows / jnp.maximum(count, 1), before)

            centres, values = moved(batch.inputs, found.encoder), moved(batch.targets, found.decoder)
            error = jnp.sum((batch.inputs - found.encoder[found.nearest(batch.inputs)]) ** 2, axis=-1)
            made = Prototypes(centres, values, found.target_mean, found.sites)
            return made, None, {"error": ratio(error, batch.weight)}

        return alternating_method(init, sweep)
