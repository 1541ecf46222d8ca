"""Attribution-based parameter decomposition (APD): parts of all matrices at once, chosen by gradients.

    P_c = {A_c^l B_c^l},   A [parts, d_in, m], B [parts, m, d_out]      part c has a matrix of rank m in every layer
    attribution_c(x) = sum over outputs o of ( sum over layers, entries of  df_o/dW^l * P_c^l )^2
    kept: the k * batch largest attributions of the whole batch (batch top-k), or those of each input

    loss = match * mean |W - sum_c P_c|^2 + output * mean (f(x) - f(x; kept parts))^2
         + simple * sum over kept parts, layers, ranks of (|A_:r|^2 |B_r:|^2)^(p / 2) / numbers / inputs

Squares are summed over outputs, not averaged; only the L_p penalty on attributions, which takes the place of `simple`
where nothing is chosen, divides by the number of outputs. 1e-16 is added inside the powers.

Source: Braun, Bushnaq, Heimersheim, Mendel, Sharkey 2025 (arXiv 2501.14926) and the authors' code.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.decompositions.parameter_parts import Blocks

__all__ = ["Blocks"]

SMALL = 1e-16


def blocks_linear(
    x: Float[Array, "*axes d_in"], blocks: Blocks, mask: Float[Array, "*axes parts"] | None = None
) -> Float[Array, "*axes d_out"]:
    """x sum_c m_c A_c B_c."""
    inner = jnp.einsum("...i,cim->...cm", x, blocks.read)
    if mask is not None:
        inner = inner * mask[..., None]
    return jnp.einsum("...cm,cmo->...o", inner, blocks.write)


def attributions(
    forward: Callable[[Mapping[str, Float[Array, " _out"]], Float[Array, " d"]], Float[Array, " outputs"]],
    x: Float[Array, "batch d"],
    reads: Mapping[str, Float[Array, "batch _in"]],
    blocks: Mapping[str, Blocks],
) -> Float[Array, "batch parts"]:
    """sum_o (sum_l df_o/d(what matrix l writes) . (what matrix l reads) P_c^l)^2, of every input and part.

    Args:
      forward: (added to what each matrix writes, one input) -> the model's outputs for that input.
      reads: what each matrix reads in the model, for every input.
    """

    def of_one(x: Array, reads: Mapping[str, Array]) -> Array:
        zeros = {name: jnp.zeros(block.write.shape[-1], x.dtype) for name, block in blocks.items()}
        slopes = jax.jacrev(lambda added: forward(added, x))(zeros)
        total = sum(
            jnp.einsum("oj,cj->oc", slopes[name], jnp.einsum("i,cim,cmj->cj", reads[name], b.read, b.write))
            for name, b in blocks.items()
        )
        return jnp.sum(jnp.square(jnp.asarray(total)), axis=0)

    return jax.vmap(of_one)(x, dict(reads))


def top_k_mask(
    attribution: Float[Array, "batch parts"], k: float | int, *, batch: bool = True
) -> Float[Array, "batch parts"]:
    """1 for the int(k * batch) largest of the whole batch, or the int(k) largest of each input."""
    if not batch:
        return _largest(attribution, int(k))
    return _largest(attribution.reshape(1, -1), int(k * attribution.shape[0])).reshape(attribution.shape)


def simplicity(
    blocks: Mapping[str, Blocks], mask: Float[Array, "batch parts"], p: float | int, numbers: int
) -> Float[Array, ""]:
    """The Schatten-like penalty on kept parts; the mask is inside the power. `numbers`: of all matrices."""
    total = jnp.zeros((), jnp.float32)
    for block in blocks.values():
        squares = jnp.sum(block.read**2, axis=1) * jnp.sum(block.write**2, axis=2)  # [parts, m]
        total = total + jnp.sum((mask[:, :, None] * squares + SMALL) ** (p / 2))
    return total / numbers / mask.shape[0]


def attribution_penalty(attribution: Float[Array, "batch parts"], outputs: int, p: float | int) -> Float[Array, ""]:
    """The mean over inputs of sum_c (attribution / outputs)^(p / 2)."""
    return jnp.mean(jnp.sum((jnp.abs(attribution / outputs) + SMALL) ** (p / 2), axis=-1))


def parameter_match(weights: Mapping[str, Float[Array, "_in _out"]], blocks: Mapping[str, Blocks]) -> Float[Array, ""]:
    """The mean of (W - sum_c P_c)^2 over all numbers of all matrices."""
    total = jnp.zeros((), jnp.float32)
    for name, weight in weights.items():
        total = total + jnp.sum((weight - jnp.einsum("cim,cmo->io", blocks[name].read, blocks[name].write)) ** 2)
    return total / sum(weight.size for weight in weights.values())


def _largest(values: Array, k: int) -> Array:
    _, places = jax.lax.top_k(values, k)
    return jnp.sum(jax.nn.one_hot(places, values.shape[-1], dtype=values.dtype), axis=-2)
