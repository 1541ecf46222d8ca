"""A steering vector trained through the model: a few hundred numbers, one objective.

    minimise over v   mean_i -log p(answer_i | prompt_i, a + v at `site`) + decay |v|^2 / 2

v is added at every position. It is the strongest thing that one added vector can do for these prompts, and so the
ceiling that directions from data are measured against.

Source: Subramani et al. 2022, arXiv 2205.05124; bidirectional preference vectors, arXiv 2406.00045.
"""

from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER
from jaxinterp.core.metrics import Metrics, number
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.methods.causal.lineas import Rows, check_rows_of_ids
from jaxinterp.methods.checks import check_not_negative, check_positive
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.edits import Add
from jaxinterp.models.ids import check_ids
from jaxinterp.models.run import run


class Vector(eqx.Module):
    """One vector, added at `site`."""

    delta: Float[Array, " d"] = eqx.field(metadata=PARAMETER)
    site: str = eqx.field(static=True)


@dataclass(frozen=True)
class TrainedVector:
    """Settings; `fit(TrainedVector(...), subject, steps=100)` takes no text.

    Attributes:
      prompts: token ids, all of one length.
      answer: the token that should follow each.
      site: where the vector is added.
    """

    prompts: Rows
    answer: tuple[int, ...]
    site: str
    rate: float = 0.05
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_positive(self, "rate")
        check_not_negative(self, "decay")

    def needs(self, site: Site = None) -> Needs:
        return Needs(rows="none")

    def recipe(self, steps: int) -> Recipe:
        if len(self.prompts) != len(self.answer) or not self.prompts:
            raise UserError(f"{len(self.prompts)} prompts and {len(self.answer)} answers: give one for each.")
        check_rows_of_ids("prompts", self.prompts)
        tokens, answer = jnp.asarray(self.prompts, jnp.int32), jnp.asarray(self.answer, jnp.int32)

        def init(key: Array, sample: Batch, model: PyTree) -> Vector:
            check_ids(model, answer, "answer")
            width = jax.eval_shape(lambda: run(model, tokens, keep=self.site)[self.site]).shape[-1]
            return Vector(jnp.zeros(width, jnp.float32), self.site)

        def objective(
            decomposition: PyTree, batch: Batch, key: Array, *, model: PyTree = None
        ) -> tuple[Array, Metrics]:
            logits = run(model, tokens, edits={self.site: Add(decomposition.delta)}, keep=()).logits[:, -1]
            log_p = jax.nn.log_softmax(logits)[jnp.arange(len(self.answer)), answer]
            nll = -jnp.mean(log_p)
            return nll + self.decay * jnp.sum(decomposition.delta**2) / 2, {"nll": number(nll)}

        return gradient_method(init, objective, optax.adam(self.rate))
