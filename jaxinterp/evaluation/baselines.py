"""Baselines for the scoreboard, at the same k, from one pass over training tokens.

Everything here is solved, not trained: means, covariances and least squares are sums over tokens, solved on the host
in float64.

    best linear map    A = Cov(x)^-1 Cov(x, y)
    principal comp.    the k leading eigenvectors of Cov(y)
    random features    E random unit rows, TopK codes c;  [D; b] = argmin |y - c D - b|^2 (+ a small ridge)
    neurons            nothing but the mean hidden activation
"""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import Rows, harvest_jit
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.plain import LinearMap, Neurons, PrincipalComponents
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder
from jaxinterp.models.load import Subject
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


@dataclass
class CodeMoments:
    """Sums over training tokens of sparse codes c: c, c c^T and c y^T; on the host, where k^2 entries are cheap."""

    codes: np.ndarray
    codes_codes: np.ndarray
    codes_y: np.ndarray

    def add(self, codes: SparseCodes, weight: Array, y: Array) -> None:
        """Add one batch."""
        tokens, k = codes.values.shape
        shape = tokens, codes.features
        columns = np.asarray(codes.indices).ravel()
        ends = np.arange(0, tokens * k + 1, k)
        plain = scipy.sparse.csr_array((np.asarray(codes.values, np.float64).ravel(), columns, ends), shape)
        weighted = plain.multiply(np.asarray(weight, np.float64)[:, None]).T.tocsr()
        self.codes += weighted.sum(axis=1)
        self.codes_codes += weighted @ plain
        self.codes_y += weighted @ np.asarray(y, np.float64)


@ordinary()
def baselines(
    subject: Subject, train: grain.MapDataset, site: str, *, k: int, features: int, tokens: int = 131_072, seed: int = 0
) -> dict[str, PyTree]:
    """The four baselines for the MLP at `site`, by name.

    Args:
      train: windows of training text, {"tokens", "weight"}, each `[seq]`.
      k: active neurons, components and random features per token.
      features: number of random features (at most 8192 are used).
      tokens: how much of the text to use.
    Raises:
      UserError: the leaf is not an MLP of this package, whose neurons have write vectors.
    """
    mlp = select(subject.model, site).get()
    if not isinstance(mlp, MLP):
        raise UserError(
            f"site={site!r} is a {type(mlp).__name__}: the baselines read the neurons of this package's MLPs: load the "
            "same weights with `load`, or score without baselines."
        )
    sites = Sites(f"{site}/in", f"{site}/out")
    names = (f"{site}/in", f"{site}/hidden", f"{site}/out")
    random: Dictionary | None = None
    sums: Moments | None = None
    for batch in take(train, tokens, seed=seed, rows=8):
        on_device = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")}
        rows = harvest_jit(subject.model, on_device, names).flat()
        if random is None:
            random = _random_dictionary(jax.random.key(seed), rows, sites, k, min(features, MOST_RANDOM_FEATURES))
            width = rows.arrays[f"{site}/out"].shape[1]
            code_sums = CodeMoments(
                *(np.zeros((random.features, *shape)) for shape in ((), (random.features,), (width,)))
            )
        new = _moments(rows, site)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        code_sums.add(_encode(random, rows.arrays[f"{site}/in"]), rows.weight, rows.arrays[f"{site}/out"])
    assert random is not None and sums is not None  # `take` gives at least one batch
    return {
        "neurons": _neurons(sums, mlp, sites, k),
        "pca": _principal_components(sums, site, k),
        "linear": _linear_map(sums, sites),
        "random features": _solve_decoder(random, code_sums, sums),
    }


def _random_dictionary(key: PRNGKeyArray, rows: Rows, sites: Sites, k: int, features: int) -> Dictionary:
    """A dictionary with random unit read vectors, normalised by the first batch."""
    sample = make_batch(rows.arrays, rows.weight, sites)
    dictionary = (
        SparseAutoencoder(features=features, k=min(k, features)).recipe(1).init(key, sample, None).decomposition
    )
    return dictionary


@eqx.filter_jit
def _encode(random: Dictionary, x: Array) -> SparseCodes:
    codes = random.encode(x)
    assert isinstance(codes, SparseCodes)
    return codes


@partial(jax.jit, static_argnums=1)
def _moments(rows: Rows, site: str) -> Moments:
    x, hidden, y, w = *(rows.arrays[f"{site}/{port}"] for port in ("in", "hidden", "out")), rows.weight
    return Moments(
        weight=jnp.sum(w),
        x=w @ x,
        y=w @ y,
        hidden=w @ hidden,
        xx=(w[:, None] * x).T @ x,
        xy=(w[:, None] * x).T @ y,
        yy=(w[:, None] * y).T @ y,
    )


def _wide(array: Array) -> np.ndarray:
    return np.asarray(array, np.float64)


def _narrow(array: np.ndarray) -> Array:
    return jnp.asarray(array, jnp.float32)


def _neurons(sums: Moments, mlp: MLP, sites: Sites, k: int) -> Neurons:
    count = float(sums.weight)
    return Neurons(mlp, sums.hidden / count, sums.y / count, min(k, sums.hidden.shape[0]), sites)


def _principal_components(sums: Moments, site: str, k: int) -> PrincipalComponents:
    mean = _wide(sums.y) / float(sums.weight)
    covariance = _wide(sums.yy) / float(sums.weight) - np.outer(mean, mean)
    _, vectors = np.linalg.eigh(covariance)  # ascending
    directions = vectors[:, ::-1][:, :k].T
    return PrincipalComponents(_narrow(directions), _narrow(mean), Sites(f"{site}/out", f"{site}/out"))


def _linear_map(sums: Moments, sites: Sites) -> LinearMap:
    count = float(sums.weight)
    mean_x, mean_y = _wide(sums.x) / count, _wide(sums.y) / count
    matrix = _ridge(
        _wide(sums.xx) / count - np.outer(mean_x, mean_x), _wide(sums.xy) / count - np.outer(mean_x, mean_y)
    )
    return LinearMap(_narrow(matrix), _narrow(mean_x), _narrow(mean_y), sites)


def _solve_decoder(random: Dictionary, code_sums: CodeMoments, sums: Moments) -> Dictionary:
    """The random dictionary with the decoder that is best for it, in the target's own units."""
    count = float(sums.weight)
    mean_codes, mean_y = code_sums.codes / count, _wide(sums.y) / count
    gram = code_sums.codes_codes / count - np.outer(mean_codes, mean_codes)
    decoder = _ridge(gram, code_sums.codes_y / count - np.outer(mean_codes, mean_y))
    mean = _narrow(mean_y)
    solved = (
        _narrow(decoder),
        _narrow(-mean_codes @ decoder),
        jnp.ones((), jnp.float32),
        mean,
        mean,
    )
    return eqx.tree_at(
        lambda d: (d.decoder, d.decoder_bias, d.output_scale, d.output_mean, d.target_mean), random, solved
    )


def _ridge(gram: np.ndarray, right: np.ndarray, relative: float = 1e-4) -> np.ndarray:
    """(gram + ridge)^-1 right, with a ridge of `relative` times the mean of the diagonal."""
    penalty = relative * max(np.trace(gram) / len(gram), 1e-30)
    return scipy.linalg.solve(gram + penalty * np.eye(len(gram)), right, assume_a="pos")
