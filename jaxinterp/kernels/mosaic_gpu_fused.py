"""The encoder and the selection of its k largest outputs with a Mosaic GPU kernel, for Hopper; exact, forward only.

    v_n, i_n = the k largest of a_n = x_n W^T + b, greatest first, ties to the lowest index

Pre-activations a (N x M) never leave a core's registers. A block is two warpgroups that multiply and one that fetches:
the copy engine (TMA) brings pieces of x `[TOKENS, PIECE]` and of W `[FEATURES, PIECE]` into `STAGES` slots of shared
memory; each of the two multiplies its `OWN` tokens by all features of the tile (wgmma, float32 sums in registers), adds
the bias, and keeps of every `GROUP` neighbouring features of a token the `depth` greatest values and their places, and
of a whole tile the greatest value that it dropped. Only these are written: (depth + 1) / GROUP numbers for each
pre-activation, `AT_ONCE` tokens at a time. Blocks walk over tiles, so that the next one is fetched while the groups of
the last are sorted. There are no atomics, and the same arguments give the same bits.

XLA then takes the k largest of the M depth / GROUP candidates, which lie in the order of their features.

Certificate: a token is exact if its k-th value is greater than all that was dropped. A group loses one of the k best
where depth + 1 of them share it: C(k, depth + 1) / (M / GROUP)^depth of the tokens, if features fall into groups at
random; `depth_of` keeps that below one percent. All other tokens (among them those with a tie between the k-th place
and a dropped value, and those with a NaN or an infinite pre-activation) are selected again from their whole row of
pre-activations by plain XLA, `REDONE` at a time. Where many tokens tie (x = 0 and one bias for all, say) every token is
redone: right, but slow.

float32 operands are three bfloat16 numbers each, and a product the six of their nine products that float32 can hold:
what a TPU does as well. Six times the work, and one and a half times the matrix as a copy.

The number of features is padded to a multiple of `FEATURES` and the width to one of `PIECE`, which copies the matrix.

The kernel was interpreted, with the interpreter's race detector, and compiled for GPUs that were not here. No GPU has
run it, which is why nothing chooses it by itself: `implementation="mosaic_gpu"` does. It needs jax 0.12.
"""

import re
from functools import partial
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import chunks, mosaic_gpu, xla
from jaxinterp.kernels.certificate import again, filled
from jaxinterp.kernels.mosaic_gpu import gather_sum, outer_sum, plgpu, sampled_dot

__all__ = ["encode", "gather_sum", "outer_sum", "refusal", "sampled_dot"]

TOKENS, FEATURES, PIECE = 128, 256, 64  # of a tile, and columns that are fetched at once: 128 bytes of a row
OWN = 64  # tokens of a warpgroup: the rows of a wgmma
WARPGROUPS = TOKENS // OWN
STAGES = 4  # pieces on their way or in use; 48 KiB each
GROUP = 32  # neighbouring features of which `depth` are kept
DEEPEST = 4  # places in a group are bytes of one number
LOST = 0.01  # of the tokens, at most, may be selected again
AT_ONCE = 2048  # tokens whose candidates are in memory
REDONE = 64  # tokens that are selected again at a time
REGISTERS = {"multiply": 232, "fetch": 40}  # of a thread
PAIRS = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2))  # parts of x and W that are multiplied; of bfloat16 the first
HOPPER = r"\b(GH|H)\d{2,3}\b"  # the only GPUs with wgmma


def refusal(of: str, *, tokens: int, features: int, k: int, width: int, itemsize: int = 4) -> str | None:
    """Why a pass cannot run at a shape; None where it can."""
    reason = mosaic_gpu.refusal(of, tokens=tokens, features=features, k=k, width=width, itemsize=itemsize)
    if of != "encode" or reason:
        return reason
    kind, most = _kind(), _candidates(features, DEEPEST)
    if kind and not re.search(HOPPER, kind):
        return f"{kind} lacks the matrix instruction (wgmma) of Hopper, which the encoder uses: take 'xla'."
    return f"k={k} is more than the {most} candidates that are kept: take 'xla'." if k > most else None


def depth_of(features: int, k: int) -> int:
    """How many values of a group are kept: as few as lose one of the k best in at most `LOST` of the tokens."""
    groups = _candidates(features, 1)
    enough = (d for d in range(2, DEEPEST) if comb(k, d + 1) <= LOST * groups**d and groups * d >= k)
    return next(enough, DEEPEST)


