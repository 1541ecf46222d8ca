"""Fine-tuning a loaded model by low-rank adapters on named projections, through `fit`; everything else is frozen.

    y = x W + (alpha / rank) (x A) B,    A [d_in, rank] at first uniform in ±1 / sqrt(d_in),    B [rank, d_out] zero

Only A and B are trained, on any objective of a language model: the next-token loss, or that of `SparseLanguageModel`
(DEFT trains adapters on its density loss; AMP trains them after pruning). `merged` adds them to the weights.

Source: LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER, STATE
from jaxinterp.core.protocols import Objective, Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.methods.checks import check_not_negative, check_positive, check_whole
from jaxinterp.methods.language_model import adamw, check_no_site, next_token
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.layers import Linear
from jaxinterp.models.sites import replace, select, sites


class LowRankLinear(eqx.Module):
    """A frozen linear map with a trained map of low rank beside it: the module's equation."""

    linear: Linear = eqx.field(metadata=STATE)
    down: Float[Array, "d_in rank"] = eqx.field(metadata=PARAMETER)
    up: Float[Array, "rank d_out"] = eqx.field(metadata=PARAMETER)
    scale: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        y = self.linear(x)
        wide = x.astype(self.down.dtype)
        return (y + self.scale * (wide @ self.down) @ self.up).astype(y.dtype)

    def merged(self) -> Linear:
        """One linear map with W + (alpha / rank) A B, in the dtype of W."""
        weight = self.linear.weight
        change = (self.scale * self.down @ self.up).astype(jnp.promote_types(weight.dtype, self.down.dtype))
        return eqx.tree_at(lambda one: one.weight, self.linear, (weight + change).astype(weight.dtype))


@dataclass(frozen=True)
class LowRankAdapters:
    """Trains adapters on the projections that `names` matches; what `fit` returns is the model with adapters.

    Example:
      >>> from jaxinterp.methods.sparse_language_model import SparseLanguageModel
      >>> density = SparseLanguageModel(penalty="density", weight=1.0)
      >>> method = LowRankAdapters(("blocks/*/mlp/*_proj",), rank=16, objective=density.objective)
    """

    names: tuple[str, ...] = ("blocks/*/attn/*_proj", "blocks/*/mlp/*_proj")
    """Globs over projections: see `sites(model)`."""
    rank: int = 8
    alpha: float = 16.0
    objective: Objective = next_token
    """(model, batch, key, *, model) -> (loss, metrics), over windows of text."""
    learning_rate: float = 3e-4
    """The peak; it rises over the first `warmup` of the steps and falls to 0 over the last `decay`."""
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.0
    gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, rank=1)
        check_positive(self, "alpha", "learning_rate", "gradient_norm")
        check_not_negative(self, "weight_decay", "warmup", "decay")

    def needs(self, site: Site = None) -> Needs:
        """No array of the subject: the windows are the batch.

        Raises:
          UserError: a site is named; `names` says what is trained.
        """
        check_no_site(self, site)
        return Needs(windows=True, rows="none")

    def recipe(self, steps: int) -> Recipe:
        """AdamW on the objective, of the adapters alone."""
        return gradient_method(self._start, self.objective, adamw(self, steps))

    def _start(self, key: PRNGKeyArray, sample: Batch, model: PyTree) -> PyTree:
        return adapted(model, self.names, key, rank=self.rank, alpha=self.alpha)


def adapted(model: PyTree, names: tuple[str, ...], key: PRNGKeyArray, *, rank: int, alpha: float) -> PyTree:
    """The model with an adapter on every projection that a name or a glob matches; its outputs stay as they are.

    Raises:
      UserError: a glob matches no projection of this model, or one that is adapted already.
    """
    found: dict[str, None] = {}
    for pattern in names:
        here = [name for name in sites(model, pattern) if name.endswith("_proj")]
        if not here:
            raise UserError(f"names={pattern!r} matches no projection of this model: see sites(model, '**/*_proj').")
        found |= dict.fromkeys(here)
    leaves = {}
    for number, name in enumerate(found):
        linear = select(model, name).get()
        if not isinstance(linear, Linear):
            raise UserError(f"{name!r} is a {type(linear).__name__}, not a linear map of this package: leave it out.")
        d_in, d_out = linear.weight.shape
        reach = 1 / jnp.sqrt(jnp.float32(d_in))
        down = jax.random.uniform(jax.random.fold_in(key, number), (d_in, rank), jnp.float32, -reach, reach)
        leaves[name] = LowRankLinear(linear, down, jnp.zeros((rank, d_out), jnp.float32), alpha / rank)
    return replace(model, leaves)


def merged(model: PyTree) -> PyTree:
    """The model with every adapter added to its weights: plain linear maps again, which can be saved."""
    is_adapter = lambda node: isinstance(node, LowRankLinear)
    return jax.tree.map(lambda node: node.merged() if is_adapter(node) else node, model, is_leaf=is_adapter)
