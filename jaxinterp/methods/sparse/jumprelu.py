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

from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.gates import JumpReLU, Parametrisation
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_positive, check_whole, one_array
from jaxinterp.methods.sparse.dictionary import (
    DictionaryFields,
    autoencoder_recipe,
    auxk_of,
    check_dictionary,
    l1_of,
)
from jaxinterp.objectives import Objective, reconstruction, scale, total
from jaxinterp.objectives.gates import l0, l0_to_target


@dataclass(frozen=True)
class JumpReLUSparseAutoencoder(DictionaryFields):
    """Hyperparameters of a JumpReLU sparse autoencoder."""

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
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 0.0
    """Coefficient of AuxK, which is not part of the paper."""
    array: Literal["out", "hidden", "in"] = "out"
    """Which array of the MLP it takes apart."""
    penalty_warmup: int = 0
    """Steps over which λ rises linearly (published code: 2000)."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_not_negative(self, "l0", "l1", "auxk")
        check_positive(self, "target_l0")
        check_one_of(self, "array", ("out", "hidden", "in"))
        check_whole(self, penalty_warmup=0)
        JumpReLU.start(1, self.threshold, bandwidth=self.bandwidth, parametrisation=self.parametrisation)

    def needs(self, site: Site) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is not a single leaf.
        """
        name = one_array(site, self.array)
        return Sites(name, name)

    def make_activation(self) -> JumpReLU:
        """The same threshold for every feature."""
        return JumpReLU.start(
            self.features, self.threshold, bandwidth=self.bandwidth, parametrisation=self.parametrisation
        )

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + λ l0 (or its distance from the target) + auxk * AuxK; or the one given."""
        coefficient = optax.linear_schedule(0.0, self.l0, self.penalty_warmup) if self.penalty_warmup else self.l0
        count = l0() if self.target_l0 is None else l0_to_target(self.target_l0)
        own = (reconstruction(), *l1_of(self.l1), scale(count, coefficient))
        return self.objective or total(*own, *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return autoencoder_recipe(self.make_activation(), self.make_objective(), self, steps)
