"""The passes that read selected rows, as Pallas TPU kernels: rows move from HBM one by one, many at a time.

    gather_sum  y_n    = sum_j v_nj W[i_nj]
    sampled_dot p_nj   = g_n . W[i_nj]

One copy moves one row into a unit of at most `UNIT` rows in VMEM: all rows of a few tokens, or a part of those of one.
A ring of `RING` units keeps the copies of three on their way while one is computed with; a unit is waited for at once.
The units of the ring have fixed places, so that starting copies (scalar work, 8 bundles a row) and computing (vector
work) share bundles.

HBM holds bfloat16 matrices in pairs of rows: a 32-bit word has an entry of row 2r in its low half, of row 2r + 1 in
its high half, and no copy can start inside a pair. So W is read as words (the same bytes, no copy of W), a pair per
index, and the half is taken by a shift: exact, for twice the bytes of a row. A copy of W with one row after the other
would save those, and cost a temporary array of the size of W. An odd number of bfloat16 rows is padded by one.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

UNIT = 64  # rows that are waited for together and computed with
RING = 4  # units in VMEM: a copy takes about as long as starting the next 150 does
SCALARS = 2**14  # indices per grid step, at most: they lie in the small scalar memory
BLOCK_BYTES = 4 * 2**20  # of the tokens of a grid step, at most
COLUMNS = 512  # columns that one partial sum holds in registers
LANES = 128  # of a vector register
VMEM = 48 * 2**20  # what a kernel may ask for; v5p has 64 MiB


class Plan(NamedTuple):
    """How N k indices become units of rows, and units become grid steps."""

    k: int  # rows of a token that are moved in one unit
    group: int  # places that they have there: a multiple of 8
    parts: int  # units of a token: 1, but where k > UNIT
    together: int  # tokens of a unit
    tokens: int  # tokens of a grid step
    steps: int

    @property
    def rows(self) -> int:
        return self.together * self.group

    @property
    def units(self) -> int:
        return self.tokens * self.parts // self.together


def gather_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    rows: Float[Array, "features d"],
    *,
    interpret: Any = False,
) -> Float[Array, "tokens d"]:
    """Per token, the sum of the rows at its indices, weighted by its values; float32, in a fixed order."""
    tokens, width = indices.shape[0], rows.shape[1]
    plan = _plan(indices, rows)
    weights = _by_unit(jnp.where(indices < rows.shape[0], values, 0).astype(jnp.float32), plan, 0)
    block = pl.BlockSpec((plan.tokens, width), lambda step: (step, 0))

    def consume(unit: Array, row: Callable[..., Array], refs: tuple[Any, ...]) -> None:
        weights, out = refs
        weight = _column(weights[0, pl.ds(unit, 1), :])
        for token in range(plan.together):
            for columns in _slices(width):
                total = jnp.zeros((8, columns.size), jnp.float32)
                for first in range(token * plan.group, (token + 1) * plan.group, 8):
                    total += weight[first : first + 8] * row(first, columns)
                summed = jnp.sum(total, axis=0, keepdims=True)
                place = pl.ds(unit // plan.parts * plan.together + token, 1), columns
                if plan.parts > 1:
                    summed += jnp.where(unit % plan.parts == 0, 0.0, out[place])
                out[place] = summed

    return _call(consume, plan, indices, rows, (weights,), block, (tokens, width), interpret)


def sampled_dot(
    g: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    indices: Int[Array, "tokens k"],
    *,
    interpret: Any = False,
) -> Float[Array, "tokens k"]:
    """Per token, the inner products of g with the rows at its indices; float32, in a fixed order."""
    tokens, k = indices.shape
    width = rows.shape[1]
    plan = _plan(indices, rows)
    block = pl.BlockSpec((1, plan.units, plan.rows), lambda step: (step, 0, 0))

    def consume(unit: Array, row: Callable[..., Array], refs: tuple[Any, ...]) -> None:
        g, out = refs
        products = []
        for token in range(plan.together):
            place = pl.ds(unit // plan.parts * plan.together + token, 1)
            for first in range(token * plan.group, (token + 1) * plan.group, 8):
                total = jnp.zeros((8, 1), jnp.float32)
                for columns in _slices(width):
                    total += jnp.sum(row(first, columns) * g[place, columns], axis=1, keepdims=True)
                products.append(total)
        out[0, pl.ds(unit, 1), :] = _lanes(jnp.concatenate(products))

    shape = plan.steps, plan.units, plan.rows
    out = _call(consume, plan, indices, rows, (g,), block, shape, interpret)
    return out.reshape(plan.steps * plan.tokens, plan.parts * plan.group)[:tokens, :k]


def _plan(indices: Array, rows: Array) -> Plan:
    count, k = indices.shape
    parts = pl.cdiv(k, UNIT)
    group = pl.cdiv(k, 8 * parts) * 8
    together = UNIT // group
    whole = max(8, RING * together)  # tokens of full rounds of the ring
    fitting = min(SCALARS // (group * parts), BLOCK_BYTES // (4 * rows.shape[1]))
    tokens = min(max(1, fitting // whole), pl.cdiv(count, whole)) * whole
    return Plan(min(k, group), group, parts, together, tokens, pl.cdiv(count, tokens))


def _by_unit(array: Array, plan: Plan, fill: int) -> Array:
    """[tokens, k] as [steps, units, rows]."""
    tokens, k = array.shape
    padding = (0, plan.steps * plan.tokens - tokens), (0, plan.parts * plan.group - k)
    return jnp.pad(array, padding, constant_values=fill).reshape(plan.steps, plan.units, plan.rows)


def _call(
    consume: Callable[..., None],
    plan: Plan,
    indices: Array,
    rows: Array,
    operands: tuple[Array, ...],
    out_block: pl.BlockSpec,
    out_shape: tuple[int, ...],
    interpret: Any,
) -> Array:
    """Run `consume(unit, row, refs)` on every unit, once its rows are in VMEM; row(first, columns) reads eight."""
    features, width = rows.shape
    packed = rows.dtype == jnp.bfloat16
    if packed and features % 2:
        rows = jnp.pad(rows, ((0, 1), (0, 0)))
    if packed and isinstance(interpret, pltpu.InterpretParams):  # it cannot read a bfloat16 array as words
        rows = jax.lax.bitcast_convert_type(rows.reshape(-1, 2, width).swapaxes(1, 2), jnp.int32)
    clamped = jnp.minimum(indices, features - 1)
    places = _by_unit(clamped // 2 if packed else clamped, plan, 0).reshape(plan.steps, 1, -1)
    widened = [(n, array) for n, array in enumerate(operands) if array.dtype == jnp.bfloat16]
    halves = _by_unit(jnp.where(indices < features, indices % 2, 2), plan, 2).astype(jnp.float32)

    def kernel(places: Any, halves: Any, rows: Any, *rest: Any) -> None:
        *refs, ring, arrived = rest[: len(rest) - len(widened)]
        for (position, _), wide in zip(widened, rest[len(rest) - len(widened) :], strict=True):
            wide[...] = refs[position][...].astype(jnp.float32)  # a single row of bfloat16 cannot be read
            refs[position] = wide
        words = rows.bitcast(jnp.int32) if rows.dtype == jnp.bfloat16 else rows

        def start(unit: Array | int, slot: Array | int) -> None:
            def one(token: int, j: Array, _: None) -> None:
                row = token * plan.group + j
                place = places[0, 0, unit * plan.rows + row]
                target = ring.at[slot, pl.ds(row, 1)]
                pltpu.make_async_copy(words.at[pl.ds(place, 1)], target, arrived.at[slot]).start()

            for token in range(plan.together):  # unrolled: targets are then constants; but an interpreter drowns in it
                jax.lax.fori_loop(0, plan.k, partial(one, token), None, unroll=1 if interpret else plan.k)

        def wait(slot: Array | int) -> None:
            moved = plan.together * plan.k
            for size in [
                moved // 8 * 8,
                *[1] * (moved % 8),
            ]:  # whole tiles, then single rows: no other slice is allowed
                if size:
                    part = ring.at[slot, pl.ds(0, size)]  # only the number of bytes matters
                    pltpu.make_async_copy(part, part, arrived.at[slot]).wait()

        def use(unit: Array, slot: Array | int) -> None:
            half = _column(halves[0, pl.ds(unit, 1), :])

            def row(first: int, columns: pl.Slice) -> Array:
                return _row(ring[slot, first : first + 8, columns], half[first : first + 8], packed)

            consume(unit, row, tuple(refs))

        def step(number: Array, slot: Array | int, _: None) -> None:
            unit = number * RING + slot
            wait(slot)
            start(jnp.minimum(unit + RING - 1, plan.units - 1), (slot + RING - 1) % RING)
            use(unit, slot)

        def round_(number: Array, _: None) -> None:
            jax.lax.fori_loop(0, RING, partial(step, number), None, unroll=1 if interpret else RING)

        jax.lax.fori_loop(0, RING - 1, lambda unit, _: start(unit, unit), None)
        jax.lax.fori_loop(0, plan.units // RING, round_, None)
        jax.lax.fori_loop(0, RING - 1, lambda slot, _: wait(slot), None)  # started without a use: cheaper than a branch

    def spec(array: Array) -> pl.BlockSpec:
        if array.ndim == 2:  # one row per token
            return pl.BlockSpec((plan.tokens, array.shape[1]), lambda step: (step, 0))
        return pl.BlockSpec((1, *array.shape[1:]), lambda step: (step, 0, 0))

    moved = plan.steps * plan.units * plan.together * plan.k
    return pl.pallas_call(
        kernel,
        cost_estimate=pl.CostEstimate(
            flops=2 * moved * width, bytes_accessed=4 * (moved * width + math.prod(out_shape)), transcendentals=0
        ),
        grid=(plan.steps,),
        in_specs=[
            pl.BlockSpec((1, 1, places.shape[2]), lambda step: (step, 0, 0), memory_space=pltpu.SMEM),
            spec(halves),
            pl.BlockSpec(memory_space=pltpu.HBM),
            *map(spec, operands),
        ],
        out_specs=out_block,
        out_shape=jax.ShapeDtypeStruct(out_shape, jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((RING, plan.rows, width), jnp.int32 if packed else rows.dtype),
            pltpu.SemaphoreType.DMA((RING,)),
            *(pltpu.VMEM((plan.tokens, array.shape[1]), jnp.float32) for _, array in widened),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM, disable_bounds_checks=True
        ),
        interpret=interpret,
        name=consume.__qualname__.split(".")[0],
    )(places, halves, rows, *operands)


def _row(words: Array, halves: Array, packed: bool) -> Array:
    """Rows as float32 out of what was moved; zeros where the half is 2."""
    if not packed:
        return jnp.where(halves < 2, words, 0)
    shift = jnp.where(halves == 0, 16, 0)
    keep = jnp.where(halves < 2, -0x10000, 0)
    return jax.lax.bitcast_convert_type((words << shift) & keep, jnp.float32)


def _slices(width: int) -> list[Any]:
    """Slices of `COLUMNS` columns; a rest of one register or less goes to the slice before it.

    The compiler broadcasts along such a rest over its whole row of registers, and then cannot place it (libtpu 0.0.42).
    """
    starts = list(range(0, width, COLUMNS))
    if len(starts) > 1 and width - starts[-1] <= LANES:
        starts.pop()
    return [pl.ds(start, stop - start) for start, stop in pairwise([*starts, width])]


def _diagonal(size: int) -> Array:
    across, down = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (1, 0))
    return across == down


def _column(lanes: Array) -> Array:
    """[1, n] as [n, 1]."""
    return jnp.sum(jnp.where(_diagonal(lanes.shape[1]), lanes, 0), axis=1, keepdims=True)


def _lanes(column: Array) -> Array:
    """[n, 1] as [1, n]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0), axis=0, keepdims=True)
