"""Training a language model whose MLPs are mixtures: auxiliary losses, and statistics that follow the batches.

    loss = next-token loss + balance * mean of load_balance over MoE-X (and Switch) layers
         + uniformity * mean of uniformity + ambiguity * mean of ambiguity over Monet layers

They are computed from the arrays `router`, `experts/index` and `experts/weight` of the same forward pass. While it is
trained, Monet's router normalises by the batch; the running statistics follow after every step, without gradient, and
are what the finished model uses. Models without mixtures are trained as by `LanguageModel`.

Sources: as the layers. Coefficients: 0.01 (Fedus et al. 2021), 0.001 each (Park et al. 2024, table 5).
"""

from dataclasses import dataclass, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.core.trees import path_name
from jaxinterp.data.activations import counted
from jaxinterp.methods.checks import check_not_negative, check_positive
from jaxinterp.methods.recipes import warmup_linear
from jaxinterp.models.mixtures.moe_x import MoEX, load_balance
from jaxinterp.models.mixtures.monet import (
    Monet,
    Statistics,
    ambiguity,
    batch_statistics,
    next_statistics,
    uniformity,
)
from jaxinterp.models.run import Trace, run
from jaxinterp.models.sites import select

STATE = ("mean", "variance")
"""What the gradient does not train in a Monet layer."""


@dataclass(frozen=True)
class MixtureLanguageModel:
    """Trains every array of the subject's model but running statistics, in float32."""

    learning_rate: float = 4e-3
    """The peak; it rises over the first `warmup` of the steps and falls to 0 over the last `decay`."""
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.1
    """Of matrices, per step and unit of learning rate."""
    gradient_norm: float = 1.0
    """What longer gradients are cut to."""
    balance: float = 0.01
    uniformity: float = 1e-3
    ambiguity: float = 1e-3

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_positive(self, "learning_rate", "gradient_norm")
        check_not_negative(self, "weight_decay", "warmup", "decay", "balance", "uniformity", "ambiguity")

    def needs(self, site: Site = None) -> Needs:
        """No array of the subject: the windows are the batch.

        Raises:
          UserError: a site is named, but the whole model is trained.
        """
        if site is not None:
            raise UserError(f"site={site!r}: MixtureLanguageModel trains the whole model; leave the site out.")
        return Needs(windows=True, rows="none")

    def recipe(self, steps: int) -> Recipe:
        """AdamW on the loss; then the statistics."""
        rate = warmup_linear(self.learning_rate, steps, self.warmup, self.decay)
        optimizer = optax.chain(
            optax.clip_by_global_norm(self.gradient_norm),
            optax.adamw(rate, b2=0.95, weight_decay=self.weight_decay, mask=_decayed),
        )

        def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if eqx.is_inexact_array(leaf) else leaf, model)
            training = set_training(wide, True)
            return MethodState(training, optimizer.init(eqx.filter(training, trained(training))))

        def step(
            state: MethodState, batch: Batch, key: PRNGKeyArray, model: PyTree = None
        ) -> tuple[MethodState, Metrics]:
            leaves, fixed = eqx.partition(state.decomposition, trained(state.decomposition))
            loss = lambda leaves: self._loss(eqx.combine(leaves, fixed), batch)
            gradient, (metrics, statistics) = jax.grad(loss, has_aux=True)(leaves)
            updates, moments = optimizer.update(gradient, state.optimizer, leaves)
            learned = eqx.combine(optax.apply_updates(leaves, updates), fixed)
            return MethodState(followed(learned, statistics, batch), moments), metrics

        return Recipe(start, step, lambda state: set_training(state.decomposition, False))

    def _loss(self, model: PyTree, batch: Batch) -> tuple[Float[Array, ""], tuple[Metrics, dict[str, Statistics]]]:
        if batch.windows is None:
            raise UserError("a language model is trained on windows of text: train with fit(...), which gives them.")
        tokens, document = batch.windows["tokens"], batch.windows["document"]
        trace = run(model, tokens)
        log_p = jax.nn.log_softmax(trace.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        same, counts = (document[:, :-1] == document[:, 1:]).astype(jnp.float32), counted(batch.windows)
        text = Ratio(jnp.sum(nll * same), jnp.sum(same))
        extra = auxiliary(model, trace)
        coefficients = {"balance": self.balance, "uniformity": self.uniformity, "ambiguity": self.ambiguity}
        loss = text.value() + sum((coefficients[name] * value for name, value in extra.items()), jnp.zeros(()))
        metrics = {"loss": text, "ce": Ratio(jnp.sum(nll * counts), jnp.sum(counts))}
        metrics |= {name: Ratio(value, jnp.ones(())) for name, value in extra.items()}
        statistics = {
            name: batch_statistics(trace[f"{name}/router"])
            for name, mlp in mixtures(model).items()
            if isinstance(mlp, Monet)
        }
        return loss, jax.lax.stop_gradient((metrics, statistics))


def mixtures(model: PyTree) -> dict[str, PyTree]:
    """The MLPs that are mixtures with a router of their own, by name."""
    return {
        f"blocks/{index}/mlp": block.mlp
        for index, block in enumerate(model.blocks)
        if isinstance(block.mlp, MoEX | Monet)
    }


def auxiliary(model: PyTree, trace: Trace) -> dict[str, Float[Array, ""]]:
    """The means over layers of the auxiliary losses that its layers have."""
    found: dict[str, list[Array]] = {}
    for name, mlp in mixtures(model).items():
        weight = trace[f"{name}/experts/weight"]
        if isinstance(mlp, MoEX):
            index = trace[f"{name}/experts/index"]
            found.setdefault("balance", []).append(load_balance(trace[f"{name}/router"], index))
        else:
            found.setdefault("uniformity", []).append(uniformity(weight))
            found.setdefault("ambiguity", []).append(ambiguity(weight))
    return {name: jnp.mean(jnp.stack(values)) for name, values in found.items()}


def trained(model: PyTree) -> PyTree:
    """True at every floating-point array but Monet's running statistics."""
    marks = jax.tree.map(eqx.is_inexact_array, model)
    paths, structure = jax.tree_util.tree_flatten_with_path(marks)
    state = {f"{name}/{field}" for name, mlp in mixtures(model).items() if isinstance(mlp, Monet) for field in STATE}
    return jax.tree_util.tree_unflatten(structure, [mark and path_name(path) not in state for path, mark in paths])


def set_training(model: PyTree, training: bool) -> PyTree:
    """The model with every Monet layer normalising by the batch, or by its running statistics."""
    return eqx.tree_at(
        lambda model: [block.mlp for block in model.blocks],
        model,
        [
            replace(block.mlp, training=training) if isinstance(block.mlp, Monet) else block.mlp
            for block in model.blocks
        ],
    )


def followed(model: PyTree, statistics: dict[str, Statistics], batch: Batch) -> PyTree:
    """The model with running statistics that follow those of a batch."""
    for name, new in statistics.items():
        mlp = model.blocks[int(name.split("/")[1])].mlp
        count = 0 if batch.windows is None else batch.windows["tokens"].size * mlp.router.shape[-1]
        after = next_statistics(Statistics(mlp.mean, mlp.variance), new, count)
        model = select(model, name).set(replace(mlp, mean=after.mean, variance=after.variance))
    return model


def _decayed(parameters: PyTree) -> PyTree:
    """True at arrays with two axes or more that are not biases."""
    paths, structure = jax.tree_util.tree_flatten_with_path(parameters)
    marks = [leaf.ndim > 1 and not jax.tree_util.keystr(path).endswith("bias") for path, leaf in paths]
    return jax.tree_util.tree_unflatten(structure, marks)
