"""The sparse passes as Mosaic GPU kernels, for CUDA GPUs from Hopper on; forward only, on one device.

With N tokens, M features, rows `(M, d)`, and per token k values v and indices i:

    gather_sum  y_n   = sum_j v_nj W[i_nj]                            a block per token
    sampled_dot p_nj  = g_n . W[i_nj]                                 a block per token
    outer_sum   dW[m] = sum over (n, j) with i_nj = m of v_nj g_n     a block per feature

All three walk a run of entries, each of which names a row of a matrix. A block is one warpgroup. The copy engine (TMA)
brings up to `SLOTS` rows into shared memory while the warpgroup works on those that have arrived; nothing but the rows
themselves is read from memory, and no thread computes an address of one. Sums are float32 in registers, in the order of
the entries: there are no atomics, and the same arguments give the same bits. An index equal to M reads zeros and writes
nothing: its copy fetches another row, which a select throws away, so that a NaN there does no harm.

`outer_sum` sorts the N k entries by feature; runs longer than `CHUNK` are cut, as in `pallas_gpu`.

The copy engine moves multiples of 16 bytes: rows whose width is not a multiple of 8 are padded first, which copies the
matrix. Rows wider than `SLAB` are walked once for each slab.

The kernels were interpreted, with the interpreter's race detector, and compiled for GPUs that were not here. No GPU has
run them. They need jax 0.12.
"""

import re
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxinterp.kernels.runs import CHUNK, cuts_of, order

plgpu: Any = None
with suppress(ImportError):  # a jax that is too old
    from jax.experimental.pallas import mosaic_gpu

    plgpu = mosaic_gpu if hasattr(mosaic_gpu, "InterpretGPUParams") else None

SLOTS = 8  # rows on their way at once, at most
RING = 2**15  # bytes of shared memory for them, where two rows fit: several blocks share a core's 227 KiB
PIECE = 256  # numbers that one copy moves at most
SLAB = 4096  # columns that a block holds in registers: 32 float32 for each of its 128 threads
THREADS = 128  # of a warpgroup; vectors in registers are multiples of it
ALIGNED = 8  # numbers that a row has a multiple of: in bfloat16 they are the 16 bytes that copies are multiples of
OLDEST = 9  # compute capability of the first GPU with this copy engine
HOPPER_OR_LATER = r"\b(GH|GB|H|B)\d{2,3}\b"


def available() -> str | None:
    """Why these kernels cannot run with the installed JAX on the GPU that is here, or described; None where they can.

    Where there is no GPU they can be interpreted.
    """
    if plgpu is None:
        return f"JAX {jax.__version__} is too old for Mosaic GPU kernels (0.12): take 'pallas_gpu' or 'xla'."
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return None if re.search(HOPPER_OR_LATER, described.device_kind) else _too_old(described.device_kind)
    if jax.default_backend() == "gpu":
        device = jax.devices()[0]
        major = str(getattr(device, "compute_capability", "")).partition(".")[0]
        if not major.isdigit() or int(major) < OLDEST:
            return _too_old(device.device_kind)
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
    tokens, k = indices.shape
    starts = jnp.arange(tokens, dtype=jnp.int32) * k
    named = indices.reshape(-1).astype(jnp.int32)
    return _sum_runs(starts, starts + k, named, values.reshape(-1).astype(jnp.float32), rows, None, interpret)


def sampled_dot(
    g: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    indices: Int[Array, "tokens k"],
    *,
    interpret: bool = False,
) -> Float[Array, "tokens k"]:
    """Per token, the inner products of g with the rows at its indices; float32."""
    (tokens, k), padded = indices.shape, _aligned(rows)
    ours = jnp.pad(g, ((0, 0), (0, padded.shape[1] - g.shape[1])))
    slabs = _slabs(padded.shape[1])
    scratch = [_ring(slabs, padded.dtype), _ring(slabs, g.dtype, 1)]
    call = _kernel(partial(_dots, slabs=slabs), tokens, (tokens * k,), scratch, interpret)
    return call(indices.reshape(-1).astype(jnp.int32), ours, padded).reshape(tokens, k)


