"""Gated sparse autoencoder: whether a feature is active and how strongly are decided apart.

    e = (y - mean) E^T / s,   π = e + b_gate,   z = 1[π > 0] max(exp(r) e + b_mag, 0)
    y ≈ s (z D + b_D) + mean,   |D_j| = 1
    loss = |y - ŷ|^2 / V + λ sum_j max(π_j, 0) + |y - ŷ_gate|^2 / V

ŷ_gate decodes max(π, 0) with D and b_D held constant. L1 shrinks π, not z: the codes keep their size.

y [tokens, d]; E, D [features, d]; b_gate, r, b_mag [features]; V the target's variance. Start: D random unit rows,
E = D, the rest 0. The paper divides nothing by V: its λ is V times ours (normalised inputs: V = d in their units).

Source: Rajamanoharan et al. 2024, arXiv 2404.16014, sections 3.1 and 3.2 (numbers recalled). Optimizer and warm-up
differ in published code (Adam with beta_1 = 0, learning rate 5e-5, λ = 0.1, warm-ups of thousands of steps).
"""

from dataclasses import dataclass
from typing import Literal

import optax

from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.gates import Gated
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_whole, one_array
from jaxinterp.methods.sparse.dictionary import DictionaryFields, autoencoder_recipe, auxk_of, check_dictionary
from jaxinterp.objectives import Objective, reconstruction, scale, total
from jaxinterp.objectives.gates import gate_auxiliary, gate_l1


@dataclass(frozen=True)
class GatedSparseAutoencoder(DictionaryFields):
    """Hyperparameters of a gated sparse autoencoder."""

    l1: float = 0.02
    """λ: the coefficient of the L1 penalty on open gates."""
    auxk: float = 0.0
    """Coefficient of AuxK, which is not part of the paper."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""
    penalty_warmup: int = 0
    """Steps over which λ rises linearly (published code: 2000)."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_not_negative(self, "l1", "auxk")
        check_one_of(self, "array", ("out", "hidden", "in"))
        check_whole(self, penalty_warmup=0)

    def needs(self, site: Site) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is not a single leaf.
        """
        name = one_array(site, self.array)
        return Sites(name, name)

    def make_objective(self) -> Objective:
        """reconstruction + λ gate_l1 + gate_auxiliary + auxk * AuxK; or the objective that was given."""
        coefficient = optax.linear_schedule(0.0, self.l1, self.penalty_warmup) if self.penalty_warmup else self.l1
        own = (reconstruction(), scale(gate_l1(), coefficient), gate_auxiliary())
        return self.objective or total(*own, *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1; gate and size agree at the start."""
        return autoencoder_recipe(Gated.start(self.features), self.make_objective(), self, steps)
