"""A new method in one file: features of both signs, the k largest in size. Nothing else of the package knows of it."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx

from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.kernels import encode_ranked, rank
from jaxinterp.methods import SparseAutoencoder


class TopKBySize(eqx.Module):
    """z = a at the k largest |a|."""

    k: int = eqx.field(static=True)

    def codes(self, x, rows, bias, *, k, weight, training):
        values, indices, _ = encode_ranked(x, rows, bias, rank.by_size(), k=self.k, keep=k)
        return SparseCodes(values, indices, rows.shape[0])

    def after_step(self, metrics, step):
        return self


@dataclass(frozen=True)
class SignedSparseAutoencoder(SparseAutoencoder):
    """A TopK autoencoder whose codes may be negative."""

    activation: Any = "signed"

    def make_activation(self):
        return TopKBySize(self.k)
