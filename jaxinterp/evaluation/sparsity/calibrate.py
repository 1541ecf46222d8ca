"""Statistics of activations from a stream of text: sums that add over batches and devices, and a quantile sketch.

Over the tokens with weight, for an array a `[batch, seq, d]` and a score of it:

    tokens, total_j = sum a_j, absolute_j = sum |a_j|, square_j = sum a_j^2
    histogram[b] = how many scores lie in bucket b

Bucket b holds the non-negative float32 numbers whose upper 16 bits are b (sign, exponent, 7 bits of the fraction): its
edges are 2^-7 apart relative to the value, whatever the scale, and histograms of any two parts of a text add exactly.
Sums are float32 on the device, float64 and int64 on the host, batch by batch.

    E[u_j^2] for CHESS: square / tokens      norms for Wanda and DaSS: sqrt(square)      AMP: absolute / tokens
    thresholds of TEAL, CATS, CHESS, R-Sparse: `quantile(summary, sparsity)`
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import READ, on_device
from jaxinterp.models.run import run
from jaxinterp.training.mesh import check_spread, fetch, over_data, place_model

BUCKETS = 2**15


class Summary(eqx.Module):
    """What a stream of activations adds up to."""

    tokens: Float[Array | np.ndarray, ""]
    total: Float[Array | np.ndarray, " d"]
    absolute: Float[Array | np.ndarray, " d"]
    square: Float[Array | np.ndarray, " d"]
    histogram: Int[Array | np.ndarray, " buckets"]

    def __add__(self, other: "Summary") -> "Summary":
        return jax.tree.map(lambda x, y: x + y, self, other)

    def mean_square(self) -> np.ndarray:
        """E[a_j^2], `[d]`."""
        return np.asarray(self.square) / np.asarray(self.tokens)

    def mean_size(self) -> np.ndarray:
        """E|a_j|, `[d]`."""
        return np.asarray(self.absolute) / np.asarray(self.tokens)

    def mean(self) -> np.ndarray:
        """E[a_j], `[d]`."""
        return np.asarray(self.total) / np.asarray(self.tokens)

    def norms(self) -> np.ndarray:
        """|a_j|_2 over the tokens, `[d]`."""
        return np.sqrt(np.asarray(self.square))


def summarise(
    a: Float[Array, "*batch d"], weight: Float[Array, "*batch"], score: Callable[[Array], Array] = jnp.abs
) -> Summary:
    """The summary of one batch; tokens of weight 0 do not count, others count once. Negative scores count as 0."""
    rows = a.reshape(-1, a.shape[-1]).astype(jnp.float32)
    counts = (weight.reshape(-1) > 0).astype(jnp.float32)
    rows = jnp.where(counts[:, None] > 0, rows, 0)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(score(rows).astype(jnp.float32), 0), jnp.int32)
    counted = jnp.broadcast_to(counts[:, None], rows.shape).astype(jnp.int32)
    return Summary(
        jnp.sum(counts),
        jnp.sum(rows, axis=0),
        jnp.sum(jnp.abs(rows), axis=0),
        jnp.sum(rows * rows, axis=0),
        jnp.zeros(BUCKETS, jnp.int32).at[(bits >> 16).reshape(-1)].add(counted.reshape(-1)),
    )


@ordinary()
def calibrate(
    model: PyTree,
    batches: Iterable[Mapping[str, Array | np.ndarray]],
    wanted: Mapping[str, tuple[str, Callable[[Any], Any]]],
    *,
    mesh: Any = None,
) -> dict[str, Summary]:
    """Summaries over a text.

    Args:
      batches: {"tokens", "weight"}, each `[batch, seq]`.
      wanted: by a name of your own, an array of the model and the score whose quantiles are wanted.
      mesh: spread the windows of every batch over its `data` axis. Of several processes all must call this together,
        with the same batches: each reads the windows of its own devices, and all get the sums over all windows.
    Raises:
      UserError: `batches` is empty, no token has weight, or a batch's windows do not spread evenly.

    Example:
      calibrate(model, batches, {"teal": ("blocks/3/mlp/hidden", BySize())})["teal"].mean_square()
    """
    found: dict[str, Summary] | None = None
    if mesh is not None:
        model = place_model(model, mesh)
    for batch in batches:
        if mesh is None:
            arrays = on_device(batch, READ)
        else:
            count = len(batch["tokens"])
            check_spread("windows of a batch", count, count, mesh, "data")
            arrays = {name: _spread(np.asarray(batch[name]), mesh) for name in READ}
        part = jax.tree.map(_wide, jax.device_get(fetch(_batch(model, arrays, dict(wanted)))))
        found = part if found is None else {name: found[name] + part[name] for name in found}
    if found is None or not all(float(summary.tokens) for summary in found.values()):
        raise UserError("no token of the calibration text has weight: give longer documents, or more windows.")
    return found


def _spread(array: np.ndarray, mesh: Any) -> Array:
    return jax.make_array_from_callback(array.shape, over_data(mesh), lambda index: array[index])


@eqx.filter_jit
def _batch(
    model: PyTree, batch: Mapping[str, Array], wanted: Mapping[str, tuple[str, Callable[[Any], Any]]]
) -> dict[str, Summary]:
    trace = run(model, batch["tokens"], keep=tuple(name for name, _ in wanted.values()))
    return {key: summarise(trace[name], batch["weight"], score) for key, (name, score) in wanted.items()}


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def quantile(summary: Summary, sparsity: float) -> float:
    """The score below which a share `sparsity` of all scores lies, linear within a bucket: off by 2^-7 at most.

    Raises:
      UserError: the sparsity is not in 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity={sparsity} must lie in 0 to 1.")
    counts = np.asarray(summary.histogram, np.float64)
    sums = np.cumsum(counts)
    place = int(np.searchsorted(sums, sparsity * sums[-1], side="left"))
    place = min(place, int(np.flatnonzero(counts)[-1]))
    edges = (np.arange(place, place + 2, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    inside = (sparsity * sums[-1] - (sums[place] - counts[place])) / max(counts[place], 1)
    return float(edges[0] + np.clip(inside, 0, 1) * (edges[1] - edges[0]))
