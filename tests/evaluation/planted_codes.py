"""Dictionaries of orthonormal atoms, and codes of theirs: exact cases of quasi-orthogonality."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.decompositions.activations import TopK
from jaxinterp.methods import SparseAutoencoder


def sparse_codes(features, active, tokens, seed=0):
    """Exactly `active` codes a token, uniform between 0.5 and 1.5."""
    rng = np.random.default_rng(seed)
    codes = np.zeros((tokens, features), np.float32)
    for row in codes:
        row[rng.choice(features, active, replace=False)] = rng.uniform(0.5, 1.5, active)
    return jnp.asarray(codes)


def exact(codes, atoms, kept):
    """A TopK dictionary that reads and writes these atoms, and the inputs that the codes make of them."""
    x = jnp.asarray(codes @ atoms)
    method = SparseAutoencoder(features=32, activation=TopK(kept), normalise=False)
    batch = make_batch({"m/out": x}, jnp.ones(len(x)), Sites("m/out", "m/out"))
    dictionary = method.recipe(10).init(jax.random.key(0), batch, None).decomposition
    places = lambda d: (d.encoder, d.decoder)
    return eqx.tree_at(places, dictionary, (jnp.asarray(np.linalg.inv(atoms).T), jnp.asarray(atoms))), x


def orthonormal():
    return np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype(np.float32)


def planted_pairs(*, related):
    """Two atoms of each pair are active together, at a cosine of 0.8 or 0; the dictionary is exact."""
    rng, atoms = np.random.default_rng(0), orthonormal()
    if related:
        atoms[1::2] = 0.8 * atoms[::2] + 0.6 * atoms[1::2]
    codes = np.zeros((400, 32), np.float32)
    pairs = rng.integers(0, 16, 400)
    codes[np.arange(400), 2 * pairs] = codes[np.arange(400), 2 * pairs + 1] = rng.uniform(0.5, 1.5, 400)
    return exact(codes, atoms, 2)


def planted_twelve():
    """Twelve orthonormal atoms are active, of which the dictionary keeps four."""
    return exact(np.asarray(sparse_codes(32, 12, 400)), orthonormal(), 4)
