"""A method with half of its dictionary dead from the start, and what a policy makes of it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.evaluation.planted.laboratory import Plant, train
from jaxinterp.evaluation.planted.recovery import mcc
from jaxinterp.methods import Recipe

PLANT = Plant(features=24, width=16, active=2)
ROWS, HALF = 48, 24


@dataclass(frozen=True)
class HalfDead:
    """The method, whose first half of features starts with a bias that silences it."""

    method: Any
    bias: float = -10.0

    def needs(self, site):
        return self.method.needs(site)

    def recipe(self, steps):
        one = self.method.recipe(steps)

        def start(key, sample, model=None):
            state = one.init(key, sample, model)
            old = state.decomposition.encoder_bias
            return eqx.tree_at(
                lambda state: state.decomposition.encoder_bias,
                state,
                jnp.where(jnp.arange(len(old)) < len(old) // 2, self.bias, old),
            )

        return Recipe(start, one.step, one.finish)


@cache
def outcome(method, steps=1500):
    """(the fraction of the half that is still dead, mean matched cosine with the plant)."""
    rows = PLANT.rows(jax.random.key(0))
    (dictionary,), _ = train(method, PLANT.draw, [rows], Sites("x", "x"), steps=steps)
    samples = PLANT.draw(rows, jax.random.key(77), 8192)["x"]
    fired = np.asarray(dictionary.encode(samples).fired(jnp.ones(8192)))
    return float((fired[:HALF] == 0).mean()), mcc(rows, dictionary.decoder)