def encode(
    x: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    k: int,
    *,
    interpret: bool = False,
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
    interpret: bool = False,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Int[Array, ""]]:
    """`encode`, and how many tokens were selected again because the groups could not vouch for them."""
    reason = refusal("encode", tokens=x.shape[0], features=rows.shape[0], k=k, width=x.shape[1])
    if reason:
        raise UserError(reason)
    dtype = jnp.promote_types(x.dtype, rows.dtype)
    x, rows, bias = x.astype(dtype), rows.astype(dtype), bias.astype(jnp.float32)
    depth, padding = depth_of(rows.shape[0], k), -rows.shape[0] % FEATURES
    parts = jnp.pad(_parts(rows), ((0, 0), (0, padding), (0, -rows.shape[1] % PIECE)))
    padded = jnp.pad(bias, (0, padding), constant_values=-jnp.inf)

    def chunk(x: Array) -> tuple[Array, Array, Array]:
        return _certified(_candidates_of(x, parts, padded, depth, interpret), k, depth)

    values, indices, failed = chunks.mapped(chunk, x, AT_ONCE)
    few = values[:, -1] == -jnp.inf
    indices = jax.lax.cond(jnp.any(few), filled, lambda _, indices: indices, values, indices)
    values, indices = again(x, failed, values, indices, lambda some: xla.encode(some, rows, bias, k), REDONE)
    return values, indices, jnp.sum(failed, dtype=jnp.int32)


