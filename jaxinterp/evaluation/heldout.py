"""Held-out activations and their means, from one pass over the text."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import READ, Rows, harvest_jit, on_device
from jaxinterp.evaluation.effects import Windows
from jaxinterp.training.progress import counting

MOST_KEPT = 2**28
"""Bytes of held-out activations that stay in memory from the pass that finds their means: 256 MiB."""


def heldout_rows(
    model: PyTree,
    batches: Sequence[Windows],
    sites: tuple[str, ...],
    most: float = MOST_KEPT,
    *,
    progress: bool = False,
) -> tuple[dict[str, Array], list[Rows | None]]:
    """The mean of every array over the tokens that have weight, and the rows of every batch, from one pass.

    Args:
      most: bytes of rows that are kept; None is in the place of those that came after.
    """
    sums, count = dict.fromkeys(sites, np.zeros(())), 0.0
    found: list[Rows | None] = []
    with counting(len(batches), "reading held-out text", "batches", shown=progress) as done:
        for batch in batches:
            done()
            windows = harvest_jit(model, on_device(batch, READ), sites)
            rows = windows.flat()
            sums = {name: sums[name] + np.asarray(rows.weight @ rows.arrays[name], np.float64) for name in sites}
            count += float(rows.weight.sum())
            most -= sum(array.nbytes for array in windows.arrays.values())
            found.append(windows if most >= 0 else None)
    if not count:
        raise UserError("no token of the held-out text has weight: give longer documents.")
    return {name: jnp.asarray(total / count, jnp.float32) for name, total in sums.items()}, found
