"""JumpReLU sparse autoencoder: every feature has a threshold of its own, trained through a straight-through estimator.

    a = (y - mean) E^T / s + b_E,   z = a 1[a > θ]
    y ≈ s (z D + b_D) + mean,   |D_j| = 1
    loss = |y - ŷ|^2 / V + λ sum_j 1[a_j > θ_j]          or, with `target_l0`: ... + λ (l0 / target_l0 - 1)^2
    ∂z/∂θ = -(θ / ε) K((a - θ) / ε),   ∂1[a > θ]/∂θ = -(1 / ε) K((a - θ) / ε),   K(u) = 1[|u| < 1/2]

The step passes no gradient to a: thresholds alone answer to λ.

y [tokens, d]; E, D [features, d]; b_E, θ [features]; V the target's variance. Start: D random unit rows, E = D,
θ = `threshold`, the rest 0. λ, θ and ε are in units of the normalised y, which has unit variance per dimension.

Source: Rajamanoharan et al. 2024, arXiv 2407.14435, sections 3 and 4 (numbers recalled): ε = θ = 0.001, log θ trained;
Adam with beta_1 = 0, learning rate 7e-5. Ours are wider, for runs of some thousand steps: there thresholds that start
at 0.001 stay too low. The squared distance from a target is that of dictionary_learning, which trains θ itself.
"""

from dataclasses import dataclass
from typing import Literal

import optax

from jaxinterp.decompositions.gates import JumpReLU, Parametrisation
from jaxinterp.methods.checks import check_not_negative, check_positive, check_whole
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder
from jaxinterp.objectives import Term, scale
from jaxinterp.objectives.gates import l0, l0_to_target


@dataclass(frozen=True)
class JumpReLUSparseAutoencoder(SparseAutoencoder):
    """Hyperparameters of a JumpReLU sparse autoencoder; `k` is not used."""

    activation: Literal["jumprelu"] = "jumprelu"  # type: ignore[assignment]
    """Fixed."""
    l0: float = 0.002
    """λ: the coefficient of the number of active features, or of its squared distance from `target_l0`."""
    target_l0: float | None = None
    """How many features shall be active per token; None: as few as λ makes them."""
    threshold: float = 1.0
    """θ at the start."""
    bandwidth: float = 0.6
    """ε: how near to its threshold a pre-activation must be to move it."""
    parametrisation: Parametrisation = "log"
    """Whether log θ or θ is trained and stored."""
    auxk: float = 0.0
    """Coefficient of AuxK, which is not part of the paper."""
    penalty_warmup: int = 0
    """Steps over which λ rises linearly (published code: 2000)."""

    def __post_init__(self) -> None:
        """Raises UserError where a hyperparameter cannot be."""
        super().__post_init__()
        check_not_negative(self, "l0")
        check_positive(self, "target_l0")
        check_whole(self, penalty_warmup=0)
        JumpReLU.start(1, self.threshold, bandwidth=self.bandwidth, parametrisation=self.parametrisation)

    def make_activation(self) -> JumpReLU:
        """The same threshold for every feature."""
        return JumpReLU.start(
            self.features, self.threshold, bandwidth=self.bandwidth, parametrisation=self.parametrisation
        )

    def terms(self) -> list[Term]:
        """reconstruction + l1 * L1 + λ l0 (or its distance from the target)."""
        warmup = self.penalty_warmup
        coefficient = optax.linear_schedule(0.0, self.l0, warmup) if warmup else self.l0
        count = l0() if self.target_l0 is None else l0_to_target(self.target_l0)
        return [*super().terms(), scale(count, coefficient)]
