"""A broken variant for each check of the conformance suite."""

from dataclasses import dataclass
from itertools import count

import equinox as eqx
import jax
from jaxtyping import Array, Float

from jaxinterp.core.sites import Sites
from jaxinterp.methods import Transcoder
from jaxinterp.models.layers import no_tap
from jaxinterp.models.rules import EXACT
from jaxinterp.objectives import reconstruction, total
from tests.conformance.cases import RATE, Case
from tests.extending.closed_form import WriteDirections

CALLS = count()


def impure(decomposition, batch, key, *, model=None):
    """An objective that counts how often it was traced, and weighs a term by it."""
    loss, metrics = total(reconstruction())(decomposition, batch, key)
    return loss + 0.1 * next(CALLS) * (decomposition.encoder**2).sum(), metrics


IMPURE = Case(Transcoder(features=24, k=3, learning_rate=RATE, objective=impure))

BLIND = Case(WriteDirections(0), site=None, text=False)
"""A closed form that looks at no number before it returns; its layer's weights are fine, the embedding is not."""


class Drifting(eqx.Module):
    """A decomposition that changes each time it is made."""

    rows: Float[Array, "features d"] = eqx.field(converter=lambda rows: rows * 1.5)


class Twofold(eqx.Module):
    """It does something else in its leaf's place than alone."""

    decomposition: eqx.Module
    sites: Sites = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."], *, tap=no_tap, rules=EXACT) -> Float[Array, "..."]:
        y = self.decomposition(x)
        return y if tap is no_tap else y + jax.numpy.ones_like(y)


@dataclass(frozen=True)
class Careless:
    """Settings that nobody checks."""

    features: int = 8
