"""Objectives: pure loss terms, and how they add up.

objective = total(reconstruction(), scale(l1(), 1e-3), auxk(1 / 32))
loss, metrics = objective(decomposition, batch, key)
"""

from jaxinterp.objectives.compose import Forward, Metrics, Objective, Ratio, Term, ratio, scale, total
from jaxinterp.objectives.ghost import ghost
from jaxinterp.objectives.terms import auxk, l1, reconstruction

__all__ = [
    "Forward",
    "Metrics",
    "Objective",
    "Ratio",
    "Term",
    "auxk",
    "ghost",
    "l1",
    "ratio",
    "reconstruction",
    "scale",
    "total",
]
