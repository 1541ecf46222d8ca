"""Try an objective of your own: its shapes in a second, twenty steps on the tiny model, a row of the scoreboard.

def mine(decomposition, batch, key, *, model=None):
    loss, metrics = total(reconstruction())(decomposition, batch, key)
    return loss + ..., metrics

try_objective(mine)
"""

import grain
import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Method
from jaxinterp.evaluation.effects import Row
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods.sparse.transcoder import Transcoder
from jaxinterp.models.load import load
from jaxinterp.objectives import Objective
from jaxinterp.training.fit import fit

SITE = "blocks/1/mlp"
SEQ = 64


def try_objective(objective: Objective, *, steps: int = 20, method: Method | None = None) -> Row:
    """Train with an objective for a few steps on the planted model `tiny`, print how it went, and score the result.

    Args:
      objective: a pure function (decomposition, batch, key, *, model=None) -> (loss, metrics).
      steps: of 256 tokens each.
      method: trained in place of `Transcoder(features=128, k=8, objective=objective)`.
    Returns:
      The row of the scoreboard on held-out tokens, with `loss_first` and `loss_last`, the means of the first and last
      fifth of the steps.
    Raises:
      UserError: in a second or two, a mistake in the objective: what it returns, a Python `if` on an array ...

    Example:
      >>> from jaxinterp.objectives import l1, reconstruction, scale, total
      >>> row = try_objective(total(reconstruction(), scale(l1(), 1e-3)))  # doctest: +SKIP
    """
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1.")
    chosen = method or Transcoder(features=128, k=8, learning_rate=2e-2, objective=objective)
    subject = load("tiny")
    train, heldout = (random_windows(seed, count) for seed, count in ((0, 64), (1, 32)))
    result = fit(chosen, subject, train, site=SITE, steps=steps, batch_size=256, log_every=max(1, steps // 5))
    losses = [row["loss"] for row in result.history]
    row = score(result.decomposition, subject, heldout, tokens=32 * SEQ, ce_tokens=16 * SEQ)
    print(
        f"loss {losses[0]:.4g} -> {losses[-1]:.4g} in {steps} steps; on held-out tokens FVU {row['fvu']:.3f}, "
        f"L0 {row['l0']:.1f}, dead {row['dead_fraction']:.1%}"
    )
    return row | {"loss_first": losses[0], "loss_last": losses[-1]}


def random_windows(seed: int, count: int) -> grain.MapDataset:
    """Windows of random bytes, all that the planted model needs for a text: `[64]` tokens, weights and documents."""
    draw = np.random.default_rng(seed)
    return grain.MapDataset.source(
        [
            {
                "tokens": draw.integers(32, 127, SEQ).astype(np.int32),
                "weight": np.r_[0.0, np.ones(SEQ - 1)].astype(np.float32),
                "document": np.full(SEQ, number, np.int32),
            }
            for number in range(count)
        ]
    )
