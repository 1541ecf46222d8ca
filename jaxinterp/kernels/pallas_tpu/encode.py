"""The encoder and the selection of its k largest outputs as one Pallas TPU kernel; exact, forward only, on one device.

    v_n, i_n = the k largest of a_n = x_n W^T + b, greatest first, ties to the lowest index

Pre-activations a (N x M) never leave the core. Feature m belongs to bucket m mod L; while tiles of W stream by, each
bucket of each token keeps its best two or three values, the tiles they came from, and the greatest value it dropped:
ten vector operations for each register of 1,024 pre-activations and two kept values, which stand in the same block of
code as the matmul of the next columns and hide in its empty slots (`pending` carries the last columns of a tile over
to the next grid step). After the last tile the buckets, which are sorted lists, are merged two by two: into 128 (one
per lane), then, transposed, into 8 (one per sublane), and k rounds take the greatest head. Merging keeps as many of a
list as matter (`merge.kept_levels`) and remembers the greatest value dropped.

Certificate: a token is exact if its k-th value is greater than all that it dropped or left over. Buckets lose one of
the k best where depth + 1 of them share a bucket: C(k, depth + 1) / L^depth of the tokens, if features fall into
buckets at random; `encode_plan` keeps that below half a percent. All other tokens, among them those with a tie at the
k-th place and those with a NaN (max and min hand it on to what is dropped), are selected again from their whole row of
pre-activations, `REDONE` at a time. Tokens with fewer than k allowed features (bias -inf elsewhere) need that not.

Where many tokens tie at the k-th place (x = 0 and one bias for all, say) every token is redone: right, but slow.
W is not copied: rows past the end of it in the last tile are overwritten in VMEM, and have bias -inf.

Scheduled bundles for v5e (`python -m benchmarks.tpu_bundles`, which says how they are counted), bfloat16, as a multiple
of those of x W^T + b written as bfloat16 with the same tiles; whole: with the merging, once for every 256 tokens:

    d, M, k             grid step   whole
    768, 24576, 32          1.09    1.21
    2304, 65536, 64         1.11    1.15
    4096, 131072, 64        0.95    0.96
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.kernels.certificate import again, filled, placed
from jaxinterp.kernels.pallas_tpu import merge
from jaxinterp.kernels.pallas_tpu.merge import Lists

LANES, ROWS = 128, 8  # of a vector register
STEP = 256  # tokens of one grid step
CHUNK = 16  # tokens that are absorbed together, written out as one block of code
BUCKETS = 1024
LARGEST_K = 128  # more take longer to merge than to multiply
VMEM = 48 * 2**20  # what a kernel may ask for; v5p has 64 MiB
REDONE = 64  # tokens that are selected again at a time: on a v5e, W takes as long to read as 240 to multiply
GROUP = 128  # features in a group of the two-stage selection of those: a row of registers


class Plan(NamedTuple):
    """Tiles of the kernel."""

    tokens: int  # of a block whose buckets stay in VMEM: a multiple of STEP
    features: int  # of a tile
    columns: int  # of a tile, multiplied while the columns before them are absorbed
    depth: int  # values that a bucket keeps


def encode_plan(*, tokens: int, features: int, k: int, width: int, itemsize: int = 2) -> Plan:
    """The tiles for a shape; `itemsize` is the bytes of an entry of x and W.

    Raises:
      UserError: k, the width or the number of features is larger than the kernel can do.
    """
    reason = refusal("encode", tokens=tokens, features=features, k=k, width=width, itemsize=itemsize)
    if reason:
        raise UserError(reason)
    return next(
        plan for plan in _plans(tokens, features, k, width * itemsize) if _vmem(plan, width * itemsize, k) <= VMEM
    )


def refusal(of: str, *, tokens: int, features: int, k: int, width: int, itemsize: int = 4) -> str | None:
    """Why the pass cannot run at a shape; None where it can."""
    if k > LARGEST_K:
        return f"k={k} is more than {LARGEST_K}, which this kernel selects at most: take 'xla'."
    if features > 2**24:
        return f"features={features} is more than float32 counts: take 'xla', or spread the features over devices."
    if all(_vmem(plan, width * itemsize, k) > VMEM for plan in _plans(tokens, features, k, width * itemsize)):
        return f"rows of width={width} do not fit the memory of a core: take 'xla'."
    return None


def encode(
    x: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    k: int,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of x W^T + b per token, in float32. A feature with bias -inf comes after all others.

    Raises:
      UserError: the kernel cannot do this shape (`refusal`).
    """
    values, indices, _ = encode_counted(x, rows, bias, k, interpret=interpret)
    return values, indices


