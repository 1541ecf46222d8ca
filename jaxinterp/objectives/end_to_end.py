"""End-to-end terms: what the model predicts with the decomposition in place of what it decomposes.

    cross_entropy   mean over next tokens of  -log p_spliced(next token)
    divergence      mean over next tokens of  KL(p_model || p_spliced)

p_spliced is the model's prediction with decode(encode(x)) where the target was, at every token that has weight (the
others keep their own array, as in the scoreboard), on this step's windows. A next token counts where it and the token
before it have weight and belong to one document. The gradient passes through the frozen model into the decomposition.

A decomposition of several layers stands in all of them at once: later layers read what earlier ones made of the model.
One that can read a gradient beside its array does without it in the model, as in the place of its leaf.
Any dictionary method trains with them: `Transcoder(features=4608, objective=total(divergence(), scale(l1(), 1e-3)))`.
Each term costs a forward and a backward pass of the model from the first array read. With `remat=True` the residual
stream behind each block is all that is kept for the backward pass, and the rest is computed again.

Sources: Braun et al. 2024, arXiv 2405.12241 (KL; recalled); cross-entropy and KL as in EleutherAI's sparsify.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.decomposition import Decomposition
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import counted
from jaxinterp.decompositions.in_model import run_with
from jaxinterp.models.run import run
from jaxinterp.models.transformer import RESIDUAL
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term


def spliced(
    decomposition: Decomposition,
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    weight: Float[Array, "batch seq"] | None = None,
    *,
    k: Int[Array, ""] | None = None,
    training: bool = False,
) -> Float[Array, "batch seq vocab"]:
    """The logits of the model with the decomposition in it, in one forward pass.

    Args:
      weight: where it is 0 the model keeps its own array; None: nowhere.
      k: as in `encode`; `training` likewise.
    Raises:
      UserError: an array that the decomposition reads or writes is not one of the model's, or is read too late.
    """
    return run_with(decomposition, model, tokens, where=weight, k=k, training=training, keep=()).logits


def cross_entropy(*, remat: bool = False) -> Term:
    """Cross-entropy of the next token with the decomposition in place; metric `ce`, in nats."""

    def term(decomposition: Decomposition, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        log_p, windows = _predict(decomposition, batch, forward, remat)
        nll = -jnp.take_along_axis(log_p, windows["tokens"][:, 1:, None], axis=-1)[..., 0]
        ce = _mean(nll, windows)
        return ce.value(), {"ce": ce}

    return term


def divergence(*, remat: bool = False) -> Term:
    """KL(model || model with the decomposition in place) of the next token; metric `kl`, in nats."""

    def term(decomposition: Decomposition, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        log_p, windows = _predict(decomposition, batch, forward, remat)
        clean = jax.nn.log_softmax(run(forward.model, windows["tokens"]).logits[:, :-1])
        kl = _mean(jnp.sum(jnp.exp(clean) * (clean - log_p), axis=-1), windows)
        return kl.value(), {"kl": kl}

    return term


def _predict(
    decomposition: Decomposition, batch: Batch, forward: Forward, remat: bool
) -> tuple[Array, dict[str, Array]]:
    windows = batch.windows
    if forward.model is None or windows is None:
        raise UserError("an end-to-end term needs the model and its windows: train with fit(...), which gives both.")
    tokens, weight = windows["tokens"], windows["weight"]

    def predicted(decomposition: Decomposition) -> Array:
        return spliced(decomposition, forward.model, tokens, weight, k=batch.k, training=True)

    if remat:
        predicted = eqx.filter_checkpoint(predicted, policy=jax.checkpoint_policies.save_only_these_names(RESIDUAL))
    logits = predicted(decomposition)
    return jax.nn.log_softmax(logits[:, :-1]), windows


def _mean(values: Array, windows: dict[str, Array]) -> Ratio:
    counts = counted(windows)
    return Ratio(jnp.sum(values * counts), jnp.sum(counts))
