"""The gradient of a sparse decoder's rows as a Pallas TPU kernel, without scatter and in a fixed order.

    outer_sum  dW[m] = sum over (n, j) with i_nj = m of v_nj g_n

The N k entries are sorted by feature and cut into chunks of `CHUNK`; the features are cut into blocks of `BLOCK` rows
of dW. A step of the grid is a chunk and a block that it reaches into (or a block without entries, which becomes zeros):

    dW[block] += V G,    V[m, e] = v_e where entry e has feature m, else 0,    G[e] = g of the token of e

G is gathered by one copy per entry from HBM, `RING` - 1 chunks ahead of its use. All steps of a block are neighbours,
so that its rows stay in VMEM until they are complete, and each is written once. V goes to the matrix unit as three
parts of bfloat16 that sum to its float32 numbers: products are exact where g is bfloat16, and sums are float32. Numbers
that are not finite spread to the rows of their chunk and block.

What is sorted is (feature, token) in one 32-bit key, where both fit: a sort of one array compiles in 2 seconds, of
pairs in 5 to 12. The value of an entry is found in the kernel: what a copy moves is g_n together with the indices and
values of token n, and v_e is the sum of the values whose index is the feature of e. (Gathering 262,144 single numbers
would take 1.5 ms by XLA's own estimate for v5e.) A feature that a token has twice is thus summed at its first entry;
the others count nothing.

No copy can move a single row of bfloat16: columns c and c + d/2 of such a g go into one 32-bit word.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

CHUNK = 128  # entries that one matmul sums, and that are waited for together
BLOCK = 64  # features of a block: fewer would make more steps, more would be idle rows of the matrix unit
RING = 4  # chunks in VMEM
COLUMNS = 512  # columns of dW that one matmul makes
LANES = 128
VMEM = 48 * 2**20  # what the kernel may ask for; v5p has 64 MiB


def outer_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    *,
    interpret: Any = False,
) -> Float[Array, "features d"]:
    """The gradient of `gather_sum` in its rows; float32. Rows of features without an entry are zeros."""
    return _call(values, indices, g, features, False, interpret)[0]


def outer_and_value_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    *,
    over_data: Callable[[Array], Array] = lambda of_shard: of_shard,
    interpret: Any = False,
) -> tuple[Float[Array, "rows d"], Float[Array, " rows"]]:
    """`outer_sum`, and per feature the sum of its values: the gradients of an encoder's rows and biases in one.

    `over_data` sums the results of several shards.
    """
    total, sums = _call(values, indices, g, features, True, interpret)
    return over_data(total), over_data(sums.reshape(-1)[:features])


def _call(values: Array, indices: Array, g: Array, features: int, with_sums: bool, interpret: Any) -> tuple[Array, ...]:
    """dW, and if asked for the sums of the values, by block."""
    width = g.shape[1]
    of_entry, tokens = order(indices, features)
    again = (of_entry == jnp.roll(of_entry, 1)) & (tokens == jnp.roll(tokens, 1)) & (jnp.arange(len(tokens)) > 0)
    padding = (0, -len(tokens) % CHUNK)
    of_entry = jnp.pad(of_entry, padding, constant_values=features).reshape(-1, 1, CHUNK)
    matched = jnp.where(jnp.pad(again, padding).reshape(of_entry.shape), features, of_entry)
    tokens = jnp.pad(tokens, padding).reshape(of_entry.shape)
    chunk_of, block_of = steps(of_entry[:, 0], features)
    codes = _codes(values, indices)
    words = jnp.concatenate([_words(g), codes], axis=1)

    def entry(ahead: int, **where: Any) -> pl.BlockSpec:
        def at(step: Array, chunk_of: Any, block_of: Any) -> tuple[Array, int, int]:
            return jnp.clip(chunk_of[step] + ahead, 0, len(tokens) - 1), 0, 0

        return pl.BlockSpec((1, 1, CHUNK), at, **where)

    run = pl.pallas_call(
        _kernel(features, width, g.dtype == jnp.bfloat16, codes.shape[1], interpret),
        cost_estimate=pl.CostEstimate(
            flops=2 * indices.size * width,
            bytes_accessed=4 * (tokens.size * words.shape[1] + features * width),
            transcendentals=0,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(chunk_of),),
            in_specs=[
                entry(RING - 1, memory_space=pltpu.SMEM),
                entry(0),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=[
                pl.BlockSpec((BLOCK, width), lambda step, chunk_of, block_of: (block_of[step], 0)),
                pl.BlockSpec((1, 1, BLOCK), lambda step, chunk_of, block_of: (block_of[step], 0, 0)),
            ][: 1 + with_sums],
            scratch_shapes=[
                pltpu.VMEM((RING, CHUNK, words.shape[1]), jnp.int32),
                pltpu.SemaphoreType.DMA((RING,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((features, width), jnp.float32),
            jax.ShapeDtypeStruct((pl.cdiv(features, BLOCK), 1, BLOCK), jnp.float32),
        ][: 1 + with_sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="outer_sum",
    )
    return tuple(run(chunk_of, block_of, tokens, matched, words))


def order(indices: Int[Array, "tokens k"], features: int) -> tuple[Int[Array, " entries"], Int[Array, " entries"]]:
    """The features of all entries in rising order (`features`: no row), and their tokens, rising within a feature.

    Two calls with the same indices compile to one sort: both weight gradients of a step share it.
    """
    tokens, k = indices.shape
    of_entry = jnp.minimum(indices, features).reshape(-1)
    token = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), k)
    bits = (tokens - 1).bit_length()
    if features.bit_length() + bits > 32:
        of_entry, token = jax.lax.sort((of_entry, token), num_keys=2)
        return of_entry, token
    keys = jax.lax.sort((of_entry.astype(jnp.uint32) << bits) | token.astype(jnp.uint32), is_stable=False)
    return (keys >> bits).astype(jnp.int32), (keys & ((1 << bits) - 1)).astype(jnp.int32)


def steps(of_entry: Int[Array, "chunks entries"], features: int) -> tuple[Int[Array, " steps"], Int[Array, " steps"]]:
    """The chunk and the block of each step of the grid.

    Chunks and blocks begin at places in the row of sorted entries. Passing all these places from left to right (that of
    a chunk before that of a block, where they meet), the step after each has the chunk and the block begun last. Block
    b is passed after b blocks and as many chunks as begin no later: one more than lie entirely before it.
    Before the first step, RING - 1 steps of chunks below zero start copies. The last step is repeated in place of
    chunks without a row, and adds nothing again.
    """
    chunks, blocks = of_entry.shape[0], pl.cdiv(features, BLOCK)
    block = jnp.arange(blocks, dtype=jnp.int32)
    before = jnp.sum(of_entry[None, :, -1] < block[:, None] * BLOCK, axis=1, dtype=jnp.int32)
    passed = block + jnp.minimum(before + 1, chunks)
    place = jnp.arange(1, chunks + blocks, dtype=jnp.int32)
    block_of = jnp.sum(passed[None, :] <= place[:, None], axis=1, dtype=jnp.int32) - 1
    last = jnp.maximum(jnp.sum(of_entry[:, 0] < features, dtype=jnp.int32) - 1, 0)
    chunk_of = jnp.minimum(place - block_of - 1, last)
    ahead = jnp.arange(1 - RING, 0, dtype=jnp.int32)
    return jnp.concatenate([ahead, chunk_of]), jnp.concatenate([jnp.zeros_like(ahead), block_of])


def _kernel(features: int, width: int, packed: bool, codes: int, interpret: Any) -> Any:
    """One step: add V G to the block; if this is the first step of its chunk, start the copies of a later one."""

    def kernel(chunk_of: Any, block_of: Any, tokens: Any, matched: Any, words: Any, out: Any, *rest: Any) -> None:
        *sums, ring, arrived = rest
        step = pl.program_id(0)
        chunk, block = chunk_of[step], block_of[step]
        before = jnp.maximum(step - 1, 0)
        first = (step == 0) | (chunk_of[before] != chunk)
        empty = (step == 0) | (block_of[before] != block)
        more = first & (chunk + RING - 1 <= chunk_of[pl.num_programs(0) - 1])

        def start() -> None:
            slot = (chunk + RING - 1) % RING

            def one(entry: Array, _: None) -> None:
                target = ring.at[slot, pl.ds(entry, 1)]
                pltpu.make_async_copy(words.at[pl.ds(tokens[0, 0, entry], 1)], target, arrived.at[slot]).start()

            jax.lax.fori_loop(0, CHUNK, one, None, unroll=1 if interpret else CHUNK)

        def wait() -> None:
            whole = ring.at[chunk % RING]  # only the number of bytes matters
            pltpu.make_async_copy(whole, whole, arrived.at[chunk % RING]).wait()

        def add() -> None:
            gathered = ring.at[chunk % RING]
            feature = matched[0]
            value = _lanes(_value(gathered[:, gathered.shape[1] - codes :], _column(feature)))
            row = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, CHUNK), 0) + block * BLOCK
            # A feature equal to `features` may lie in the last block: beyond the rows that are written.
            weights = jnp.where(row == feature, value, 0.0)
            parts = _parts(weights)
            for array in sums:
                array[0] += _lanes(jnp.sum(weights, axis=1, keepdims=True))
            for columns, g in _pieces(gathered, gathered.shape[1] - codes, width, packed):
                if packed:
                    out[:, columns] += sum(_dot(part, g) for part in parts)
                else:
                    out[:, columns] += _dot(weights, g, precision="highest")

        @pl.when(empty)
        def _() -> None:
            for array in (out, *sums):
                array[...] = jnp.zeros_like(array)

        @pl.when(first & (chunk >= 0))
        def _() -> None:
            wait()

        @pl.when(more & (chunk >= 0))  # in this order the scheduler starts copies while the matrix unit works
        def _() -> None:
            add()
            start()

        @pl.when(more & (chunk < 0))
        def _() -> None:
            start()

        @pl.when(jnp.logical_not(more) & (first | empty) & (chunk >= 0))
        def _() -> None:
            add()

    return kernel


def _words(g: Array) -> Array:
    """Rows of whole lanes as 32-bit words."""
    if g.dtype != jnp.bfloat16:
        padded = jnp.pad(g.astype(jnp.float32), ((0, 0), (0, -g.shape[1] % LANES)))
        return jax.lax.bitcast_convert_type(padded, jnp.int32)
    padded = jnp.pad(g, ((0, 0), (0, -g.shape[1] % (2 * LANES))))
    low, high = jnp.split(jax.lax.bitcast_convert_type(padded, jnp.uint16).astype(jnp.uint32), 2, axis=1)
    return jax.lax.bitcast_convert_type(low | (high << 16), jnp.int32)


def _codes(values: Array, indices: Array) -> Array:
    """Per token its indices, then its values, as 32-bit words; together they fill whole lanes."""
    padding = (0, 0), (0, -values.shape[1] % (LANES // 2))
    bits = jax.lax.bitcast_convert_type(jnp.pad(values.astype(jnp.float32), padding), jnp.int32)
    return jnp.concatenate([jnp.pad(indices, padding, constant_values=-1), bits], axis=1)


def _value(codes: Array, feature: Array) -> Array:
    """[entries, 1]: the sum of the values whose index is the feature of the entry."""
    indices, values = jnp.split(codes, 2, axis=1)
    found = jnp.where(indices == feature, jax.lax.bitcast_convert_type(values, jnp.float32), 0.0)
    return jnp.sum(found, axis=1, keepdims=True)


def _pieces(gathered: Any, size: int, width: int, packed: bool) -> list[tuple[slice, Array]]:
    """Columns of dW, a few at a time, with those of G."""
    pieces = [slice(start, min(start + COLUMNS, size)) for start in range(0, size, COLUMNS)]
    found = []
    for piece in pieces:
        words = gathered[:, piece]
        for shift, offset in ((16, 0), (0, size)) if packed else ((None, 0),):
            columns = slice(piece.start + offset, min(piece.stop + offset, width))
            if columns.start >= columns.stop:
                continue
            bits = words[:, : columns.stop - columns.start]
            if packed:
                bits = (bits << shift) & -0x10000
            g = jax.lax.bitcast_convert_type(bits, jnp.float32)
            found.append((columns, g.astype(jnp.bfloat16) if packed else g))
    return found


def _parts(array: Array) -> list[Array]:
    """Three bfloat16 arrays that sum to a float32 array, the smallest first."""
    parts: list[Array] = []
    for _ in range(3):
        parts.insert(0, array.astype(jnp.bfloat16))
        array = array - parts[0].astype(jnp.float32)
    return parts


def _dot(a: Array, b: Array, **options: Any) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32, **options)


def _diagonal(size: int) -> Array:
    across, down = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (1, 0))
    return across == down


def _column(lanes: Array) -> Array:
    """[1, n] of integers below 2^24 as [n, 1]."""
    wide = jnp.where(_diagonal(lanes.shape[1]), lanes.astype(jnp.float32), 0)
    return jnp.sum(wide, axis=1, keepdims=True).astype(jnp.int32)


def _lanes(column: Array) -> Array:
    """[n, 1] as [1, n]."""
    return jnp.sum(jnp.where(_diagonal(column.shape[0]), column, 0), axis=0, keepdims=True)
