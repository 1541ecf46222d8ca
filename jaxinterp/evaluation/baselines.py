"""Baselines for the scoreboard, at the same k, from one pass over training tokens.

Everything here is solved, not trained: means, covariances and least squares are sums over tokens, gathered on the
device and solved on the host in float64.

    best linear map    A = Cov(x)^-1 Cov(x, y)
    principal comp.    the k leading eigenvectors of Cov(y)
    random features    E random unit rows, TopK codes c;  [D; b] = argmin |y - c D - b|^2 (+ a small ridge)
    neurons            nothing but the mean hidden activation
"""

from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, PRNGKeyArray

from jaxinterp.data.activations import Rows, harvest
from jaxinterp.data.batch import Batch, Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.plain import LinearMap, Neurons, PrincipalComponents
from jaxinterp.kernels import pieces
from jaxinterp.methods.sparse_autoencoder import SparseAutoencoder
from jaxinterp.models.mlp import MLP
from jaxinterp.models.sites import select

MOST_RANDOM_FEATURES = 8192  # their Gram matrix has features^2 entries


class Moments(eqx.Module):
    """Sums over training tokens; those of two sets of tokens add."""

    weight: Float[Array, ""]
    x: Float[Array, " d_in"]
    y: Float[Array, " d_out"]
    hidden: Float[Array, " d_mlp"]
    xx: Float[Array, "d_in d_in"]
    xy: Float[Array, "d_in d_out"]
    yy: Float[Array, "d_out d_out"]
    codes: Float[Array, " features"]
    codes_codes: Float[Array, "features features"]
    codes_y: Float[Array, "features d_out"]


def baselines(
    subject: Any, windows: Iterable[Mapping[str, Any]], site: str, *, k: int, features: int, seed: int = 0
) -> dict[str, Any]:
    """The four baselines for the MLP at `site`, by name.

    Args:
      windows: batches of training windows, {"tokens", "weight"}, each `[batch, seq]`.
      k: active neurons, components and random features per token.
      features: number of random features (at most 8192 are used).
    """
    mlp = select(subject.model, site).get()
    sites = Sites(f"{site}/in", f"{site}/out")
    names = (f"{site}/in", f"{site}/hidden", f"{site}/out")
    rows_of = eqx.filter_jit(lambda model, windows: harvest(model, windows, names))
    update = eqx.filter_jit(_moments)
    random: Dictionary | None = None
    sums: Moments | None = None
    for batch in windows:
        rows = rows_of(subject.model, {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")})
        if random is None:
            random = _random_dictionary(jax.random.key(seed), rows, sites, k, min(features, MOST_RANDOM_FEATURES))
        new = update(random, rows)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    assert random is not None and sums is not None, "no training windows were given"
    return {
        "neurons": _neurons(sums, mlp, sites, k),
        "pca": _principal_components(sums, site, k),
        "linear": _linear_map(sums, sites),
        "random features": _solve_decoder(random, sums),
    }


def _random_dictionary(key: PRNGKeyArray, rows: Rows, sites: Sites, k: int, features: int) -> Dictionary:
    """A dictionary with random unit read vectors, normalised by the first batch."""
    sample = Batch(rows.arrays, rows.weight, jnp.zeros((), jnp.int32), None, sites)
    dictionary = SparseAutoencoder(features=features, k=min(k, features)).recipe(1).init(key, sample).decomposition
    return dictionary


def _moments(random: Dictionary, rows: Rows) -> Moments:
    x, y, w = rows.arrays[random.sites.reads], rows.arrays[random.sites.writes], rows.weight
    hidden = next(array for name, array in rows.arrays.items() if name.endswith("/hidden"))
    codes = random.encode(x)
    values = codes.values * w[:, None]
    return Moments(
        weight=jnp.sum(w),
        x=w @ x,
        y=w @ y,
        hidden=w @ hidden,
        xx=(w[:, None] * x).T @ x,
        xy=(w[:, None] * x).T @ y,
        yy=(w[:, None] * y).T @ y,
        codes=pieces.outer_sum(values, codes.indices, jnp.ones((x.shape[0], 1)), random.features)[:, 0],
        codes_codes=pieces.outer_sum(values, codes.indices, codes.dense(), random.features),
        codes_y=pieces.outer_sum(values, codes.indices, y, random.features),
    )


def _wide(array: Array) -> np.ndarray:
    return np.asarray(array, np.float64)


def _neurons(sums: Moments, mlp: MLP, sites: Sites, k: int) -> Neurons:
    count = float(sums.weight)
    return Neurons(mlp, sums.hidden / count, sums.y / count, min(k, sums.hidden.shape[0]), sites)


def _principal_components(sums: Moments, site: str, k: int) -> PrincipalComponents:
    mean = _wide(sums.y) / float(sums.weight)
    covariance = _wide(sums.yy) / float(sums.weight) - np.outer(mean, mean)
    _, vectors = np.linalg.eigh(covariance)  # ascending
    directions = vectors[:, ::-1][:, :k].T
    return PrincipalComponents(
        jnp.asarray(directions, jnp.float32), jnp.asarray(mean, jnp.float32), Sites(f"{site}/out", f"{site}/out")
    )


def _linear_map(sums: Moments, sites: Sites) -> LinearMap:
    count = float(sums.weight)
    mean_x, mean_y = _wide(sums.x) / count, _wide(sums.y) / count
    matrix = _ridge(_wide(sums.xx) / count - np.outer(mean_x, mean_x), _wide(sums.xy) / count - np.outer(mean_x, mean_y))
    return LinearMap(*(jnp.asarray(array, jnp.float32) for array in (matrix, mean_x, mean_y)), sites)


def _solve_decoder(random: Dictionary, sums: Moments) -> Dictionary:
    """The random dictionary with the decoder that is best for it, in the target's own units."""
    count = float(sums.weight)
    mean_codes, mean_y = _wide(sums.codes) / count, _wide(sums.y) / count
    gram = _wide(sums.codes_codes) / count - np.outer(mean_codes, mean_codes)
    decoder = _ridge(gram, _wide(sums.codes_y) / count - np.outer(mean_codes, mean_y))
    solved = (
        jnp.asarray(decoder, jnp.float32),
        jnp.asarray(-mean_codes @ decoder, jnp.float32),
        jnp.ones(()),
        jnp.asarray(mean_y, jnp.float32),
    )
    return eqx.tree_at(lambda d: (d.decoder, d.decoder_bias, d.output_scale, d.output_mean), random, solved)


def _ridge(gram: np.ndarray, right: np.ndarray, relative: float = 1e-4) -> np.ndarray:
    """argmin |gram^1/2 (A - gram^-1 right)|^2 + ridge |A|^2, with a ridge of `relative` times the mean of the diagonal."""
    penalty = relative * max(np.trace(gram) / len(gram), 1e-30)
    return scipy.linalg.solve(gram + penalty * np.eye(len(gram)), right, assume_a="pos")
