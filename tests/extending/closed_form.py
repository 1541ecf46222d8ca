"""A method that reads the weights alone and needs no text: `closed_form`."""

from dataclasses import dataclass

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.fields import STATE_ROWS
from jaxinterp.core.sites import Needs
from jaxinterp.methods.recipes import closed_form


class Directions(eqx.Module):
    """What an MLP can write: one direction a row, as long as its singular value."""

    rows: Float[Array, "features d"] = eqx.field(metadata=STATE_ROWS)


@dataclass(frozen=True)
class WriteDirections:
    """The right singular vectors of an MLP's W_down, each times its singular value: from the weights alone."""

    layer: int = 0

    def needs(self, site):
        return Needs(rows="none")

    def recipe(self, steps):
        def solve(key, sample, model):
            weight = np.asarray(model.blocks[self.layer].mlp.down_proj.weight, np.float64)
            _, sizes, directions = np.linalg.svd(weight, full_matrices=False)
            return Directions(sizes[:, None] * directions)

        return closed_form(solve)