def outer_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    *,
    interpret: bool = False,
) -> Float[Array, "features d"]:
    """The gradient of `gather_sum` in its rows; float32. Rows of features without an entry are zeros."""
    entries, starts, stops = order(indices, features)
    named, weights = entries // indices.shape[1], values.reshape(-1)[entries].astype(jnp.float32)
    cuts, cut_stops = cuts_of(indices, entries, stops)
    after_cuts = _sum_runs(cuts, cut_stops, named, weights, g, None, interpret)
    return _sum_runs(starts, stops, named, weights, g, after_cuts, interpret)


class Slab(NamedTuple):
    """Columns that are walked together: the first, how many, and the copies of a row of them (first, how many)."""

    start: int
    size: int
    pieces: tuple[tuple[int, int], ...]


def _sum_runs(
    starts: Array, stops: Array, named: Array, weights: Array, rows: Array, after_cuts: Array | None, interpret: bool
) -> Array:
    """Per run of entries from start to stop, the sum of weight times named row.

    With `after_cuts` a run ends at its first cut, and the rest of it is the sum of the rows after its cuts.
    """
    width, padded = rows.shape[1], _aligned(rows)
    slabs = _slabs(padded.shape[1])
    scratch: list[Any] = [_ring(slabs, padded.dtype), plgpu.SMEM((_lanes(slabs[0]),), jnp.float32)]
    arguments = [starts, stops, named, weights, padded]
    if after_cuts is not None:
        scratch.append(_ring(slabs, jnp.float32))
        arguments.append(jnp.pad(after_cuts, ((0, 0), (0, padded.shape[1] - width))))
    body = partial(_sums, slabs=slabs, cut=after_cuts is not None)
    sums = _kernel(body, len(starts), (len(starts), padded.shape[1]), scratch, interpret)(*arguments)
    return sums[:, :width]


def _sums(starts: Any, stops: Any, named: Any, weights: Any, rows: Any, *refs: Any, slabs: Any, cut: bool) -> None:
    after_cuts, (out, ring, total, *second) = (refs[0], refs[1:]) if cut else (None, refs)
    run = jax.lax.axis_index("block")
    start, stop = starts[run], stops[run]
    chunk = jax.lax.div(start, CHUNK)
    first_stop = jnp.minimum(stop, (chunk + 1) * CHUNK) if cut else stop
    # The sum after the cut at (c + 1) CHUNK is row c.
    last = jnp.maximum(jax.lax.div(stop - 1, CHUNK), chunk) if cut else chunk

    def weighted(entry: Array, row: Array, sums: Array) -> Array:
        there = jnp.broadcast_to(named[entry] < rows.shape[0], row.shape)
        return sums + jnp.where(there, weights[entry] * row, 0.0)

    def added(cut: Array, row: Array, sums: Array) -> Array:
        return sums + row

    for number, slab in enumerate(slabs):
        zeros = plgpu.layout_cast(jnp.zeros(_lanes(slab), jnp.float32), _layout(slab))
        sums = _walk(start, first_stop, lambda entry: named[entry], weighted, rows, (number, slab), ring, zeros)
        if cut:
            sums = _walk(chunk, last, lambda cut: cut, added, after_cuts, (number, slab), second[0], sums)
        total[pl.ds(0, _lanes(slab))] = sums
        plgpu.commit_smem()
        for first, size in slab.pieces:
            plgpu.copy_smem_to_gmem(total.at[pl.ds(first, size)], out.at[run, pl.ds(slab.start + first, size)])
        plgpu.wait_smem_to_gmem(0)


def _dots(named: Any, g: Any, rows: Any, out: Any, ring: Any, ours: Any, *, slabs: Any) -> None:
    token, k = jax.lax.axis_index("block"), named.shape[0] // g.shape[0]
    for number, slab in enumerate(slabs):
        here = number, slab
        _fetch(g, token, here, ours, 0)
        mine = _arrived(here, ours, 0)

        def store(entry: Array, row: Array, dots: Array, slab: Slab = slab, mine: Array = mine) -> Array:
            before = out[entry] if slab.start else 0.0
            out[entry] = jnp.where(named[entry] < rows.shape[0], before + jnp.sum(_inside(mine * row, slab)), 0.0)
            return dots

        _walk(token * k, (token + 1) * k, lambda entry: named[entry], store, rows, here, ring, jnp.int32(0))


