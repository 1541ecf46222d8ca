"""Mixture of linear transforms (MOLT): sparsely used linear maps of the input, of several ranks.

    y' = sum_t a_t  x' V_t^T U_t + b,   a = activation(x' E^T + b_E)       t = 1..transforms

x' [tokens, d_in] normalised; transform t has rank r_t, V_t [r_t, d_in], U_t [r_t, d_out]; E [transforms, d_in]. The
rows of all V_t are stored one after another, `read` [sum of ranks, d_in], and those of U_t in `write`; `ranks` says
how many belong to each. Frobenius norms |V_t^T U_t| come from the r_t x r_t Gram matrices.

    loss = |y - ŷ|^2 / V + sparsity * mean over tokens of sum_t tanh(a_t |V_t^T U_t|)

activation: "topk" keeps the k largest gates that are positive; "relu" all positive ones (then `sparsity` decides how
many). Ranks: N transforms of the largest rank, 2 N of half of it, 4 N of a quarter, and so on.

Start: E uniform in ±1/sqrt(d_in), V_t normal / sqrt(d_in), U_t = 0, biases 0.

Source: Lindsey, Chen, Pearce, Hydrie, Conerly 2025 (Sparse mixtures of linear transforms, Transformer Circuits, bulk
update). TopK and the start values are this project's.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.linear_transforms import Gating, LinearTransforms
from jaxinterp.decompositions.scales import moments, scales_of
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import gradient_method, warmup_linear
from jaxinterp.objectives import Term, ratio, reconstruction, scale, total


def frobenius_norms(
    read: Float[Array, "rows d_in"], write: Float[Array, "rows d_out"], ranks: tuple[int, ...]
) -> Float[Array, " transforms"]:
    """|V_t^T U_t|: the square root of the sum of (V_t V_t^T) * (U_t U_t^T)."""
    sizes, at = [], 0
    for rank in ranks:
        v, u = read[at : at + rank], write[at : at + rank]
        sizes.append(jnp.sqrt(jnp.maximum(jnp.sum((v @ v.T) * (u @ u.T)), 0) + 1e-12))
        at += rank
    return jnp.stack(sizes)


def halving_ranks(largest: int, smallest: int, count: int = 1) -> tuple[int, ...]:
    """`count` of the largest rank, twice as many of half of it, and so on down to the smallest."""
    ranks: list[int] = []
    while largest >= smallest:
        ranks += [largest] * count
        largest, count = largest // 2, count * 2
    return tuple(ranks)


def tanh_sparsity() -> Term:
    """The mean over tokens of sum_t tanh(a_t |V_t^T U_t|); metric `tanh`."""

    def term(decomposition: PyTree, batch: Batch, forward: PyTree) -> tuple[Array, Any]:
        norms = frobenius_norms(decomposition.read, decomposition.write, decomposition.ranks)
        mass = ratio(jnp.sum(jnp.tanh(forward.codes.dense() * norms), axis=-1), batch.weight)
        return mass.value(), {"tanh": mass}

    return term


@dataclass(frozen=True)
class LinearTransformsMethod:
    """Hyperparameters."""

    ranks: tuple[int, ...] = halving_ranks(512, 32, 2)
    """The rank of every transform."""
    gating: Gating = "topk"
    """How gates are made sparse."""
    k: int = 8
    """Active transforms per token (topk)."""
    sparsity: float = 0.0
    """Coefficient of the tanh penalty."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, k=1)
        check_one_of(self, "gating", ("topk", "relu"))
        check_not_negative(self, "sparsity")
        check_positive(self, "learning_rate")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on reconstruction and penalty."""
        terms = [reconstruction(), *([scale(tanh_sparsity(), self.sparsity)] if self.sparsity else [])]
        optimizer = optax.adam(warmup_linear(self.learning_rate, steps))
        return gradient_method(lambda key, sample, model: start(self, key, sample), total(*terms), optimizer)


def start(method: LinearTransformsMethod, key: PRNGKeyArray, sample: Batch) -> LinearTransforms:
    """The start values of the module's text, with the means and scales of a sample."""
    x, y = sample.inputs, sample.targets
    d_in, d_out, transforms, rows = x.shape[1], y.shape[1], len(method.ranks), sum(method.ranks)
    gate_key, read_key = jax.random.split(key)
    target_mean, target_variance = moments(y, sample.weight)
    return LinearTransforms(
        gate=jax.random.uniform(gate_key, (transforms, d_in), jnp.float32, minval=-1, maxval=1) / d_in**0.5,
        gate_bias=jnp.zeros(transforms, jnp.float32),
        read=jax.random.normal(read_key, (rows, d_in), jnp.float32) / d_in**0.5,
        write=jnp.zeros((rows, d_out), jnp.float32),
        bias=jnp.zeros(d_out, jnp.float32),
        scales=scales_of(x, y, sample.weight),
        target_mean=target_mean,
        target_variance=target_variance,
        ranks=method.ranks,
        gating=method.gating,
        k=min(method.k, transforms),
        sites=sample.sites,
    )
