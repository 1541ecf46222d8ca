"""`try_objective`: a mistake is told at once, a right objective is trained for a few steps and scored."""

import jax.numpy as jnp
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.trial import try_objective
from jaxinterp.objectives import reconstruction, total


def test_a_right_objective_is_trained_and_scored(capsys):
    row = try_objective(total(reconstruction()))
    assert row["loss_last"] < row["loss_first"] and 0 < row["fvu"] < 1 and row["l0"] <= 8
    assert "in 20 steps; on held-out tokens FVU" in capsys.readouterr().out


def test_a_mistake_is_told_before_anything_is_trained():
    def mine(decomposition, batch, key, *, model=None):
        return jnp.mean((batch.targets - decomposition(batch.inputs)) ** 2)

    with pytest.raises(UserError, match="mine' returned an array of shape"):
        try_objective(mine)
    with pytest.raises(UserError, match="steps=0"):
        try_objective(total(reconstruction()), steps=0)
