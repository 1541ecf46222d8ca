"""What a feature does to the model's loss: the same text with the feature and without it.

    effect[t] = loss_t(a_j := 0) - loss_t          nats, of the token that follows t

Everything else stays, also what the decomposition misses: the written array becomes y + (decode(c') - decode(c)), with
c' the codes without feature j. Positive: the model predicts worse without the feature.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import several
from jaxinterp.decompositions.in_model import run_with
from jaxinterp.models.run import run


class Without(eqx.Module):
    """The edit of codes that sets one feature to 0 everywhere."""

    feature: int | Int[Array, ""] = eqx.field(converter=jnp.asarray)

    def __call__(self, codes: Float[Array, "... features"]) -> Float[Array, "... features"]:
        return jnp.where(jnp.arange(codes.shape[-1]) == self.feature, 0, codes)


def ablation_effect(
    decomposition: Any, model: PyTree, tokens: Int[Array, "batch seq"], feature: int
) -> Float[Array, "batch next"]:
    """The module's equation for every token but the last, `[batch, seq - 1]`.

    Raises:
      UserError: the decomposition writes several arrays, the feature is unknown, or no token can be predicted.

    Example:
      >>> ablation_effect(result.decomposition, subject.model, jnp.asarray(tokens), 3).shape
      (1, 7)
    """
    writes = several(decomposition.sites.writes)
    if len(writes) != 1:
        raise UserError(f"the decomposition writes {len(writes)} arrays: ablate a feature of one layer's.")
    count = decomposition.decoder.shape[0]
    if not 0 <= feature < count:
        raise UserError(f"feature={feature} is not an index of a feature, 0 to {count - 1}.")
    if tokens.shape[1] < 2:
        raise UserError(f"tokens={tokens.shape} have no next token to predict: give at least two a row.")
    return _effect(decomposition, model, tokens, jnp.asarray(feature))


@eqx.filter_jit
def _effect(decomposition: Any, model: PyTree, tokens: Array, feature: Array) -> Array:
    (reads, *_) = several(decomposition.sites.without_gradients.reads)
    edits = {f"{reads.rpartition('/')[0]}/codes": Without(feature)}
    without = run_with(decomposition, model, tokens, edits=edits, keep_error=True, keep=()).logits
    return _losses(without, tokens) - _losses(run(model, tokens, keep=()).logits, tokens)


def _losses(logits: Array, tokens: Array) -> Array:
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.result_type(jnp.float32, logits)))
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
