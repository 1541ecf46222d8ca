"""How nearly orthogonal a dictionary is, and whether its codes are as long as their inputs say.

Unit atoms D_j are ε-quasi-orthogonal where |D_i . D_j| <= ε for i != j. Then z = sum_j f_j D_j with h atoms obeys

    |z|^2 / (1 + ε (h - 1))  <=  |f|^2  <=  |z|^2 / (1 - ε (h - 1))

The AFA norm (approximate feature activation) of an input is |z|: what |f| should be. Read backwards, one input gives a
lower bound of the ε of any dictionary that its codes could come from:

    ε_LBO = | |z|^2 - |f|^2 | / ((h - 1) |f|^2)

For atoms of other lengths f̃_j = f_j |D_j| stands for f_j. The ZF plot is |z| against |f̃|, one point a token, with the
identity line: below it (|f̃| < |z|) a token is under-active, above it over-active.

Only the active atoms of a token enter the sums: with h = their number the bounds hold too, and are far tighter.

Source: Lee et al. 2025, arXiv 2503.24277 (bounds as recalled; they follow from |z|^2 - |f|^2 = sum over i != j of
f_i f_j D_i . D_j, whose size is at most ε (h - 1) |f|^2). The published plots count the decoder's bias as one more
atom; here it is taken off z instead. The published code's eps_max and eps_mean are of signed products; here of their
sizes, as in the definition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.decompositions.codes import Codes
from jaxinterp.decompositions.dictionary import Dictionary

ROWS = 256
"""Atoms compared with all others at a time: no `features x features` array."""


class Coherence(NamedTuple):
    """The largest and the mean |D_i . D_j| over i != j, of atoms made unit vectors."""

    eps_max: Float[Array, ""]
    eps_mean: Float[Array, ""]


class ZFPoints(NamedTuple):
    """Per token: |z|, |f̃| and how many features are active."""

    inputs: Float[Array, "*axes"]
    codes: Float[Array, "*axes"]
    active: Float[Array, "*axes"]

    def ratio(self) -> Float[Array, "*axes"]:
        """|f̃| / |z|: below 1 under-active, above 1 over-active; 0 for an input of zeros."""
        return jnp.where(self.inputs > 0, self.codes / jnp.where(self.inputs > 0, self.inputs, 1.0), 0.0)


def afa_norm(z: Float[Array, "*axes d"]) -> Float[Array, "*axes"]:
    """|z|: the norm that the codes of z should have, were atoms orthogonal."""
    return jnp.linalg.norm(z.astype(jnp.float32), axis=-1)


def code_norm(codes: Codes, rows: Float[Array, "features d"]) -> Float[Array, "*axes"]:
    """|f̃| = sqrt(sum_j f_j^2 |D_j|^2): the norm of codes as if atoms were unit vectors."""
    squares = jax.tree.map(lambda values: values**2 if jnp.issubdtype(values.dtype, jnp.floating) else values, codes)
    return jnp.sqrt(squares.weighted(jnp.sum(rows.astype(jnp.float32) ** 2, axis=1)))


def epsilon_lbo(
    z: Float[Array, "*axes"], f: Float[Array, "*axes"], h: Float[Array, "*axes"] | Int[Array, "*axes"] | int
) -> Float[Array, "*axes"]:
    """ε_LBO from norms |z|, |f̃| and the number of atoms; infinite where |f̃| = 0 < |z|, 0 where a lone atom is exact."""
    gap, mass = jnp.abs(z**2 - f**2), (jnp.asarray(h) - 1) * f**2
    return jnp.where(gap == 0, 0.0, gap / jnp.where(mass > 0, mass, 0.0))


def norm_bounds(
    z: Float[Array, "*axes"], epsilon: Float[Array, ""] | float, h: Float[Array, "*axes"] | Int[Array, "*axes"] | int
) -> tuple[Float[Array, "*axes"], Float[Array, "*axes"]]:
    """The least and the greatest |f| that ε-quasi-orthogonal atoms allow at |z|; infinite where ε (h - 1) >= 1."""
    spread = epsilon * (jnp.asarray(h, jnp.float32) - 1)
    room = jnp.maximum(1 - spread, 0.0)
    return z / jnp.sqrt(1 + spread), jnp.where(room > 0, z / jnp.sqrt(jnp.where(room > 0, room, 1.0)), jnp.inf)


def coherence(rows: Float[Array, "features d"]) -> Coherence:
    """eps_max and eps_mean of a dictionary's rows; rows of zeros are orthogonal to everything."""
    wide = rows.astype(jnp.float32)
    unit = wide / jnp.maximum(jnp.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    features = unit.shape[0]

    def against_all(index: Int[Array, ""]) -> tuple[Array, Array]:
        others = jnp.arange(features) != index
        sizes = jnp.where(others, jnp.abs(unit @ unit[index]), 0.0)
        return jnp.max(sizes), jnp.sum(sizes)

    largest, sums = jax.lax.map(against_all, jnp.arange(features), batch_size=min(ROWS, features))
    return Coherence(jnp.max(largest), jnp.sum(sums / max(features - 1, 1)) / features)


def zf_points(dictionary: Dictionary, x: Float[Array, "*axes d_in"], *, training: bool = False) -> ZFPoints:
    """The points of the ZF plot of a sparse autoencoder: z = x' - b_D, in its normalised units.

    Args:
      training: encode as in training (BatchTopK: over these tokens instead of by its threshold).
    """
    codes = dictionary.encode(x, training=training)
    z = dictionary.normalise(x) - dictionary.decoder_bias
    return ZFPoints(afa_norm(z), code_norm(codes, dictionary.decoder), codes.active())
