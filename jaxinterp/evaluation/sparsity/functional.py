"""How many features a token needs: density, CETT and functional L0 as columns of the scoreboard.

    scoreboard({"a": a, "b": b}, subject, heldout, effect=functional(target=0.2))

With n_j = z_j D_j, the part of the reconstruction that feature j of a token writes, and one threshold for all tokens:

    density         active features / features
    functional_l0   features of a token with |n_j| > ε, at a threshold ε whose CETT is at most the target
    functional_cett what it achieves: E |sum of the n_j that are left out| / |sum of all n_j|

The threshold is found by bisection among all |n_j| of the held-out tokens, as in `cett_threshold`: *a* crossing, since
CETT is not monotone. A dictionary's row has the decoder's rows as D, the neurons' row (k of them) those of W_down, so
that the two compare. Rows without decoder, of several layers at once, and of codes with more than `most` active
features where these are needed, are NaN.

Source: CETT, Sparsing Law, arXiv 2411.02335, section 3; with a dictionary's decoder in place of W_down here.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.decomposition import Decomposition, Vectors
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.decompositions.plain import Neurons
from jaxinterp.evaluation.columns import Column
from jaxinterp.evaluation.effects import Columns, Effect, Row, Table
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.kernels import rank, select_topk


class Parts(NamedTuple):
    """Of every token: its largest |n_j|, descending, and what share of the output's norm is missing with c kept."""

    sizes: Float[Array, "*batch kept"]
    missing: Float[Array, "*batch counts"]  # counts = kept + 1, from c = 0, where all is missing


def parts_of(codes: SparseCodes | DenseCodes, decoder: Float[Array, "features d"], most: int = 256) -> Parts:
    """Sizes and missing shares; `missing` is NaN for a token that writes nothing."""
    count = codes.values.shape[-1]
    norms = jnp.linalg.norm(decoder.astype(jnp.float32), axis=-1)

    def token(values: Array, indices: Array | None) -> tuple[Array, Array]:
        rows = decoder if indices is None else decoder[indices]
        whole = values @ rows
        sizes = jnp.abs(values) * (norms if indices is None else norms[indices])
        sizes, order = select_topk(sizes, k=min(most, count), rank=rank.by_size())
        kept = jnp.cumsum(values[order][:, None] * rows[order], axis=0)
        left = jnp.linalg.norm(whole - jnp.concatenate([jnp.zeros_like(kept[:1]), kept]), axis=-1)
        return sizes, left / jnp.linalg.norm(whole)

    values = codes.values.astype(jnp.float32)
    flat = values.reshape(-1, count)
    if isinstance(codes, SparseCodes):
        sizes, missing = jax.lax.map(lambda both: token(*both), (flat, codes.indices.reshape(flat.shape)))
    else:
        sizes, missing = jax.lax.map(lambda one: token(one, None), flat)
    return Parts(sizes.reshape(*values.shape[:-1], -1), missing.reshape(*values.shape[:-1], -1))


class Functional(NamedTuple):
    """Features that a token needs, and the CETT with only these."""

    needed: float
    achieved: float


def needed_at(
    sizes: Float[np.ndarray, "tokens kept"],
    missing: Float[np.ndarray, "tokens counts"],
    target: float,
) -> Functional:
    """One threshold for all tokens, by bisection among all sizes; NaN where more sizes than are given are needed.

    Raises:
      UserError: the target is negative.
    """
    if not target >= 0:
        raise UserError(f"target={target} must be at least 0: CETT is a share of the output's norm.")
    sizes, missing = (part[np.isfinite(missing[:, 0])] for part in (sizes, missing))
    if not len(sizes):
        return Functional(math.nan, math.nan)
    cut = missing[:, -1] > 1e-4  # tokens with further features: below their least size nothing is known
    least = float(sizes[cut, -1].max(initial=0.0))
    candidates = np.unique(sizes[sizes >= least])

    def achieved(epsilon: float) -> tuple[float, float]:
        counts = (sizes > epsilon).sum(axis=-1)
        return float(missing[np.arange(len(sizes)), counts].mean()), float(counts.mean())

    low, high, best = -1, len(candidates), None
    while high - low > 1:
        middle = (low + high) // 2
        value, needed = achieved(float(candidates[middle]))
        if value <= target:
            low, best = middle, Functional(needed, value)
        else:
            high = middle
    if best is not None:
        return best
    if cut.any():
        return Functional(math.nan, math.nan)
    return Functional(float((sizes > 0).sum(axis=-1).mean()), 0.0)


def functional(target: float = 0.2, *, base: Effect = NEXT_TOKEN, most: int = 256) -> Effect:
    """Another effect with the three columns of this module besides its own.

    Args:
      target: the CETT that may be left out.
      most: how many features of a token are looked at, the largest ones.
    Raises:
      UserError: the target is negative or not below 1.

    Example:
      >>> rows = scoreboard({"mine": result.decomposition}, subject, heldout, effect=functional(0.2), tokens=512)
      >>> rows[0]["functional_l0"] <= rows[0]["l0"]
      True
    """
    if not 0 <= target < 1:
        raise UserError(f"target={target} must be at least 0 and below 1: CETT is a share of the output's norm.")

    def of_codes(decomposition: Decomposition, codes: Any) -> Columns:
        decoder = decoder_of(decomposition)
        if decoder is None or not isinstance(codes, SparseCodes | DenseCodes):
            return {}
        parts = parts_of(codes, decoder, most)
        share = codes.active() / codes.features
        return {"functional_sizes": parts.sizes, "functional_missing": parts.missing, "functional_density": share}

    def numbers(table: Table) -> Row:
        row = base.numbers(table)
        names = ("density", "functional_l0", "functional_cett")
        if "functional_sizes" not in table.parts:
            return row | dict.fromkeys(names, math.nan)
        counts = table["weight"] > 0
        sizes, missing = (table[f"functional_{name}"].reshape(len(counts), -1)[counts] for name in ("sizes", "missing"))
        found = needed_at(sizes, missing, target)
        return row | {
            "density": float(table["functional_density"][counts].mean()),
            "functional_l0": found.needed,
            "functional_cett": found.achieved,
        }

    return replace(base, numbers=numbers, columns=(*base.columns, *columns_of(target)), of_codes=of_codes)


def decoder_of(decomposition: Decomposition) -> Float[Array, "features d"] | None:
    """The rows that codes are multiplied with; of neurons, W_down; None where there are none, or several matrices."""
    if isinstance(decomposition, Neurons):
        return decomposition.mlp.down_proj.weight
    decoder = decomposition.decoder if isinstance(decomposition, Vectors) else None
    return decoder if isinstance(decoder, jax.Array) and decoder.ndim == 2 else None


def columns_of(target: float) -> tuple[Column, ...]:
    """How the three are shown."""
    return (
        Column(
            "density",
            "Density",
            "Features in use",
            "Share of all features that are active on a held-out token.",
            "percent",
            -1,
        ),
        Column(
            "functional_l0",
            "Needed",
            "Features in use",
            f"Features of a token needed for all but {target:.0%} of what its features write, at one threshold "
            "of their size for all tokens.",
            "one",
            -1,
            short="need",
            printed="{:.1f}",
        ),
        Column(
            "functional_cett",
            "CETT",
            "Features in use",
            "Mean share of the norm of what a token's features write that is missing with only the needed ones.",
            "percent",
        ),
    )
