"""Hidden mixture of experts: a dense MLP imitated by a few neurons out of very many, chosen by a router.

    y = act(x A^T + a) B + b  +  sum over e in T(x) of w_e(x) act(u_e . x + c_e) v_e  +  b_up
    s = (x R_1^T) R_2^T + r   (low-rank router)   or   s = x R^T + r   (full router);   w = softmax over T(x) of s
    T(x) = the k experts with the largest s

x [tokens, d_in]; A [shared, d_in], B [shared, d_out] = the shared dense part, which every token uses; an expert is ONE
neuron with a read vector u_e and a write vector v_e; R_1 [rank, d_in] has no bias. act is the exact GELU. Active
neurons per token: shared + k.

The claim: on real activations such students beat a dense student with as many active neurons; on Gaussian inputs with
the same mean and covariance they do not. `gaussian_twin` makes those.

Adam with a cosine to 0. Start (the authors'): u, c ~ U(±1/sqrt(d_in)); linear maps and their biases ~ U(±1/sqrt(fan
in)); b_up 0 and v ~ U(±1/sqrt(k)) for the low-rank router, both ~ U(±1/sqrt(experts)) for the full one. The two differ
in v, which confounds the comparison of routers: `write_start` fixes it, "k" (default) or "experts", for both alike.

Source: Boix-Adsera 2025 (arXiv 2512.18452).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.core.batch import Batch, Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site
from jaxinterp.decompositions.experts import DenseNeurons, DenseStudent, Experts, Router, Scaling
from jaxinterp.methods.checks import check_one_of, check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.methods.sparse.dictionary import moments
from jaxinterp.objectives import Objective, reconstruction, total

WriteStart = Literal["k", "experts"]


@dataclass(frozen=True)
class HiddenExperts:
    """Hyperparameters of the student with experts; active neurons per token: shared + k."""

    experts: int = 4096
    """How many experts there are (published: 1,000 to 100,000)."""
    k: int = 32
    """Experts per token."""
    shared: int = 32
    """Neurons that every token uses (published: as many as k)."""
    rank: int | None = 128
    """Rank of the router; None: the full router."""
    write_start: WriteStart = "k"
    """The bound of the write vectors' start: 1/sqrt(k) (the authors', low-rank router) or 1/sqrt(experts) (full)."""
    learning_rate: float = 1e-3
    """Peak of a cosine that falls to 0 (published: the best of 1e-4, 3e-4, 1e-3)."""
    normalise: bool = True
    """Whether inputs and outputs are centred and scaled to unit variance per dimension, on average. (Authors: no.)"""
    objective: Objective | None = None
    """Another objective in place of the squared error."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter is out of range."""
        check_whole(self, experts=1, k=1, shared=1, rank=1)
        check_one_of(self, "write_start", ("k", "experts"))
        check_positive(self, "learning_rate")
        if self.k > self.experts:
            raise UserError(f"k={self.k} must lie between 1 and experts={self.experts}.")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the squared error."""
        return _trained(lambda key, sample, model: start(self, key, sample), self.learning_rate, self.objective, steps)


@dataclass(frozen=True)
class DenseRival:
    """Hyperparameters of the dense student: what hidden experts have to beat at as many active neurons."""

    neurons: int = 64
    """Its width."""
    learning_rate: float = 1e-3
    """Peak of a cosine that falls to 0."""
    normalise: bool = True
    """As in HiddenExperts."""
    objective: Objective | None = None
    """Another objective in place of the squared error."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter is out of range."""
        check_whole(self, neurons=1)
        check_positive(self, "learning_rate")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the squared error."""
        return _trained(
            lambda key, sample, model: dense_start(self, key, sample), self.learning_rate, self.objective, steps
        )


def start(hyper: HiddenExperts, key: PRNGKeyArray, sample: Batch) -> Experts:
    """The student before the first step, as in the module's docstring."""
    keys = jax.random.split(key, 7)
    scaling, mean, variance, d_in, d_out = _scaling(hyper.normalise, sample)
    rank = hyper.rank or d_in
    inner = None if hyper.rank is None else uniform(keys[0], (rank, d_in), d_in**-0.5)
    return Experts(
        shared=_neurons(keys[1], hyper.shared, d_in, d_out),
        router=Router(
            inner,
            uniform(keys[2], (hyper.experts, rank), rank**-0.5),
            uniform(keys[3], (hyper.experts,), rank**-0.5),
        ),
        encoder=uniform(keys[4], (hyper.experts, d_in), d_in**-0.5),
        encoder_bias=uniform(keys[5], (hyper.experts,), d_in**-0.5),
        decoder=uniform(
            keys[6], (hyper.experts, d_out), write_bound(hyper.write_start, k=hyper.k, experts=hyper.experts)
        ),
        decoder_bias=jnp.zeros(d_out, jnp.float32),
        scaling=scaling,
        target_mean=mean,
        target_variance=variance,
        k=hyper.k,
        sites=sample.sites,
    )


def dense_start(hyper: DenseRival, key: PRNGKeyArray, sample: Batch) -> DenseStudent:
    """The dense student before the first step."""
    scaling, mean, variance, d_in, d_out = _scaling(hyper.normalise, sample)
    neurons = _neurons(key, hyper.neurons, d_in, d_out)
    return DenseStudent(neurons, jnp.zeros(d_out, jnp.float32), scaling, mean, variance, sample.sites)


