"""How pre-activations become codes. An activation is a small module: its own leaves, `codes` and `after_step`.

    ReLU       z = max(a, 0)
    TopK       z = max(a, 0) at the k largest a of each token
    BatchTopK  z = max(a, 0) at the k * tokens largest a of the batch; outside training, where a exceeds a threshold

with a = x E^T + b. A new activation is a new class with the same two methods; nothing else changes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import STATE
from jaxinterp.core.metrics import Metrics
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.kernels import as_products, encode_ranked, encode_topk, keep_largest, rank, select_topk


@runtime_checkable
class Activation(Protocol):
    """A pytree that turns inputs into codes, given the encoder's rows and biases."""

    def codes(
        self,
        x: Float[Array, "*axes d"],
        rows: Float[Array, "features d"],
        bias: Float[Array, " features"],
        *,
        k: Int[Array, ""] | None,
        weight: Float[Array, "*axes"] | None,
        training: bool,
    ) -> Codes:
        """The codes of x. `k`: how many to keep, at most the activation's own; `weight`: which tokens count."""
        ...

    def after_step(self, metrics: Metrics, step: Int[Array, ""]) -> "Activation":
        """The activation after a training step; its untrained leaves may change."""
        ...


@runtime_checkable
class HasActivation(Protocol):
    """A decomposition whose codes an activation makes."""

    @property
    def activation(self) -> Activation: ...


@runtime_checkable
class ActsOnPre(Protocol):
    """An activation whose codes can be made of pre-activations again: they are sites then (`codes_pre`).

    `pre(x, rows, bias)` gives arrays `[..., features]` by the name under which they are offered; x as in `codes`.
    `from_pre(pre(x, rows, bias), x)` are the codes of x outside training.
    """

    def pre(self, x: Array, rows: Array, bias: Array) -> Mapping[str, Array]: ...
    def from_pre(self, pre: Mapping[str, Array], x: Array) -> Codes: ...


def pre_activations(
    x: Float[Array, "*axes d"], rows: Float[Array, "features d"], bias: Float[Array, " features"]
) -> Float[Array, "*axes features"]:
    """a = x E^T + b of every feature, in float32 (float64 for float64)."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, rows.dtype), jnp.float32)
    return jnp.matmul(x, as_products(rows, x).T, preferred_element_type=wide) + bias


def above(
    decides: Float[Array, "..."], limit: Float[Array, "..."] | float, value: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`value` where `decides` > limit, 0 where it is not; NaN where one of the two is NaN, so that it shows."""
    return jnp.where(decides > limit, value, jnp.where(decides <= limit, 0.0, jnp.nan))


class ReLU(eqx.Module):
    """z = max(a, 0). Sparsity comes from a penalty on z."""

    def codes(
        self,
        x: Array,
        rows: Array,
        bias: Array,
        *,
        k: Int[Array, ""] | None,
        weight: Array | None,
        training: bool,
    ) -> DenseCodes:
        return DenseCodes(jax.nn.relu(x @ rows.T + bias))

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> DenseCodes:
        """The codes of a."""
        return DenseCodes(jax.nn.relu(pre["codes_pre"]))

    def after_step(self, metrics: Metrics, step: Array) -> "ReLU":
        return self


class TopK(eqx.Module):
    """z = max(a, 0) at the k largest a of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises UserError if k is not a positive number."""
        check_k(self.k)

    def codes(
        self,
        x: Array,
        rows: Array,
        bias: Array,
        *,
        k: Int[Array, ""] | None,
        weight: Array | None,
        training: bool,
    ) -> SparseCodes:
        values, indices = encode_topk(x, rows, bias, k=self.k, keep=k)
        return SparseCodes(jax.nn.relu(values), indices, rows.shape[0])

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> SparseCodes:
        """The codes of a."""
        values, indices = select_topk(pre["codes_pre"], k=self.k)
        return SparseCodes(jax.nn.relu(values), indices, pre["codes_pre"].shape[-1])

    def after_step(self, metrics: Metrics, step: Array) -> "TopK":
        return self


class BatchTopK(eqx.Module):
    """z = max(a, 0) at the k * tokens largest a of the batch (Bussmann et al. 2024, arXiv 2412.06410).

    Only tokens that have weight compete and count. Outside training other tokens must not matter: z = a where a exceeds
    `threshold`, a running mean (decay 0.99) of the smallest value kept in training. In both, a token keeps at most its
    `CAP` k largest a, which bounds the memory of a batch; `at_cap` among the metrics of an objective is the fraction of
    tokens that reached it. It should be small: where it is not, take a larger k, or TopK.
    """

    CAP: ClassVar[int] = 4

    k: int = eqx.field(static=True)
    threshold: Float[Array, ""] = eqx.field(metadata=STATE, default_factory=lambda: jnp.zeros((), jnp.float32))

    def __check_init__(self) -> None:
        """Raises UserError if k is not a positive number."""
        check_k(self.k)

    def codes(
        self,
        x: Array,
        rows: Array,
        bias: Array,
        *,
        k: Int[Array, ""] | None,
        weight: Array | None,
        training: bool,
    ) -> Codes:
        features = rows.shape[0]
        cap = min(self.CAP * self.k, features)
        if not training:
            above = rank.above(jnp.broadcast_to(jnp.maximum(self.threshold, 0.0), (features,)))
            values, indices, _ = encode_ranked(x, rows, bias, above, k=cap)
            return SparseCodes(jax.nn.relu(values), indices, features, capped=True)
        values, indices = encode_topk(x, rows, bias, k=cap)
        weight = jnp.ones(values.shape[:-1], jnp.float32) if weight is None else weight
        values = jax.nn.relu(values) * weight[..., None]
        budget = jnp.round((self.k if k is None else k) * jnp.sum(weight)).astype(jnp.int32)
        kept, _ = keep_largest(jax.lax.stop_gradient(values), budget)
        return SparseCodes(jnp.where(kept != 0, values, 0.0), indices, features, capped=True)

    def pre(self, x: Array, rows: Array, bias: Array) -> dict[str, Array]:
        """a."""
        return {"codes_pre": pre_activations(x, rows, bias)}

    def from_pre(self, pre: Mapping[str, Array], x: Array) -> SparseCodes:
        """The codes of a outside training: by the threshold."""
        a = pre["codes_pre"]
        values, indices = select_topk(a, k=min(self.CAP * self.k, a.shape[-1]))
        kept = jnp.where(values > jnp.maximum(self.threshold, 0.0), values, 0.0)
        return SparseCodes(jax.nn.relu(kept), indices, a.shape[-1], capped=True)

    def after_step(self, metrics: Metrics, step: Array) -> "BatchTopK":
        if "smallest_code" not in metrics:
            raise UserError(
                "BatchTopK needs the metric 'smallest_code', which its threshold follows: let the objective return the "
                "metrics of total(...) too."
            )
        decay = jnp.where(step == 0, 0.0, 0.99)
        smallest = metrics["smallest_code"].value()
        return BatchTopK(self.k, decay * self.threshold + (1 - decay) * smallest)


def check_k(k: int) -> None:
    """Raises UserError if k is not a positive number."""
    if k < 1:
        raise UserError(f"k={k} must be at least 1.")


def check_schedule(activation: Any, k: Int[Array, ""] | None) -> None:
    """Raises UserError if a number of active features is asked for, and the activation knows none."""
    if k is not None and not hasattr(activation, "k"):
        name = type(activation).__name__
        raise UserError(f"k is given, but activation={name} has none: leave the schedule 'k' away, or take TopK.")
