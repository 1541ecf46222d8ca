"""A new method in one file: features of both signs, the k largest in size. Nothing else of the package knows of it."""

from dataclasses import dataclass

import equinox as eqx

from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.kernels import encode_ranked, rank
from jaxinterp.methods.sparse.dictionary import DictionaryFields, autoencoder_recipe
from jaxinterp.objectives import reconstruction, total


class TopKBySize(eqx.Module):
    """z = a at the k largest |a|."""

    k: int = eqx.field(static=True)

    def codes(self, x, rows, bias, *, k, weight, training):
        values, indices, _ = encode_ranked(x, rows, bias, rank.by_size(), k=self.k, keep=k)
        return SparseCodes(values, indices, rows.shape[0])

    def after_step(self, metrics, step):
        return self


@dataclass(frozen=True)
class SignedSparseAutoencoder(DictionaryFields):
    """A TopK autoencoder whose codes may be negative."""

    k: int = 32

    def needs(self, site):
        return Sites(f"{site}/out", f"{site}/out")

    def recipe(self, steps):
        return autoencoder_recipe(TopKBySize(self.k), total(reconstruction()), self, steps)
