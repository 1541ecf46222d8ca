"""GroupMax: the largest pre-activation of every group of neighbouring features.

    z_i = max(a_i, 0) where a_i is the largest of its group (the first of equals), 0 elsewhere

Features are cut into k groups of features / k, one after the other: every token has at most k active ones, found
without a sort. Source: EleutherAI's sparsify 1.3.3 (fused_encoder.py, `activation: groupmax`).
"""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics
from jaxinterp.decompositions.activations import pre_activations
from jaxinterp.decompositions.codes import SparseCodes


class GroupMax(eqx.Module):
    """The module's equation, with k groups."""

    k: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises UserError where k is not a positive number."""
        if self.k < 1:
            raise UserError(f"k={self.k} must be at least 1.")

    def codes(
        self,
        x: Array,
        rows: Array,
        bias: Array,
        *,
        k: Int[Array, ""] | int | None,
        weight: Array | None,
        training: bool,
    ) -> SparseCodes:
        """The codes of x.

        Raises:
          UserError: k groups do not divide the features, or a schedule for k is given.
        """
        if k is not None:
            raise UserError("GroupMax has a fixed number of groups: leave the schedule 'k' out.")
        return self._of(pre_activations(x, rows, bias))

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> SparseCodes:
        """The codes of a."""
        return self._of(pre["codes_pre"])

    def after_step(self, metrics: Metrics, step: Array) -> "GroupMax":
        return self

    def _of(self, a: Array) -> SparseCodes:
        features = a.shape[-1]
        if features % self.k:
            raise UserError(f"k={self.k} groups do not divide features={features}.")
        size = features // self.k
        groups = a.reshape(*a.shape[:-1], self.k, size)
        within = jnp.argmax(groups, axis=-1)
        values = jnp.take_along_axis(groups, within[..., None], axis=-1)[..., 0]
        indices = within + size * jnp.arange(self.k)
        return SparseCodes(jax.nn.relu(values), indices.astype(jnp.int32), features)
