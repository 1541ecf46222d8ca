"""Training a language model through the same `fit` as a dictionary: what is learned is the subject itself.

    loss = mean over t of  -log p(token t+1 | tokens 0..t),   over next tokens of the same document as token t

An end token belongs to the document that it ends, so that the model learns to end; what comes after it is another
document and does not count. The metric `ce` is the same mean over the next tokens that the scoreboard counts
(`counted`: neither of the two at position 0 or special), so that it compares with `ce_clean` there.

Nothing is harvested: `needs` names no array, and the batch is the windows themselves.

AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101; weight decay on matrices only, gradient clipped by its global norm.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch, Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site
from jaxinterp.data.activations import counted
from jaxinterp.methods.checks import check_not_negative, check_positive
from jaxinterp.methods.recipes import gradient_method, warmup_linear
from jaxinterp.models.run import run
from jaxinterp.objectives import Metrics, Ratio


@dataclass(frozen=True)
class LanguageModel:
    """Trains every array of the subject's model, in float32, from where it stands.

    learning_rate: the peak; it rises over the first `warmup` of the steps and falls to 0 over the last `decay`.
    weight_decay: of matrices, per step and unit of learning rate. gradient_norm: what longer gradients are cut to.
    """

    learning_rate: float = 4e-3
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.1
    gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_positive(self, "learning_rate", "gradient_norm")
        check_not_negative(self, "weight_decay", "warmup", "decay")
        for name in ("warmup", "decay"):
            if vars(self)[name] > 1:
                raise UserError(f"{name}={vars(self)[name]} is a share of the steps: at most 1.")

    def needs(self, site: Site = None) -> Sites:
        """No array of the subject: the windows are the batch.

        Raises:
          UserError: a site is named, but the whole model is trained.
        """
        check_no_site(self, site)
        return Sites((), ())

    def recipe(self, steps: int) -> Recipe:
        """AdamW on the next-token loss."""
        return gradient_method(_start, next_token, adamw(self, steps), trained=every_number)


@runtime_checkable
class OptimizerFields(Protocol):
    """What `adamw` reads of a method: the fields of `LanguageModel`."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def gradient_norm(self) -> float: ...


def adamw(method: OptimizerFields, steps: int) -> optax.GradientTransformation:
    """AdamW with beta 0.9 and 0.95, weight decay on matrices only, behind a cut of the gradient's global norm."""
    rate = warmup_linear(method.learning_rate, steps, method.warmup, method.decay)
    return optax.chain(
        optax.clip_by_global_norm(method.gradient_norm),
        optax.adamw(rate, b2=0.95, weight_decay=method.weight_decay, mask=matrices),
    )


def check_no_site(method: OptimizerFields, site: Site) -> None:
    """Raises UserError if a site is named: these methods train the whole model."""
    if site is not None:
        raise UserError(f"site={site!r}: {type(method).__name__} trains the whole model; leave the site out.")


def in_float32(model: PyTree) -> PyTree:
    """The model with every array of floating-point numbers in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, model)


def next_token(
    decomposition: PyTree, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
) -> tuple[Float[Array, ""], Metrics]:
    """The objective. `decomposition` is the model that is trained; `model`, where it started, is not used.

    Raises:
      UserError: the batch has no windows.
    """
    if batch.windows is None:
        raise UserError("a language model is trained on windows of text: train with fit(...), which gives them.")
    tokens, document = batch.windows["tokens"], batch.windows["document"]
    nll = next_token_nll(decomposition, tokens)
    same = (document[:, :-1] == document[:, 1:]).astype(jnp.float32)
    counts = counted(batch.windows)
    trained_on = Ratio(jnp.sum(nll * same), jnp.sum(same))
    metrics = {"loss": trained_on, "ce": Ratio(jnp.sum(nll * counts), jnp.sum(counts))}
    return trained_on.value(), jax.lax.stop_gradient(metrics)


def next_token_nll(model: PyTree, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch next"]:
    """-log p of every next token, in nats."""
    log_p = jax.nn.log_softmax(run(model, tokens).logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


def every_number(model: PyTree) -> PyTree:
    """True at every array of floating-point numbers."""
    return jax.tree.map(eqx.is_inexact_array, model)


def matrices(parameters: PyTree) -> PyTree:
    """True at arrays with two axes or more: what weight decay shrinks. Gains of norms and biases stay as they are."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)


def _start(key: PRNGKeyArray, sample: Batch, model: PyTree) -> PyTree:
    return in_float32(model)
