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

from jaxinterp.decompositions.gates import Gated
from jaxinterp.methods.checks import check_whole
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder
from jaxinterp.objectives import Term, reconstruction, scale
from jaxinterp.objectives.gates import gate_auxiliary, gate_l1


@dataclass(frozen=True)
class GatedSparseAutoencoder(SparseAutoencoder):
    """Hyperparameters of a gated sparse autoencoder; `k` is not used."""

    activation: Literal["gated"] = "gated"  # type: ignore[assignment]
    """Fixed."""
    l1: float = 0.02
    """λ: the coefficient of the L1 penalty on open gates."""
    auxk: float = 0.0
    """Coefficient of AuxK, which is not part of the paper."""
    penalty_warmup: int = 0
    """Steps over which λ rises linearly (published code: 2000)."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        super().__post_init__()
        check_whole(self, penalty_warmup=0)

    def make_activation(self) -> Gated:
        """Gate and size agree at the start."""
        return Gated.start(self.features)

    def terms(self) -> list[Term]:
        """reconstruction + λ gate_l1 + gate_auxiliary."""
        warmup = self.penalty_warmup
        coefficient = optax.linear_schedule(0.0, self.l1, warmup) if warmup else self.l1
        return [reconstruction(), scale(gate_l1(), coefficient), gate_auxiliary()]
