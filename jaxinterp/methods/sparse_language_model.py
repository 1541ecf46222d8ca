"""Training or fine-tuning a language model towards sparse MLP activations, through `fit`.

    loss = next-token loss + weight(step) * penalty,     a = the `hidden` array of an MLP (gated: after the product)

    l1       sum over layers of the mean over tokens of |a|_1                          (ProSparse)
    density  mean over layers, tokens and neurons of a^2 / (a^2 + ε)                   (DEFT)

The sum over neurons makes `l1` grow with d_mlp: a weight does not carry over to another width. DEFT's ε = 1e-7 has its
knee at |a| = 3e-4, and no gradient far above it; `relative=True` takes ε times the layer's mean a^2 instead (no
gradient through the mean).

`staged(start, stages)` is ProSparse's schedule: 0 for `start` steps (the new activation alone), then λ_1 until T_1, and
from T_{i-1} to T_i half a sine from λ_{i-1} to λ_i:

    λ = λ_{i-1} + (λ_i - λ_{i-1}) (sin(-π/2 + π (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2

FATReLU, the threshold after training, is the edit `leave_out.FATReLU` at `pre`.

Sources: ProSparse 2402.13516, section 3; DEFT 2402.01911 (weight 1, ε 1e-7).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.data.activations import counted
from jaxinterp.methods.checks import check_not_negative, check_one_of, check_positive
from jaxinterp.methods.language_model import adamw, check_no_site, every_number, in_float32
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import Activation
from jaxinterp.models.run import run
from jaxinterp.models.sites import select, sites

Stages = tuple[tuple[float, int], ...]


def staged(start: int, stages: Sequence[tuple[float, int]]) -> Callable[[Any], Float[Array, ""]]:
    """ProSparse's schedule: step -> weight; traceable.

    Args:
      start: steps with weight 0.
      stages: (λ_i, T_i): the first is constant until T_1; T in steps from the beginning, rising.
    Raises:
      UserError: there is no stage, or the steps do not rise.
    """
    ends = [start, *(end for _, end in stages)]
    if not stages or any(later <= earlier for earlier, later in pairwise(ends)):
        raise UserError(f"stages={tuple(stages)} must hold rising steps, the first above start={start}.")

    def weight(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        value = jnp.where(step < start, 0.0, stages[0][0])
        for (low, begin), (high, end) in pairwise(stages):
            along = jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
            rise = (jnp.sin(-jnp.pi / 2 + jnp.pi * along) + 1) / 2
            value = jnp.where(step >= begin, low + rise * (high - low), value)
        return value

    return weight


def density_penalty(
    a: Float[Array, "*batch d"], epsilon: float = 1e-7, relative: bool = False
) -> Float[Array, "*batch d"]:
    """a^2 / (a^2 + ε) of every entry, in at least float32; `relative`: ε times the mean of a^2."""
    square = jnp.square(a.astype(jnp.promote_types(a.dtype, jnp.float32)))
    knee = epsilon * jax.lax.stop_gradient(jnp.mean(square)) if relative else epsilon
    return square / (square + knee)


@dataclass(frozen=True)
class SparseLanguageModel:
    """Trains every array of the subject's model, in float32, on the next-token loss and a penalty on activations."""

    penalty: Literal["l1", "density"] = "l1"
    weight: float = 1e-3
    """Of the penalty, where there are no `stages`."""
    start: int = 0
    """Steps without penalty."""
    stages: Stages = ()
    """(weight, step) pairs of ProSparse's schedule; empty: `weight` from `start` on."""
    activation: Activation | None = None
    """What the MLPs' activation is replaced by before training; None: none."""
    epsilon: float = 1e-7
    relative: bool = False
    """Whether epsilon counts in units of the layer's mean square."""
    learning_rate: float = 4e-3
    """The peak; it rises over the first `warmup` of the steps and falls to 0 over the last `decay`."""
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.1
    gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_one_of(self, "penalty", get_args(Literal["l1", "density"]))
        check_positive(self, "learning_rate", "gradient_norm", "epsilon")
        check_not_negative(self, "weight", "start", "weight_decay", "warmup", "decay")
        if self.stages:
            staged(self.start, self.stages)

    def needs(self, site: Site = None) -> Needs:
        """No array of the subject: the windows are the batch.

        Raises:
          UserError: a site is named, but the whole model is trained.
        """
        check_no_site(self, site)
        return Needs(windows=True, rows="none")

    def recipe(self, steps: int) -> Recipe:
        """AdamW on the loss."""
        optimizer = adamw(self, steps)
        return gradient_method(self._start, self.objective, optimizer, trained=every_number)

    def _start(self, key: PRNGKeyArray, sample: Batch, model: PyTree) -> PyTree:
        wide = in_float32(model)
        return wide if self.activation is None else with_activation(wide, self.activation)

    def coefficient(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The penalty's weight at a step."""
        stages = self.stages or ((self.weight, self.start + 1),)
        return staged(self.start, stages)(step)

    def objective(
        self, decomposition: PyTree, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss. `decomposition` is the model that is trained; `model`, where it started, is not used.

        Metrics: `ce` as of `LanguageModel`; `penalty`, unweighted; `weight`; `density`, the share of a that is not 0.

        Raises:
          UserError: the batch has no windows.
        """
        if batch.windows is None:
            raise UserError("a language model is trained on windows of text: train with fit(...), which gives them.")
        tokens, document = batch.windows["tokens"], batch.windows["document"]
        trace = run(decomposition, tokens)
        log_p = jax.nn.log_softmax(trace.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        same, counts = (document[:, :-1] == document[:, 1:]).astype(jnp.float32), counted(batch.windows)
        text = Ratio(jnp.sum(nll * same), jnp.sum(same))
        hidden = [trace[name] for name in trace if name.endswith("/mlp/hidden")]
        if self.penalty == "l1":
            penalty = sum((jnp.mean(jnp.sum(jnp.abs(a), axis=-1)) for a in hidden), jnp.zeros(()))
        else:
            shares = [jnp.mean(density_penalty(a, self.epsilon, self.relative)) for a in hidden]
            penalty = jnp.mean(jnp.stack(shares))
        weight = self.coefficient(batch.step)
        loss, one = text.value() + weight * penalty, jnp.ones(())
        active = jnp.mean(jnp.stack([jnp.mean(a != 0, dtype=jnp.float32) for a in hidden]))
        metrics = {
            "loss": Ratio(loss, one),
            "ce": Ratio(jnp.sum(nll * counts), jnp.sum(counts)),
            "penalty": Ratio(penalty, one),
            "weight": Ratio(weight, one),
            "density": Ratio(active, one),
        }
        return loss, jax.lax.stop_gradient(metrics)


def with_activation(model: PyTree, activation: Activation) -> PyTree:
    """The model with another activation in every MLP, in `config` too.

    Raises:
      UserError: an MLP was replaced by another module.
    """
    for name in [name for name in sites(model, "**/mlp") if name.endswith("/mlp")]:
        mlp = select(model, name).get()
        if not isinstance(mlp, MLP):
            raise UserError(f"{name!r} is a {type(mlp).__name__}: only an MLP's activation can be replaced.")
        model = select(model, name).set(dataclasses.replace(mlp, activation=activation))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, activation=activation))
