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

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.core.batch import Batch, several
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import counted
from jaxinterp.models.rules import EXACT
from jaxinterp.models.sites import NO_LOGITS, run
from jaxinterp.models.transformer import RESIDUAL
from jaxinterp.objectives.compose import Forward, Metrics, Ratio, Term


def spliced(
    decomposition: Any,
    model: Any,
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
      UserError: an array that the decomposition reads or writes is none of the model's, or is read too late.
    """
    reads, writes = several(decomposition.sites.without_gradients.reads), several(decomposition.sites.writes)
    options = {"k": k, "weight": weight, "training": training}
    alone = isinstance(decomposition.sites.writes, str)
    inputs: list[Array] = []
    codes: list[Any] = []
    written: list[str] = []

    def read(value: Array) -> None:
        inputs.append(value.reshape(*tokens.shape, -1))
        layer = len(codes)
        encode = decomposition.encode if alone else lambda x, **kw: decomposition.encode_layer(layer, x, **kw)
        codes.append(encode(inputs[-1], **options))

    def write(name: str, value: Array) -> Array:
        layer = writes.index(name)
        if layer >= len(codes):
            raise UserError(f"{name!r} is written before {reads[layer]!r} is read: it cannot be replaced on the way.")
        written.append(name)
        if alone:
            output = decomposition.decode(codes[0], inputs[0])
        else:
            output = decomposition.decode_layer(layer, codes[: layer + 1], inputs[layer])
        output = output.reshape(value.shape).astype(value.dtype)
        if weight is None:
            return output
        return jnp.where(weight.reshape(*tokens.shape, *[1] * (value.ndim - 2)) > 0, output, value)

    def tap(name: str, value: Array) -> Array:
        if len(codes) < len(reads) and name == reads[len(codes)]:
            read(value)
        return write(name, value) if name in writes else value

    logits = model(tokens, tap=tap, rules=EXACT)
    if logits is None:
        raise UserError(NO_LOGITS)
    if len(codes) < len(reads) or len(written) < len(writes):
        missing = [*reads[len(codes) :], *(name for name in writes if name not in written)][0]
        raise UserError(f"{missing!r} did not come by in the forward pass: give sites of this model in its own order.")
    return logits


def cross_entropy(*, remat: bool = False) -> Term:
    """Cross-entropy of the next token with the decomposition in place; metric `ce`, in nats."""

    def term(decomposition: Any, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        log_p, windows = _predict(decomposition, batch, forward, remat)
        nll = -jnp.take_along_axis(log_p, windows["tokens"][:, 1:, None], axis=-1)[..., 0]
        ce = _mean(nll, windows)
        return ce.value(), {"ce": ce}

    return term


def divergence(*, remat: bool = False) -> Term:
    """KL(model || model with the decomposition in place) of the next token; metric `kl`, in nats."""

    def term(decomposition: Any, batch: Batch, forward: Forward) -> tuple[Array, Metrics]:
        log_p, windows = _predict(decomposition, batch, forward, remat)
        clean = jax.nn.log_softmax(run(forward.model, windows["tokens"]).logits[:, :-1])
        kl = _mean(jnp.sum(jnp.exp(clean) * (clean - log_p), axis=-1), windows)
        return kl.value(), {"kl": kl}

    return term


def _predict(decomposition: Any, batch: Batch, forward: Forward, remat: bool) -> tuple[Array, dict[str, Array]]:
    windows = batch.windows
    if forward.model is None or windows is None:
        raise UserError("an end-to-end term needs the model and its windows: train with fit(...), which gives both.")
    tokens, weight = windows["tokens"], windows["weight"]

    def predicted(decomposition: Any) -> Array:
        return spliced(decomposition, forward.model, tokens, weight, k=batch.k, training=True)

    if remat:
        predicted = eqx.filter_checkpoint(predicted, policy=jax.checkpoint_policies.save_only_these_names(RESIDUAL))
    logits = predicted(decomposition)
    return jax.nn.log_softmax(logits[:, :-1]), windows


def _mean(values: Array, windows: dict[str, Array]) -> Ratio:
    counts = counted(windows)
    return Ratio(jnp.sum(values * counts), jnp.sum(counts))
