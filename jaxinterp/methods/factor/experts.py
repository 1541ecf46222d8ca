"""Hidden mixture of experts: a dense MLP imitated by a few neurons out of very many, chosen by a router.

    y = act(x A^T + a) B + b  +  sum over e in T(x) of w_e(x) act(u_e . x + c_e) v_e  +  b_up
    s = (x R_1^T) R_2^T + r   (low-rank router)   or   s = x R^T + r   (full router);   w = softmax over T(x) of s
    T(x) = the k experts with the largest s

x [tokens, d_in]; A [shared, d_in], B [shared, d_out] = the shared dense part, which every token uses; an expert is ONE
neuron with a read vector u_e and a write vector v_e; R_1 [rank, d_in] has no bias. act is the exact GELU. Active
neurons per token: shared + k.

The claim: on real activations such students beat a dense student with as many active neurons; on Gaussian inputs with
the same mean and covariance they do not. `gaussian_twin` makes those.

Start (the authors'): u, c ~ U(±1/sqrt(d_in)); linear maps and their biases ~ U(±1/sqrt(fan in)); b_up 0 and v ~
U(±1/sqrt(k)) for the low-rank router, both ~ U(±1/sqrt(experts)) for the full one. The two differ in v, which confounds
the comparison of routers: `write_start` fixes it, "k" (default) or "experts", for both alike.

Source: Boix-Adsera 2025 (arXiv 2512.18452).
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.core.errors import UserError

WriteStart = Literal["k", "experts"]


class Router(eqx.Module):
    """s = (x inner^T) outer^T + bias; `inner` None is the full router, where outer is [experts, d_in]."""

    inner: Float[Array, "rank d_in"] | None
    outer: Float[Array, "experts rank_or_d_in"]
    bias: Float[Array, " experts"]

    def keys(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes rank_or_d_in"]:
        """x inner^T, which `outer` is multiplied with."""
        return x if self.inner is None else x @ self.inner.T


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
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


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