def _walk(start: Any, stop: Any, of: Any, use: Any, rows: Any, here: tuple[int, Slab], ring: Any, carry: Any) -> Any:
    """carry = use(entry, its row in float32, carry), from start to stop; `of` gives an entry's row number."""
    slots = ring[0].shape[0]

    def fetch(entry: Any) -> None:
        _fetch(rows, jnp.minimum(of(entry), rows.shape[0] - 1), here, ring, jax.lax.rem(entry - start, slots))

    for ahead in range(slots):
        pl.when(start + ahead < stop)(partial(fetch, start + ahead))

    def step(entry: Any, carry: Any) -> Any:
        carry = use(entry, _arrived(here, ring, jax.lax.rem(entry - start, slots)), carry)
        _release()
        pl.when(entry + slots < stop)(partial(fetch, entry + slots))
        return carry

    return jax.lax.fori_loop(start, stop, step, carry)


def _fetch(rows: Any, row: Any, here: tuple[int, Slab], ring: Any, slot: Any) -> None:
    """Start the copies of a slab of a row into a slot."""
    number, slab = here
    place, barriers = ring
    for first, size in slab.pieces:
        there = rows.at[row, pl.ds(slab.start + first, size)]
        plgpu.copy_gmem_to_smem(there, place.at[slot, pl.ds(first, size)], barriers[number].at[slot])


def _arrived(here: tuple[int, Slab], ring: Any, slot: Any) -> Array:
    """Wait for a slot; its row in float32. Lanes past the slab hold anything."""
    number, slab = here
    place, barriers = ring
    _wait(barriers[number].at[slot])
    found = plgpu.load(place.at[slot, pl.ds(0, _lanes(slab))], layout=_layout(slab))
    return found.astype(jnp.float32)


def _wait(barrier: Any) -> None:
    plgpu.barrier_wait(barrier)


def _release() -> None:
    """All threads have read their part of a slot: the copy engine may write there."""
    plgpu.commit_smem()


def _inside(row: Array, slab: Slab) -> Array:
    """The row with zeros past the slab."""
    if _lanes(slab) == slab.size:
        return row
    lane = plgpu.broadcasted_iota(jnp.int32, row.shape, 0, layout=_layout(slab))
    return jnp.where(lane < slab.size, row, 0.0)


def _slabs(width: int) -> list[Slab]:
    def pieces(size: int) -> tuple[tuple[int, int], ...]:
        return tuple((first, min(PIECE, size - first)) for first in range(0, size, PIECE))

    sizes = [(start, min(SLAB, width - start)) for start in range(0, width, SLAB)]
    return [Slab(start, size, pieces(size)) for start, size in sizes]


def _lanes(slab: Slab) -> int:
    return -(-slab.size // THREADS) * THREADS


def _layout(slab: Slab) -> Any:
    each = _lanes(slab) // THREADS
    return plgpu.Layout.WG_STRIDED((_lanes(slab),), vec_size=next(size for size in (4, 2, 1) if each % size == 0))


def _ring(slabs: list[Slab], dtype: Any, slots: int = 0) -> tuple[Any, tuple[Any, ...]]:
    """Shared memory for rows, and for every slab the barriers on which its copies arrive; as many slots as fit."""
    slots = slots or max(2, min(SLOTS, RING // (_lanes(slabs[0]) * jnp.dtype(dtype).itemsize)))
    barriers = tuple(plgpu.Barrier(num_arrivals=len(slab.pieces), num_barriers=slots) for slab in slabs)
    return plgpu.SMEM((slots, _lanes(slabs[0])), dtype), barriers


def _aligned(rows: Array) -> Array:
    """The rows, with columns of zeros where their number is not a multiple of `ALIGNED`."""
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % ALIGNED)))


def _kernel(body: Any, blocks: int, out: tuple[int, ...], scratch: Any, interpret: bool) -> Any:
    """A kernel of one warpgroup per block; its result is float32."""
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, jnp.float32),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )


def _too_old(kind: str) -> str:
    return f"{kind} is older than Hopper, whose copy engine these kernels use: take 'pallas_gpu' or 'xla'."
