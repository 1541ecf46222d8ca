"""DAS: a rotation whose first k coordinates, swapped between runs, carry one variable.

    a <- a + ((a_source - a) B^T) B,   B [k, d] = the first k rows of an orthogonal matrix

B is the Q of a QR factorisation of trained rows, so that it is orthonormal at every step. Loss: cross-entropy of the
counterfactual answer (the source prompt's) at the last position, over the whole vocabulary.

Source: Geiger et al. 2023, arXiv 2303.02536; settings of Makelov et al. 2023, arXiv 2311.17030: Adam .01, falling
linearly to a tenth.
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
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.methods.causal.lineas import Rows, check_rows_of_ids
from jaxinterp.methods.checks import check_positive, check_whole
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.ids import check_ids
from jaxinterp.models.run import run


class Rotation(eqx.Module):
    """k directions in the space of one array; `basis` gives them orthonormal."""

    rows: Float[Array, "k d"] = eqx.field(metadata=PARAMETER)
    site: str = eqx.field(static=True)

    def basis(self) -> Float[Array, "k d"]:
        """Orthonormal rows that span the trained ones."""
        q, _ = jnp.linalg.qr(self.rows.T)
        return q.T


@dataclass(frozen=True)
class DAS:
    """DAS's settings; `fit(DAS(...), subject, steps=60)` takes no text.

    Attributes:
      base, source: pairs of prompts of one length, as tuples of ids.
      answer: the token that the source's variable makes right, by pair.
      site: the array that is patched.
      position: where, counted from the end if negative.
      k: how many directions.
    """

    base: Rows
    source: Rows
    answer: tuple[int, ...]
    site: str
    position: int = -1
    k: int = 1
    rate: float = 0.01

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, k=1)
        check_positive(self, "rate")

    def needs(self, site: Site = None) -> Needs:
        return Needs(rows="none")

    def recipe(self, steps: int) -> Recipe:
        if not len(self.base) == len(self.source) == len(self.answer) > 0:
            raise UserError(
                f"{len(self.base)} base prompts, {len(self.source)} source prompts, {len(self.answer)} answers: give "
                "one of each for every pair."
            )
        check_rows_of_ids("base and source", (*self.base, *self.source))
        if not -len(self.base[0]) <= self.position < len(self.base[0]):
            raise UserError(f"position={self.position} is not a position of prompts of {len(self.base[0])} tokens.")
        base, source = jnp.asarray(self.base, jnp.int32), jnp.asarray(self.source, jnp.int32)
        answer = jnp.asarray(self.answer, jnp.int32)

        def init(key: Array, sample: Batch, model: PyTree) -> Rotation:
            check_ids(model, answer, "answer")
            width = jax.eval_shape(lambda: run(model, base, keep=self.site)[self.site]).shape[-1]
            if self.k > width:
                raise UserError(f"k={self.k} directions do not fit into {self.site!r}, which has {width} dimensions.")
            return Rotation(jax.random.normal(key, (self.k, width), jnp.float32) / width**0.5, self.site)

        def objective(
            decomposition: PyTree, batch: Batch, key: Array, *, model: PyTree = None
        ) -> tuple[Array, Metrics]:
            there = jax.lax.stop_gradient(run(model, source, keep=self.site)[self.site])[:, self.position]
            basis = decomposition.basis()

            def swap(x: Array) -> Array:
                here = x[:, self.position]
                moved = here + ((there - here) @ basis.T) @ basis
                return x.at[:, self.position].set(moved.astype(x.dtype))

            logits = run(model, base, edits={self.site: swap}, keep=()).logits[:, -1]
            rows = jnp.arange(len(self.answer))
            loss = -jnp.mean(jax.nn.log_softmax(logits)[rows, answer])
            right = jnp.sum((jnp.argmax(logits, axis=-1) == answer).astype(jnp.float32))
            return loss, {"accuracy": Ratio(right, jnp.asarray(len(self.answer), jnp.float32))}

        schedule = optax.linear_schedule(self.rate, self.rate / 10, steps)
        return gradient_method(init, objective, optax.adam(schedule))