def expert_forward(
    x: Float[Array, "tokens d_in"],
    router: Router,
    read: Float[Array, "experts d_in"],
    read_bias: Float[Array, " experts"],
    write: Float[Array, "experts d_out"],
    write_bias: Float[Array, " d_out"],
    *,
    k: int,
    chunk: int = 32,
) -> tuple[Float[Array, "tokens d_out"], Int[Array, "tokens k"], Float[Array, "tokens k"]]:
    """The experts' part of y, written out: no kernel, in the dtype of x (float64 for checks).

    Args:
      chunk: experts of a token that are gathered at once: the largest array is [tokens, chunk, d].
    Returns:
      (output, chosen experts with the best first, their weights w).
    """
    scores = router.keys(x) @ router.outer.T + router.bias
    best, chosen = jax.lax.top_k(scores, k)
    weights = jax.nn.softmax(best, axis=-1)
    output = jnp.broadcast_to(write_bias, (x.shape[0], write.shape[1])).astype(x.dtype)
    for start in range(0, k, chunk):
        part = chosen[:, start : start + chunk]
        inner = jnp.einsum("td,tkd->tk", x, read[part]) + read_bias[part]
        values = weights[:, start : start + chunk] * gelu(inner)
        output = output + jnp.einsum("tk,tkd->td", values, write[part])
    return output, chosen, weights


def dense_forward(
    x: Float[Array, "tokens d_in"],
    read: Float[Array, "shared d_in"],
    read_bias: Float[Array, " shared"],
    write: Float[Array, "shared d_out"],
    write_bias: Float[Array, " d_out"],
) -> Float[Array, "tokens d_out"]:
    """The shared part of y: act(x A^T + a) B + b."""
    return gelu(x @ read.T + read_bias) @ write + write_bias


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), exact."""
    return jax.nn.gelu(x, approximate=False)


def write_bound(write_start: WriteStart, *, k: int, experts: int) -> float:
    """The bound of the uniform start of write vectors: 1/sqrt(k) or 1/sqrt(experts).

    Raises:
      UserError: write_start is neither.
    """
    if write_start not in ("k", "experts"):
        raise UserError(f"write_start={write_start!r} must be 'k' or 'experts'.")
    return (k if write_start == "k" else experts) ** -0.5


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], bound: float) -> Float[Array, "..."]:
    """Uniform in ±bound."""
    return jax.random.uniform(key, shape, jnp.float32, minval=-bound, maxval=bound)


def twin_moments(rows: Float[Array, "tokens d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and covariance (divided by tokens) of the rows, in float64."""
    wide = np.asarray(rows, np.float64)
    mean = wide.mean(axis=0)
    return mean, (wide - mean).T @ (wide - mean) / len(wide)


def gaussian_twin(
    normal: Float[Array, "tokens d"],
    mean: Float[Array | np.ndarray, " d"],
    covariance: Float[Array | np.ndarray, "d d"],
    jitter: float = 1e-11,
) -> Float[Array, "tokens d"]:
    """Gaussian inputs with this mean and covariance + jitter I, from given standard normal numbers.

    x = mean + normal S^T with the symmetric root S of the covariance. (Any root has the same distribution; the
    authors' draws come from another one.) Eigenvalues below 0 count as 0.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64) + jitter * np.eye(len(covariance)))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    return jnp.asarray(mean, normal.dtype) + normal @ jnp.asarray(root.T, normal.dtype)


def unexplained(
    output: Float[Array, "tokens d"], target: Float[Array, "tokens d"]
) -> tuple[Float[Array, ""], Float[Array, " d"]]:
    """FVU = mean (y - ŷ)^2 / mean over dimensions of Var(y), and the same for every dimension on its own.

    The first is dominated by a few dimensions with massive activations; the second shows them.
    """
    error = jnp.mean((output - target) ** 2, axis=0)
    variance = jnp.var(target, axis=0)
    return jnp.mean(error) / jnp.mean(variance), error / jnp.where(variance > 0, variance, 1)


def _trained(init: Callable[..., Any], learning_rate: float, objective: Objective | None, steps: int) -> Recipe:
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    return gradient_method(init, objective or total(reconstruction()), optimizer)


def _neurons(key: PRNGKeyArray, width: int, d_in: int, d_out: int) -> DenseNeurons:
    read, bias, write = jax.random.split(key, 3)
    return DenseNeurons(
        uniform(read, (width, d_in), d_in**-0.5),
        uniform(bias, (width,), d_in**-0.5),
        uniform(write, (width, d_out), width**-0.5),
    )


def _scaling(normalise: bool, sample: Batch) -> tuple[Scaling, Array, Array, int, int]:
    """(means and scales, the target's mean, its variance summed over dimensions, d_in, d_out)."""
    x, y = sample.inputs, sample.targets
    d_in, d_out = x.shape[1], y.shape[1]
    input_mean, input_variances = moments(x, sample.weight)
    target_mean, target_variances = moments(y, sample.weight)
    input_variance, variance = (_positive(jnp.sum(part)) for part in (input_variances, target_variances))
    if normalise:
        scales = jnp.sqrt(input_variance / d_in), jnp.sqrt(variance / d_out)
        scaling = Scaling(input_mean, scales[0], target_mean, scales[1])
    else:
        scaling = Scaling(0 * input_mean, jnp.ones((), jnp.float32), 0 * target_mean, jnp.ones((), jnp.float32))
    return scaling, target_mean, variance, d_in, d_out


def _positive(variance: Array) -> Array:
    return jnp.where(variance > 0, variance, 1.0)