def encode_counted(
    x: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    k: int,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Int[Array, ""]]:
    """`encode`, and how many tokens were selected again because the buckets could not vouch for them."""
    dtype = jnp.promote_types(x.dtype, rows.dtype)
    x, rows, bias = x.astype(dtype), rows.astype(dtype), bias.astype(jnp.float32)
    shape = {"tokens": x.shape[0], "features": rows.shape[0], "k": k, "width": x.shape[1]}
    plan = encode_plan(**shape, itemsize=dtype.itemsize)
    values, indices, left = _fused(x, rows, bias, k, plan, interpret)
    worst = values[:, -1]
    few = (worst == -jnp.inf) & (left == -jnp.inf)
    failed = ~((worst > left) | few)
    tied = jnp.any((values[:, 1:] == values[:, :-1]) & ~failed[:, None])
    indices = jax.lax.cond(tied, _by_index, lambda _, indices: indices, values, indices)
    indices = jax.lax.cond(jnp.any(few), filled, lambda _, indices: indices, values, indices)
    values, indices = again(x, failed, values, indices, partial(_from_all, rows, bias, k), REDONE)
    return values, indices, jnp.sum(failed, dtype=jnp.int32)


def _plans(tokens: int, features: int, k: int, row_bytes: int) -> list[Plan]:
    """Tiles that may be had, the best first (measured: benchmarks/tpu_bundles.py)."""
    wide = row_bytes > 2048
    depth = 3 if wide else 2
    while merge.lost(k, BUCKETS, depth) > 0.005:
        depth += 1
    tiles = [(1024, 512), (512, 256), (256, 256)] if wide else [(2048, 512), (1024, 512), (512, 256)]
    if row_bytes > 6144:
        tiles = tiles[1:]
    blocks = [2 * STEP, STEP] if tokens > STEP else [STEP]
    return [Plan(block, *tile, depth) for tile in tiles for block in blocks if tile[0] < 2 * max(features, BUCKETS)]


def _vmem(plan: Plan, row_bytes: int, k: int) -> int:
    """Bytes of a plan: x and W twice (one is fetched, one is used), buckets, columns, lists, results."""
    buckets = plan.tokens * BUCKETS * (2 * plan.depth + 1)
    columns = plan.tokens * plan.columns + STEP * (plan.features - plan.columns)
    lists = (2 * _levels(plan.depth, k) + 1) * STEP * LANES
    results = 4 * (k + ROWS) * plan.tokens
    return 2 * (plan.tokens + plan.features) * row_bytes + 4 * (buckets + columns + lists + results)


def _levels(depth: int, k: int) -> int:
    """Values of a list when the buckets are merged into one for each lane."""
    levels, buckets = merge.power(depth), BUCKETS
    while buckets > LANES:
        buckets //= 2
        levels = 2 * levels if merge.kept_levels(k, buckets) > levels else merge.kept_levels(k, buckets)
    return levels