def _candidates(features: int, depth: int) -> int:
    return -(-features // FEATURES) * FEATURES // GROUP * depth


def _kind() -> str:
    """The GPU that is described or here; nothing where a kernel can only be interpreted."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""


def _parts(array: Float[Array, "n d"]) -> Float[Array, "parts n d"]:
    """bfloat16 numbers whose sum is the array: one of bfloat16, three of float32."""
    if array.dtype == jnp.bfloat16:
        return array[None]
    parts = []
    for _ in range(3):
        # Not a plain cast and back, which a compiler may leave out.
        part = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        array = array - part
    return jnp.stack(parts)


def _certified(
    candidates: tuple[Array, Array, Array], k: int, depth: int
) -> tuple[Array, Array, Bool[Array, " tokens"]]:
    """The k best of the candidates, and which tokens may have lost a better one."""
    held, places, dropped = candidates
    values, chosen = xla.largest(held.T, k)
    group, level = chosen // depth, chosen % depth
    place = jnp.take_along_axis(places.T, group, axis=1) >> (8 * level) & 255
    left, worst = jnp.max(dropped, axis=0), values[:, -1]
    few = (worst == -jnp.inf) & (left == -jnp.inf)
    return values, group * GROUP + place, ~((worst > left) | few) | (values[:, 0] == jnp.inf)


def _candidates_of(
    x: Float[Array, "tokens d"], parts: Array, bias: Array, depth: int, interpret: bool
) -> tuple[Float[Array, "candidates tokens"], Int[Array, "groups tokens"], Float[Array, "tiles tokens"]]:
    """What the kernel keeps of each group: values, their places in the bytes of a number; what each tile dropped."""
    (tokens, width), features = x.shape, bias.shape[0]
    split = jnp.pad(_parts(x), ((0, 0), (0, -tokens % TOKENS), (0, -width % PIECE)))
    padded, tiles = split.shape[1], features // FEATURES
    groups = features // GROUP
    blocks = min(2 if interpret else _cores(), tiles * padded // TOKENS)
    found = plgpu.kernel(
        partial(_kernel, depth=depth, blocks=blocks),
        out_type=(
            jax.ShapeDtypeStruct((groups * depth, padded), jnp.float32),
            jax.ShapeDtypeStruct((groups, padded), jnp.int32),
            jax.ShapeDtypeStruct((tiles, padded), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(depth),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(split, parts, bias)
    return tuple(array[:, :tokens] for array in found)


def _scratch(depth: int) -> list[Any]:
    """Shared memory: the slots of x and W with their barriers, and what a warpgroup writes."""
    transforms = plgpu.TilingTransform((8, PIECE)), plgpu.SwizzleTransform(2 * PIECE)
    groups = FEATURES // GROUP
    return [
        plgpu.SMEM((STAGES, TOKENS, PIECE), jnp.bfloat16, transforms=transforms),
        plgpu.SMEM((STAGES, FEATURES, PIECE), jnp.bfloat16, transforms=transforms),
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        plgpu.SMEM((WARPGROUPS, groups * depth, OWN), jnp.float32),
        plgpu.SMEM((WARPGROUPS, groups, OWN), jnp.int32),
        plgpu.SMEM((WARPGROUPS, OWN), jnp.float32),
    ]


def _kernel(
    x: Any, rows: Any, bias: Any, values: Any, places: Any, dropped: Any, *scratch: Any, depth: int, blocks: int
) -> None:
    """x `[parts, tokens, d]`, rows `[parts, features, d]`: the tiles of one block, one after the other."""
    x_slots, w_slots, arrived, free, *own = scratch
    block, thread = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
    across = x.shape[1] // TOKENS
    tiles = across * (rows.shape[1] // FEATURES)
    mine = jax.lax.div(tiles - 1 - block, blocks) + 1
    pieces = x.shape[2] // PIECE
    steps = pieces * (len(PAIRS) if x.shape[0] > 1 else 1)

    def places_of(number: Any) -> tuple[Any, Any]:
        """The tokens and the features of a tile: neighbours share their features."""
        tile = block + number * blocks
        return jax.lax.rem(tile, across), jax.lax.div(tile, across)

    @pl.when(thread == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS["fetch"], action="decrease")

        def fetch(step: Any, _: None) -> None:
            slot = jax.lax.rem(step, STAGES)
            pl.when(step >= STAGES)(lambda: _until_free(free.at[slot]))
            tokens, features = places_of(jax.lax.div(step, steps))
            pair, piece = jax.lax.div(jax.lax.rem(step, steps), pieces), jax.lax.rem(step, pieces)
            columns = pl.ds(piece * PIECE, PIECE)
            of_x, of_w = _pair(pair)
            there = x.at[of_x, pl.ds(tokens * TOKENS, TOKENS), columns]
            plgpu.copy_gmem_to_smem(there, x_slots.at[slot], arrived.at[slot])
            there = rows.at[of_w, pl.ds(features * FEATURES, FEATURES), columns]
            plgpu.copy_gmem_to_smem(there, w_slots.at[slot], arrived.at[slot])

        jax.lax.fori_loop(0, mine * steps, fetch, None)

    @pl.when(thread < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS["multiply"], action="increase")

        def tile(number: Any, _: None) -> None:
            def multiply(sums: Any) -> Array:
                def step(piece: Any, _: None) -> None:
                    at = number * steps + piece
                    slot = jax.lax.rem(at, STAGES)
                    _until_there(arrived.at[slot])
                    ours = x_slots.at[slot, pl.ds(thread * OWN, OWN)]
                    plgpu.wgmma(sums, ours, w_slots.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)  # the product before this one is done with its slot
                    pl.when(piece > 0)(lambda: plgpu.barrier_arrive(free.at[jax.lax.rem(at + STAGES - 1, STAGES)]))

                jax.lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[jax.lax.rem((number + 1) * steps - 1, STAGES)])
                return sums[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((OWN, FEATURES), jnp.float32))
            tokens, features = places_of(number)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the tile before has written
            _sort_groups(scores, bias.at[pl.ds(features * FEATURES, FEATURES)], [ref.at[thread] for ref in own], depth)
            _written()
            here = pl.ds(tokens * TOKENS + thread * OWN, OWN)
            groups = FEATURES // GROUP
            plgpu.copy_smem_to_gmem(
                own[0].at[thread], values.at[pl.ds(features * groups * depth, groups * depth), here]
            )
            plgpu.copy_smem_to_gmem(own[1].at[thread], places.at[pl.ds(features * groups, groups), here])
            plgpu.copy_smem_to_gmem(own[2].at[thread], dropped.at[features, here])

        jax.lax.fori_loop(0, mine, tile, None)
        plgpu.wait_smem_to_gmem(0)


def _sort_groups(scores: Array, bias: Any, own: list[Any], depth: int) -> None:
    """The greatest values of each group of a tile and their places, and the greatest value left over."""
    values, places, dropped = own
    wide = plgpu.Layout.WGMMA
    lane = plgpu.broadcasted_iota(jnp.int32, (OWN, GROUP), 1, layout=wide)
    left = plgpu.layout_cast(jnp.full((OWN,), -jnp.inf, jnp.float32), wide.reduce(1))
    for group in range(FEATURES // GROUP):
        some = pl.ds(group * GROUP, GROUP)
        added = plgpu.load(bias.at[some], layout=wide.reduce(0), optimized=False)
        found = scores[:, group * GROUP : (group + 1) * GROUP] + jax.lax.broadcast_in_dim(added, (OWN, GROUP), [1])
        found = jnp.where(found == found, found, jnp.inf)  # NaN: the token is selected again
        packed = None
        for level in range(depth):
            best = jnp.max(found, axis=1)
            equal = found == jax.lax.broadcast_in_dim(best, found.shape, [0])
            place = jnp.min(jnp.where(equal, lane, GROUP), axis=1)
            found = jnp.where(lane == jax.lax.broadcast_in_dim(place, found.shape, [0]), -jnp.inf, found)
            values[group * depth + level] = best
            packed = place if packed is None else packed | (place << (8 * level))
        places[group] = packed
        left = jnp.maximum(left, jnp.max(found, axis=1))
    dropped[...] = left


def _pair(number: Any) -> tuple[Any, Any]:
    """Entry `number` of `PAIRS`."""
    of_w = jnp.where(number < 3, 0, jnp.where(number < 5, 1, 2))
    return jnp.where(number < 3, number, jnp.where(number < 5, number - 3, 0)), of_w


def _until_there(barrier: Any) -> None:
    """Both copies into a slot have arrived."""
    plgpu.barrier_wait(barrier)


def _until_free(barrier: Any) -> None:
    """Both warpgroups have read a slot: the copy engine may write there."""
    plgpu.barrier_wait(barrier)


def _written() -> None:
    """What this warpgroup wrote to shared memory is there for the copy engine."""
    plgpu.commit_smem()


def _cores() -> int:
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.num_cores if described is not None else jax.devices()[0].core_count
