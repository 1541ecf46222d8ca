"""What a feature does to the model's loss and to its next token: the same text with the feature and without it.

    effect[t] = loss_t(a_j := 0) - loss_t                     nats, of the token that follows t
    raises[v] = mean over t of log p_t(v) - log p_t(v; a_j := 0)    nats, over tokens t at which the feature fires

The second is what all later layers make of the feature, where direct logits are what its write vector says by itself.

Everything else stays, also what the decomposition misses: the written array becomes y + (decode(c') - decode(c)), with
c' the codes without feature j. Positive: the model predicts worse without the feature.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import several
from jaxinterp.decompositions.in_model import run_with
from jaxinterp.models.run import run


class Without(eqx.Module):
    """The edit of codes that sets one feature to 0 everywhere."""

    feature: int | Int[Array, ""] = eqx.field(converter=jnp.asarray)

    def __call__(self, codes: Float[Array, "... features"]) -> Float[Array, "... features"]:
        return jnp.where(jnp.arange(codes.shape[-1]) == self.feature, 0, codes)


class Ablation(NamedTuple):
    """What changes without a feature: the module's two equations."""

    effect: Float[Array, "batch next"]
    raises: Float[Array, " vocab"]


def ablation(
    decomposition: Any, model: PyTree, tokens: Int[Array, "batch seq"], feature: int, fires: Bool[Array, "batch seq"]
) -> Ablation:
    """The module's two equations, from one pass with the feature and one without.

    Args:
      fires: the tokens over which `raises` is a mean; without any it is 0.
    Raises:
      UserError: as `ablation_effect`.
    """
    _check(decomposition, tokens, feature)
    return _ablation(decomposition, model, tokens, jnp.asarray(feature), jnp.asarray(fires))


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
    _check(decomposition, tokens, feature)
    nowhere = jnp.zeros(tokens.shape, bool)
    return _ablation(decomposition, model, tokens, jnp.asarray(feature), nowhere).effect


def _check(decomposition: Any, tokens: Array, feature: int) -> None:
    writes = several(decomposition.sites.writes)
    if len(writes) != 1:
        raise UserError(f"the decomposition writes {len(writes)} arrays: ablate a feature of one layer's.")
    count = decomposition.decoder.shape[0]
    if not 0 <= feature < count:
        raise UserError(f"feature={feature} is not an index of a feature, 0 to {count - 1}.")
    if tokens.shape[1] < 2:
        raise UserError(f"tokens={tokens.shape} have no next token to predict: give at least two a row.")


@eqx.filter_jit
def _ablation(decomposition: Any, model: PyTree, tokens: Array, feature: Array, fires: Array) -> Ablation:
    (reads, *_) = several(decomposition.sites.without_gradients.reads)
    edits = {f"{reads.rpartition('/')[0]}/codes": Without(feature)}
    without = _log_p(run_with(decomposition, model, tokens, edits=edits, keep_error=True, keep=()).logits)
    plain = _log_p(run(model, tokens, keep=()).logits)
    loss = lambda log_p: -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    weight = fires.astype(plain.dtype) / jnp.maximum(jnp.sum(fires), 1)
    return Ablation(loss(without) - loss(plain), jnp.einsum("bs,bsv->v", weight, plain - without))


def _log_p(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.result_type(jnp.float32, logits)))
