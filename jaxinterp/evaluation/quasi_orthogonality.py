"""How nearly orthogonal a dictionary is, and whether its codes are as long as their inputs say.

Unit atoms D_j are ε-quasi-orthogonal where |D_i . D_j| <= ε for i != j. Then z = sum_j f_j D_j with h atoms obeys

    |z|^2 / (1 + ε (h - 1))  <=  |f|^2  <=  |z|^2 / (1 - ε (h - 1))

The AFA norm (approximate feature activation) of an input is |z|: what |f| should be. Read backwards, one input gives a
lower bound of the ε of any dictionary that its codes could come from:

    ε_LBO = | |z|^2 - |f|^2 | / ((h - 1) |f|^2)

For atoms of other lengths f̃_j = f_j |D_j| stands for f_j. The ZF plot is |z| against |f̃|, one point a token, with the
identity line: below it (|f̃| < |z|) a token is under-active, above it over-active.

Only the active atoms of a token enter the sums: with h = their number the bounds hold too, and are far tighter.

Codes can be too short for two reasons, with f D = sum_j f_j D_j what they write:

    |f| / |z|  =  |f| / |f D|  *  |f D| / |z|

The first factor is one of directions: below 1 where features that are active together are related. The second is
below 1 where something is not reconstructed, however orthogonal the atoms. As a control of the first, the same codes
are given to other features of the same dictionary at random: what it lacks then is due to the number of dimensions.

Source: Lee et al. 2025, arXiv 2503.24277 (bounds as recalled; they follow from |z|^2 - |f|^2 = sum over i != j of
f_i f_j D_i . D_j, whose size is at most ε (h - 1) |f|^2). The published plots count the decoder's bias as one more
atom; here it is taken off z instead. The published code's eps_max and eps_mean are of signed products; here of their
sizes, as in the definition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.core.decomposition import Codes
from jaxinterp.decompositions.codes import DenseCodes
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


class Lengths(NamedTuple):
    """Numbers about the lengths of codes, and |z| and |f| of every token."""

    numbers: dict[str, float | None]
    inputs: Float[np.ndarray, " tokens"]
    codes: Float[np.ndarray, " tokens"]


TOKENS = 2048
"""Tokens encoded at a time."""

CODE_LENGTHS = (
    "under-active",
    "over-active",
    "|f|/|z| low quartile",
    "|f|/|z| median",
    "|f|/|z| high quartile",
    "|f|/|fD| median",
    "|fD|/|z| median",
    "|f|/|fD| shuffled",
    "(h-1) eps_LBO",
    "eps_LBO median",
)
"""Numbers over the tokens with at least two active features: with one, no coherence can make a gap."""


def code_lengths(dictionary: Dictionary, x: Float[Array, "tokens d_in"], key: PRNGKeyArray) -> Lengths:
    """The module's numbers for a sparse autoencoder; None, for those of CODE_LENGTHS, where no token has two features.

    Args:
      key: of the features that codes are given to in the control.
    """
    order = jax.random.permutation(key, dictionary.features)
    parts = []
    for start in range(0, len(x), TOKENS):
        some = x[start : start + TOKENS]
        points, dense = zf_points(dictionary, some), dictionary.encode(some).dense()
        moved = dense[:, order]
        lengths = (afa_norm(codes @ dictionary.decoder) for codes in (dense, moved))
        parts.append((*points, code_norm(DenseCodes(moved), dictionary.decoder), *lengths))
    columns = (np.concatenate([np.asarray(part[n], np.float64) for part in parts]) for n in range(6))
    z, f, h, moved_f, written, scattered = columns
    eps = coherence(dictionary.decoder)
    numbers: dict[str, float | None] = dict.fromkeys(CODE_LENGTHS)
    kept = (h > 1) & np.all([one > 0 for one in (z, f, written, scattered)], axis=0)
    if kept.any():
        ratio = (f / np.where(kept, z, 1.0))[kept]
        needed = np.asarray(epsilon_lbo(*(jnp.asarray(one[kept]) for one in (z, f, h))), np.float64)
        values = (
            np.mean(ratio < 1),
            np.mean(ratio > 1),
            *np.quantile(ratio, (0.25, 0.5, 0.75)),
            np.median(f[kept] / written[kept]),
            np.median(written[kept] / z[kept]),
            np.median(moved_f[kept] / scattered[kept]),
            np.median((h[kept] - 1) * needed),
            np.median(needed),
        )
        numbers = {name: float(value) for name, value in zip(CODE_LENGTHS, values, strict=True)}
    numbers |= {"eps_mean": float(eps.eps_mean), "eps_max": float(eps.eps_max), "no code": float(np.mean(h == 0))}
    return Lengths(numbers, z, f)
