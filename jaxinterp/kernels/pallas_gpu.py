"""The sparse passes as Pallas kernels for CUDA GPUs, through Pallas' Triton backend; forward only, on one device.

With N tokens, M features, rows `(M, d)`, and per token k values v and indices i:

    gather_sum  y_n   = sum_j v_nj W[i_nj]                            a program per token and tile of columns
    sampled_dot p_nj  = g_n . W[i_nj]                                 a program per token and group of indices
    outer_sum   dW[m] = sum over (n, j) with i_nj = m of v_nj g_n     a program per feature and tile of columns

Sums are float32, in a fixed order: there are no atomics, and the same arguments give the same bits. An index equal to M
reads zeros and writes nothing.

`outer_sum` sorts the N k entries by feature (`order`), so that each program walks one run of entries. A run longer than
`CHUNK` (a feature that fires on every token) would keep one program busy when all others are done. So the sorted
entries are cut at the multiples of `CHUNK`; what a run holds after its first cut is summed by programs of its own, one
per chunk, and the program of the feature adds their results.

Tiles of columns are the slow axis of a grid: all tokens read one narrow slice of W before the next, so that it need be
read from memory only once where it fits the cache. No time was measured: no GPU has run these kernels yet.

JAX deprecated this backend in 0.11, but lowers no other from a machine without a GPU; where it is gone, `available`
says so, and `xla` does the same work.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxinterp.kernels.runs import CHUNK, cuts_of, order

try:
    from jax.experimental.pallas import triton
except ImportError:  # gone from JAX
    triton = None  # type: ignore[assignment]

TILE = 256  # columns at a time: 16 bytes for each of 32 threads, if bfloat16
GROUP = 8  # rows fetched at once, so that each thread has as many loads on their way
OLDEST = (8, 0)  # compute capability that the Triton compiler supports


def available() -> str | None:
    """Why these kernels cannot run with the installed JAX on the GPU that is here; None where they can.

    Where there is no GPU they can be lowered for one, and interpreted.
    """
    if triton is None:
        return f"JAX {jax.__version__} has no Triton backend of Pallas: take 'xla'."
    if jax.default_backend() == "gpu":
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", ""))
        if not capability.replace(".", "").isdigit():
            return f"{device.device_kind} is not a CUDA GPU: take 'xla'."
        if tuple(int(part) for part in capability.split(".")) < OLDEST:
            return f"{device.device_kind} has compute capability {capability}, and Triton needs 8.0: take 'xla'."
    return None


def refusal(of: str, *, tokens: int, features: int, k: int, width: int, itemsize: int = 4) -> str | None:
    """Why a pass cannot run at a shape; None where it can."""
    if max(tokens, features) + tokens * k >= 2**31:
        return f"{tokens} tokens with k={k} have more entries than 32 bits count: take fewer tokens."
    return available()


def gather_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    rows: Float[Array, "features d"],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens d"]:
    """Per token, the sum of the rows at its indices, weighted by its values; float32."""
    tokens, width = values.shape[0], rows.shape[1]
    tile = _tile(width)
    return _call(_gather_sum, (pl.cdiv(width, tile), tokens), (tokens, width), interpret, tile=tile)(
        values.astype(jnp.float32), indices.astype(jnp.int32), rows
    )


def sampled_dot(
    g: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    indices: Int[Array, "tokens k"],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens k"]:
    """Per token, the inner products of g with the rows at its indices; float32."""
    tokens, k = indices.shape
    grid = (tokens, pl.cdiv(k, GROUP))
    return _call(_sampled_dot, grid, (tokens, k), interpret, tile=_tile(rows.shape[1]))(
        g, rows, indices.astype(jnp.int32)
    )


def outer_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    *,
    interpret: bool = False,
) -> Float[Array, "features d"]:
    """The gradient of `gather_sum` in its rows; float32. Rows of features without an entry are zeros."""
    width, k = g.shape[1], indices.shape[1]
    tile = _tile(width)
    tiles = pl.cdiv(width, tile)
    entries, starts, stops = order(indices, features)
    run = entries, values.astype(jnp.float32).reshape(-1), g
    cuts, cut_stops = cuts_of(indices, entries, stops)
    after_cuts = _call(_sum_after_cuts, (tiles, len(cuts)), (len(cuts), width), interpret, k=k, tile=tile)(
        cuts, cut_stops, *run
    )
    return _call(_sum_features, (tiles, features), (features, width), interpret, k=k, tile=tile)(
        starts, stops, *run, after_cuts
    )


def _gather_sum(values: Any, indices: Any, rows: Any, out: Any, *, tile: int) -> None:
    token, (columns, inside) = pl.program_id(1), _columns(tile, rows.shape[1], pl.program_id(0))
    k = indices.shape[1]

    def add(step: Array, total: Array) -> Array:
        places = step * GROUP + _range(GROUP)
        index = triton.load(indices.at[token, places], mask=places < k, other=rows.shape[0])
        value = triton.load(values.at[token, places], mask=places < k, other=0.0)
        return total + _weighted(value, rows, index, columns, inside)

    total = jax.lax.fori_loop(0, pl.cdiv(k, GROUP), add, jnp.zeros(tile, jnp.float32))
    triton.store(out.at[token, columns], total, mask=inside)


def _sampled_dot(g: Any, rows: Any, indices: Any, out: Any, *, tile: int) -> None:
    token, places = pl.program_id(0), pl.program_id(1) * GROUP + _range(GROUP)
    width, there = rows.shape[1], places < indices.shape[1]
    index = triton.load(indices.at[token, places], mask=there, other=rows.shape[0])

    def add(step: Array, total: Array) -> Array:
        columns, inside = _columns(tile, width, step)
        ours = triton.load(g.at[token, columns], mask=inside, other=0).astype(jnp.float32)
        return total + ours[None, :] * _fetch(rows, index, columns, inside)

    total = jax.lax.fori_loop(0, pl.cdiv(width, tile), add, jnp.zeros((GROUP, tile), jnp.float32))
    triton.store(out.at[token, places], jnp.sum(total, axis=1), mask=there)


def _sum_after_cuts(starts: Any, stops: Any, entries: Any, values: Any, g: Any, out: Any, *, k: int, tile: int) -> None:
    row, (columns, inside) = pl.program_id(1), _columns(tile, g.shape[1], pl.program_id(0))
    total = _walk(starts[row], stops[row], entries, values, g, columns, inside, k)
    triton.store(out.at[row, columns], total, mask=inside)


def _sum_features(
    starts: Any, stops: Any, entries: Any, values: Any, g: Any, after_cuts: Any, out: Any, *, k: int, tile: int
) -> None:
    feature, (columns, inside) = pl.program_id(1), _columns(tile, g.shape[1], pl.program_id(0))
    start, stop = starts[feature], stops[feature]
    chunk = jax.lax.div(start, CHUNK)
    total = _walk(start, jnp.minimum(stop, (chunk + 1) * CHUNK), entries, values, g, columns, inside, k)
    # The sum after the cut at (c + 1) CHUNK is row c.
    cuts = jnp.maximum(jax.lax.div(stop - 1, CHUNK), chunk) - chunk

    def add(step: Array, total: Array) -> Array:
        places = chunk + step * GROUP + _range(GROUP)
        index = jnp.where(places < chunk + cuts, places, after_cuts.shape[0])
        return total + jnp.sum(_fetch(after_cuts, index, columns, inside), axis=0)

    total = jax.lax.fori_loop(0, _steps(cuts), add, total)
    triton.store(out.at[feature, columns], total, mask=inside)


def _walk(start: Array, stop: Array, entries: Any, values: Any, g: Any, columns: Array, inside: Array, k: int) -> Array:
    """The sum over the sorted entries from start to stop of value times row of g."""

    def add(step: Array, total: Array) -> Array:
        places = start + step * GROUP + _range(GROUP)
        there = places < stop
        entry = triton.load(entries.at[places], mask=there, other=0)
        value = triton.load(values.at[entry], mask=there, other=0.0)
        token = jnp.where(there, jax.lax.div(entry, k), g.shape[0])
        return total + _weighted(value, g, token, columns, inside)

    return jax.lax.fori_loop(0, _steps(stop - start), add, jnp.zeros(columns.shape, jnp.float32))


def _weighted(value: Array, rows: Any, index: Array, columns: Array, inside: Array) -> Array:
    return jnp.sum(value[:, None] * _fetch(rows, index, columns, inside), axis=0)


def _fetch(rows: Any, index: Array, columns: Array, inside: Array) -> Array:
    """The rows at an index, in float32; zeros for an index that is not a row and for columns outside."""
    there = (index < rows.shape[0])[:, None] & inside[None, :]
    return triton.load(rows.at[index[:, None], columns[None, :]], mask=there, other=0).astype(jnp.float32)


def _columns(tile: int, width: int, number: Array) -> tuple[Array, Array]:
    columns = number * tile + _range(tile)
    return columns, columns < width


def _range(size: int) -> Array:
    return jax.lax.iota(jnp.int32, size)


def _steps(count: Array) -> Array:
    return jax.lax.div(count + (GROUP - 1), GROUP)


def _tile(width: int) -> int:
    """A power of two: Triton has no other sizes. The last tile is masked where it does not divide the width."""
    return min(TILE, max(16, pl.next_power_of_2(width)))


def _call(kernel: Any, grid: tuple[int, int], out: tuple[int, int], interpret: bool, **static: int) -> Any:
    """A kernel of one warp per program; its references are whole arrays, its result is float32."""
    return pl.pallas_call(
        partial(kernel, **static),
        out_shape=jax.ShapeDtypeStruct(out, jnp.float32),
        grid=grid,
        # Naming Triton's parameters is what chooses Triton: from JAX 0.11 on the default is another backend.
        compiler_params=None if interpret else triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=f"jaxinterp{kernel.__name__}",
    )
