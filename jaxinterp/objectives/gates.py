"""The terms that train gates and thresholds: what `Gated` and `JumpReLU` need beside the reconstruction.

With π or a the pre-activations that decided (`forward.codes.pre`), token weights w, V = `target_variance`:

    gate_l1          sum_t w_t sum_j max(π_tj, 0) |D_j| / sum_t w_t
    gate_auxiliary   sum_t w_t |y_t - ŷ(max(π_t, 0))|^2 / (V sum_t w_t),  the decoder and its bias held constant in ŷ
    l0               sum_t w_t sum_j 1[a_tj > θ_j] / sum_t w_t
    l0_to_target     (l0 / target - 1)^2

The first two are the only way by which a gradient reaches Gated's gate; in the last two 1[a > θ] is `step`, whose
gradient reaches the thresholds only.

Sources: Rajamanoharan et al. 2024, arXiv 2404.16014 and arXiv 2407.14435; the last term from the code of
dictionary_learning. That code takes the step of z, not of a: features just below their threshold then have no say,
which is half of the estimator. Here it is the step of a, as in the paper.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Vectors
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import HasActivation
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.decompositions.gates import Gated, JumpReLU, step
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term, ratio


def gate_l1() -> Term:
    """The sum of open gates, each times the length of its write vector; metric `gate_l1`."""

    def term(decomposition: Vectors, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        lengths = jnp.sqrt(jnp.sum(decomposition.decoder**2, axis=1) + 1e-12)  # as in `l1`
        mass = ratio(_open(decomposition, forward).weighted(lengths), batch.weight)
        return mass.value(), {"gate_l1": mass}

    return term


def gate_auxiliary() -> Term:
    """Open gates must reconstruct the target by themselves, through a constant decoder; metric `gate_fvu`."""

    def term(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        constant = jax.lax.stop_gradient(decomposition)
        output = constant.decode(_open(decomposition, forward), batch.inputs)
        error = jnp.sum((batch.targets - output) ** 2, axis=-1) / decomposition.target_variance
        fvu = ratio(error, batch.weight)
        return fvu.value(), {"gate_fvu": fvu}

    return term


def l0() -> Term:
    """The number of active features per token, differentiable by the thresholds; `total` has its metric."""

    def term(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        return _active(decomposition, batch, forward).value(), {}

    return term


def l0_to_target(target: float) -> Term:
    """The squared relative distance of the number of active features per token from a target.

    Raises:
      UserError: the target is not positive.
    """
    if not target > 0:
        raise UserError(f"target={target} must be positive.")

    def term(decomposition: PyTree, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        return (_active(decomposition, batch, forward).value() / target - 1) ** 2, {}

    return term


def _open(decomposition: PyTree, forward: Forward) -> DenseCodes:
    return DenseCodes(jax.nn.relu(_decided_by(decomposition, forward, Gated)))


def _active(decomposition: PyTree, batch: Batch, forward: Forward) -> Ratio:
    a = jax.lax.stop_gradient(_decided_by(decomposition, forward, JumpReLU))
    activation = decomposition.activation
    return ratio(jnp.sum(step(a, activation.threshold, activation.bandwidth), axis=-1), batch.weight)


def _decided_by(decomposition: PyTree, forward: Forward, wanted: type) -> Array:
    activation = decomposition.activation if isinstance(decomposition, HasActivation) else None
    if not isinstance(activation, wanted) or not isinstance(forward.codes, DenseCodes) or forward.codes.pre is None:
        raise UserError(f"activation={type(activation).__name__}: this term is for {wanted.__name__}.")
    return forward.codes.pre