def _fused(
    x: Array, rows: Array, bias: Array, k: int, plan: Plan, interpret: Any
) -> tuple[Array, Array, Float[Array, " tokens"]]:
    """The k best of what the buckets hold, and the greatest value that they dropped or that was left over."""
    (tokens, width), features = x.shape, rows.shape[0]
    tiles = pl.cdiv(features, plan.features)
    bias = jnp.pad(bias, (0, tiles * plan.features - features), constant_values=-jnp.inf)[None]
    height = pl.cdiv(k + 1, ROWS) * ROWS
    result = pl.BlockSpec((height, plan.tokens), lambda block, tile, step: (0, block))
    state = plan.depth, plan.tokens, BUCKETS
    columns = [(plan.tokens, plan.columns)] + [(STEP, plan.columns)] * (plan.features // plan.columns - 1)
    passes = 6 if x.dtype == jnp.float32 else 1  # bfloat16 products that make a float32 one
    blocks = pl.cdiv(tokens, plan.tokens)
    values, indices = pl.pallas_call(
        partial(_kernel, plan=plan, k=k, end=features % plan.features, chunk=STEP if interpret else CHUNK),
        cost_estimate=pl.CostEstimate(
            flops=2 * passes * tokens * features * width,
            bytes_accessed=x.nbytes + blocks * rows.nbytes + 8 * height * tokens,
            transcendentals=0,
        ),
        grid=(blocks, tiles, plan.tokens // STEP),
        in_specs=[
            pl.BlockSpec((plan.tokens, width), lambda block, tile, step: (block, 0)),
            pl.BlockSpec((plan.features, width), lambda block, tile, step: (tile, 0)),
            pl.BlockSpec((1, plan.features), lambda block, tile, step: (0, tile)),
        ],
        out_specs=[result, result],
        out_shape=[jax.ShapeDtypeStruct((height, tokens), dtype) for dtype in (jnp.float32, jnp.int32)],
        scratch_shapes=[
            pltpu.VMEM(state, jnp.float32),
            pltpu.VMEM(state, jnp.int32),
            pltpu.VMEM(state[1:], jnp.float32),
            pltpu.VMEM((2, _levels(plan.depth, k), STEP, LANES), jnp.float32),
            pltpu.VMEM((STEP, LANES), jnp.float32),
            *[pltpu.VMEM(shape, jnp.float32) for shape in columns],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="encode_topk",
    )(x, rows, bias)
    return values[:k].T, indices[:k].T, values[k]


def _kernel(
    x, rows, bias, values, indices, best, tiles, dropped, lists, lost, pending, *others,
    plan: Plan, k: int, end: int, chunk: int,
) -> None:  # fmt: skip
    """One tile of features for STEP tokens. Buckets: `best`, `tiles` [depth, tokens, L] and `dropped` [tokens, L]."""
    tile, step = pl.program_id(1), pl.program_id(2)
    own = pl.ds(pl.multiple_of(step * STEP, STEP), STEP)
    x, best, tiles, dropped, pending = x.at[own], best.at[:, own], tiles.at[:, own], dropped.at[own], pending.at[own]
    values, indices = values.at[:, own], indices.at[:, own]
    blocks = [*others, pending]
    turns = max(1, BUCKETS // plan.features)  # tiles that fill the buckets once

    def absorb(part: int, tile: Array) -> None:
        """The pre-activations of some columns of a tile into their buckets."""
        first = part * plan.columns
        at = first % BUCKETS + (
            pl.multiple_of(jax.lax.rem(tile, turns) * plan.features, plan.features) if turns > 1 else 0
        )
        number = jax.lax.div(tile, turns) if turns > 1 else tile * (plan.features // BUCKETS) + first // BUCKETS
        for row in range(0, STEP, chunk):
            here = pl.ds(row, chunk), pl.ds(at, plan.columns)
            value, place = blocks[part][row : row + chunk, :], number
            held = [(best[level, *here], tiles[level, *here]) for level in range(plan.depth)]
            for level, (old, old_place) in enumerate(held):
                greater = value > old
                held[level] = jnp.maximum(old, value), jnp.where(greater, place, old_place)
                value, place = jnp.minimum(old, value), jnp.where(greater, old_place, place)
            dropped[here] = jnp.maximum(dropped[here], value)
            for level in range(plan.depth):
                best[level, *here], tiles[level, *here] = held[level]

    @pl.when(tile == 0)
    def _() -> None:
        for array in (*(best.at[level] for level in range(plan.depth)), dropped, pending):
            array[...] = jnp.full(array.shape, -jnp.inf, jnp.float32)

    if end:

        @pl.when((tile == pl.num_programs(1) - 1) & (step == 0))
        def _() -> None:
            rows[end:, :] = jnp.zeros((plan.features - end, rows.shape[1]), rows.dtype)

    tokens = x[...]  # read once: reading it for each part takes more bundles
    for part in range(len(blocks)):
        absorb((part - 1) % len(blocks), tile if part else jnp.maximum(tile - 1, 0))
        at = slice(part * plan.columns, (part + 1) * plan.columns)
        blocks[part][...] = _product(tokens, rows[at, :]) + bias[:, at]

    @pl.when(tile == pl.num_programs(1) - 1)
    def _() -> None:
        absorb(len(blocks) - 1, tile)
        fold = partial(_fold, best, tiles, dropped, lists, lost, k=k)
        jax.lax.fori_loop(0, STEP // ROWS, fold, None)
        _take(lists, lost, values, indices, k)


def _fold(best, tiles, dropped, lists, lost, step: Array, _: None, *, k: int) -> None:
    """The buckets of a few tokens, merged into one list for each lane."""
    here = pl.ds(pl.multiple_of(step * ROWS, ROWS), ROWS)
    features = tiles[:, here, :] * BUCKETS + jax.lax.broadcasted_iota(jnp.int32, (1, ROWS, BUCKETS), 2)
    held = best[:, here, :], features.astype(jnp.float32)
    (values, places), lost[here, :] = merge.merged(held, dropped[here, :], LANES, 1, k)
    lists[0, :, here, :], lists[1, :, here, :] = values, places


def _take(lists, lost, values, indices, k: int) -> None:
    """The k best of the lists, by rank in the rows of `values` and `indices`; row k of values: the best of the rest."""
    both = tuple(jnp.stack([lists[i, level].T for level in range(lists.shape[1])]) for i in (0, 1))
    across, gone = merge.merged(both, lost[...].T, ROWS, 0, k)
    enough = min(merge.enough(k, ROWS), len(across[0]))
    if enough < len(across[0]):
        gone = jnp.maximum(gone, across[0][enough])

    def take(rank: Array, lists: Lists) -> Lists:
        value, place = lists[0][0], lists[1][0]
        greatest = jnp.max(value, axis=0, keepdims=True)
        winner = jnp.min(jnp.where(value == greatest, place, 2.0**30), axis=0, keepdims=True)
        values[pl.ds(rank, 1), :], indices[pl.ds(rank, 1), :] = greatest, winner.astype(jnp.int32)
        taken = (value == greatest) & (place == winner)
        after = jnp.full_like(lists[0][:1], -jnp.inf), lists[1][:1]
        return tuple(
            jnp.where(taken, jnp.concatenate([array[1:], end]), array) for array, end in zip(lists, after, strict=True)
        )

    across = tuple(array[:enough] for array in across)
    left, _ = jax.lax.fori_loop(0, k, take, across)
    rest = jnp.max(jnp.maximum(gone, left[0]), axis=0, keepdims=True)
    values[k:, :] = jnp.broadcast_to(rest, (values.shape[0] - k, STEP))


def _product(x: Array, rows: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, rows, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _by_index(values: Array, indices: Array) -> Array:
    """Indices of equal values in rising order. By counting: a sort takes long to compile."""
    one, other = (values[:, :, None], indices[:, :, None]), (values[:, None, :], indices[:, None, :])
    before = (other[0] > one[0]) | ((other[0] == one[0]) & (other[1] < one[1]))
    return placed(indices, jnp.sum(before, axis=2))


def _from_all(rows: Array, bias: Array, k: int, x: Array) -> tuple[Array, Array]:
    """The selection from all pre-activations."""
    pre = _product(x, rows) + bias
    return _largest(jnp.where(jnp.isnan(pre), jnp.nan, pre), k)  # whatever its sign bit


def _largest(pre: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k`, which sorts whole rows on a TPU, by way of the k groups of greatest maximum (see `xla.largest`)."""
    if pre.shape[1] < 4 * GROUP * k:
        values, indices = jax.lax.top_k(pre, k)
        return values, indices
    padded = jnp.pad(pre, ((0, 0), (0, -pre.shape[1] % GROUP)), constant_values=-jnp.inf)
    grouped = padded.reshape(pre.shape[0], -1, GROUP)
    # Said, for a maximum over an axis loses NaN on a CPU (jaxlib 0.10.2).
    best = jnp.where(jnp.any(jnp.isnan(grouped), axis=-1), jnp.nan, grouped.max(-1))
    groups = jax.lax.top_k(best, k)[1]
    groups = placed(groups, jnp.sum(groups[:, None, :] < groups[:, :, None], axis=2))  # in rising order
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(pre.shape[0], -1)
    values, places = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(groups, places // GROUP, axis=1) * GROUP + places % GROUP
