"""The sparse passes in plain XLA, on one device, forward only: what a CPU runs, and what runs where no kernel does.

With N tokens, M features, rows `(M, d)` of a read or write matrix W, and per token k values v and indices i:

    encode      v, i   = top-k over features of x W^T + b, greatest first, ties to the lowest index
    gather_sum  y_n    = sum_j v_nj W[i_nj]
    sampled_dot p_nj   = g_n . W[i_nj]
    outer_sum   dW[m]  = sum over (n, j) with i_nj = m of v_nj g_n

An index equal to M names no row: it reads zeros and writes nothing. Every implementation has these four.
Sums are float32, and so are products of float32 operands on every platform (`platforms.precision`), so that all
implementations choose the same features; `jax_default_matmul_precision` may trade that for TF32 or bfloat16 passes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.kernels import chunks, platforms
from jaxinterp.kernels.rank import Rank
from jaxinterp.kernels.tournament import ordered, pays, tournament

GATHERED = {"cpu": 2**17, "gpu": 2**24, "tpu": 2**24}  # numbers gathered at a time; on a CPU they fit its cache
UNROLLED = 8  # entries of every token that a CPU adds up in one loop
GROUP = 16  # features in a group of the two-stage selection
LANES = 128  # the narrowest block of columns that an accelerator handles well
ENTRIES = 256  # sorted entries that one small matmul sums on an accelerator


def encode(
    x: Float[Array, "tokens d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], k: int
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of x W^T + b per token, in float32. A feature with bias -inf comes after all others."""

    def chunk(x: Array) -> tuple[Array, Array]:
        return largest(_product(x, rows) + bias, k)

    return chunks.mapped(chunk, x, chunks.PRE_ACTIVATIONS)


def encode_ranked(
    x: Float[Array, "tokens d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], k: int, rank: Rank
) -> tuple[Float[Array, "tokens k"], Float[Array, "tokens k"], Int[Array, "tokens k"], Int[Array, " tokens"]]:
    """Scores, values and features of the k best by `rank`, and how many features were not forbidden."""

    def chunk(arrays: tuple[Array, Any]) -> tuple[Array, Array, Array, Array]:
        x, tokens = arrays
        pre = _product(x, rows) + bias
        return ranked(pre, rank._replace(tokens=tokens), k)

    return chunks.mapped(chunk, (x, rank.tokens), chunks.PRE_ACTIVATIONS)


def encode_groups(
    x: Float[Array, "tokens d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], groups: int
) -> tuple[Float[Array, "tokens groups"], Int[Array, "tokens groups"]]:
    """The largest of x W^T + b in each of `groups` groups of neighbouring features."""
    size = rows.shape[0] // groups

    def chunk(x: Array) -> tuple[Array, Array]:
        pre = _product(x, rows) + bias
        grouped = pre.reshape(-1, groups, size)
        return grouped.max(-1), grouped.argmax(-1).astype(jnp.int32) + jnp.arange(groups, dtype=jnp.int32) * size

    return chunks.mapped(chunk, x, chunks.PRE_ACTIVATIONS)


def largest(pre: Float[Array, "tokens features"], k: int) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """`lax.top_k` with NaN first, on a CPU by rounds, else in two stages, where that is faster; float32.

    Two stages: the k groups of greatest maximum hold the k largest. Ordered by their place, they leave ties to the
    lowest index: the lowest of tied groups are taken, and each holds an entry that comes before all of those left out.
    """
    tokens, features = pre.shape
    if platforms.current() == "cpu" and pays(tokens, features, k):
        return tournament(pre, k)
    # The NaN of x86 has its sign bit set: top_k, which goes by the bits, would put it last.
    pre = jnp.where(jnp.isnan(pre), jnp.nan, jnp.where(pre == 0, 0.0, pre))  # and -0.0 after 0.0
    if not _in_two_stages(features, k):
        values, indices = jax.lax.top_k(pre, k)
        return values, indices
    padded = jnp.pad(pre, ((0, 0), (0, -features % GROUP)), constant_values=-jnp.inf)
    grouped = padded.reshape(tokens, -1, GROUP)
    # The maximum is one of ordered bit patterns: the CPU's maximum of floats drops NaN.
    maxima = ordered(jnp.max(ordered(jax.lax.bitcast_convert_type(grouped, jnp.int32)), axis=-1))
    _, best = jax.lax.top_k(jax.lax.bitcast_convert_type(maxima, jnp.float32), k)
    best = -jax.lax.top_k(-best, k)[0]  # in the order of their places; a sort would be slower
    candidates = jnp.take_along_axis(grouped, best[:, :, None], axis=1).reshape(tokens, -1)
    values, places = jax.lax.top_k(candidates, k)
    return values, jnp.take_along_axis(best, places // GROUP, axis=1) * GROUP + places % GROUP


def _in_two_stages(features: int, k: int) -> bool:
    """On a CPU where it is faster (benchmarks/selection.py); on a GPU, whose compiler makes a whole sort of a `top_k`,
    where the groups' maxima and the candidates are at most 5/8 of the features; not on a TPU.
    """
    platform = platforms.current()
    if platform == "gpu":
        return features >= 2 * GROUP * k
    return platform != "tpu" and features >= 256 * k and features >= 8192


def ranked(pre: Float[Array, "tokens features"], rank: Rank, k: int) -> tuple[Array, Array, Array, Array]:
    """Scores, values and features of the k best by `rank`, and how many features were not forbidden."""
    score = rank.score(pre, rank.tokens, rank.features)
    scores, indices = largest(score, k)
    values = jnp.where(scores == -jnp.inf, -jnp.inf, jnp.take_along_axis(pre, indices, axis=1))
    return scores, values, indices, jnp.sum(score != -jnp.inf, axis=1, dtype=jnp.int32)


def gather_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], rows: Float[Array, "features d"]
) -> Float[Array, "tokens d"]:
    """Per token, the sum of the rows at its indices, weighted by its values; float32."""
    if platforms.current() == "cpu" and indices.shape[1] >= 2 * UNROLLED:
        return _gather_sum_in_place(values, indices, rows)

    def chunk(arrays: tuple[Array, Array]) -> Array:
        values, indices = arrays
        return _sum("nk,nkd->nd", values, _take(rows, indices))

    return chunks.mapped(chunk, (values, indices), _at_a_time(indices.shape[1] * rows.shape[1]))


def _gather_sum_in_place(values: Array, indices: Array, rows: Array) -> Array:
    """Entry by entry into the sums, `UNROLLED` in one loop over the numbers: no gathered row is written to memory.

    Sums are those of the matmul of gathered rows to the last bit, which takes 1.7 times as long.
    """
    pad = ((0, 0), (0, -indices.shape[1] % UNROLLED))
    values = jnp.pad(values, pad)
    indices = jnp.pad(indices, pad, constant_values=rows.shape[0])

    def add(step: Array, total: Array) -> Array:
        for place in range(UNROLLED):
            entry = step * UNROLLED + place
            total += values[:, entry, None].astype(jnp.float32) * _take(rows, indices[:, entry]).astype(jnp.float32)
        return total

    start = jnp.zeros((values.shape[0], rows.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, values.shape[1] // UNROLLED, add, start)


def sampled_dot(
    g: Float[Array, "tokens d"], rows: Float[Array, "features d"], indices: Int[Array, "tokens k"]
) -> Float[Array, "tokens k"]:
    """Per token, the inner products of g with the rows at its indices; float32."""

    def chunk(arrays: tuple[Array, Array]) -> Array:
        g, indices = arrays
        return _sum("nd,nkd->nk", g, _take(rows, indices))

    return chunks.mapped(chunk, (g, indices), _at_a_time(indices.shape[1] * rows.shape[1]))


def outer_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], g: Float[Array, "tokens d"], features: int
) -> Float[Array, "features d"]:
    """The gradient of `gather_sum` in its rows; float32."""
    by_platform = _outer_by_token if platforms.current() == "cpu" else _outer_sorted
    return by_platform(values, indices, g, features)


def outer_and_value_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    *,
    outer_sum: Callable[..., Array] = outer_sum,
    over_data: Callable[[Array], Array] = lambda of_shard: of_shard,
) -> tuple[Float[Array, "rows d"], Float[Array, " rows"]]:
    """`outer_sum` by any implementation, and per feature the sum of its values.

    Where a scatter of single numbers is slow, which is everywhere but on a CPU, the sums are one more column of g.
    `over_data` sums the shards' results, before that column is cut off: a cut of the larger array would be a copy.
    """
    if platforms.current() == "cpu":
        return over_data(outer_sum(values, indices, g, features)), over_data(value_sum(values, indices, features))
    columns = jnp.zeros((g.shape[0], LANES), g.dtype).at[:, 0].set(1)
    both = over_data(outer_sum(values, indices, jnp.concatenate([g, columns], axis=1), features))
    return both[:, : g.shape[1]], both[:, g.shape[1]]


def value_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], features: int
) -> Float[Array, " features"]:
    """Per feature, the sum of its values: `outer_sum` with g = 1.

    On an accelerator it is the difference of a running sum over sorted entries: exact for whole numbers below 2^24.
    """
    if platforms.current() == "cpu":
        return jnp.zeros(features, jnp.float32).at[indices.reshape(-1)].add(values.reshape(-1), mode="drop")
    sorted_features, entries = order(indices)
    running = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(values.reshape(-1)[entries].astype(jnp.float32))])
    return jnp.diff(running[jnp.searchsorted(sorted_features, jnp.arange(features + 1))])


def order(indices: Int[Array, "tokens k"]) -> tuple[Int[Array, " entries"], Int[Array, " entries"]]:
    """The features of all entries in rising order, and the entries in that order.

    Two calls with the same indices compile to one sort. Its keys are unsigned: for those XLA has a radix sort on a GPU.
    """
    entries = jnp.arange(indices.size, dtype=jnp.int32)
    keys, entries = jax.lax.sort((indices.reshape(-1).astype(jnp.uint32), entries), num_keys=1, is_stable=True)
    return keys.astype(jnp.int32), entries


def _outer_by_token(values: Array, indices: Array, g: Array, features: int) -> Array:
    """Token by token: the fastest scatter on a CPU, and a catastrophe on an accelerator."""

    def add(n: Array, total: Array) -> Array:
        return total.at[indices[n]].add(values[n][:, None] * g[n].astype(jnp.float32), mode="drop")

    return jax.lax.fori_loop(0, values.shape[0], add, jnp.zeros((features, g.shape[1]), jnp.float32))


def _outer_sorted(values: Array, indices: Array, g: Array, features: int) -> Array:
    """Entries in the order of their features, `ENTRIES` summed by a small matmul, at most one add per row and block.

    A plain scatter-add would meet a popular feature thousands of times (and is slow there: openxla/xla 46225).
    """
    k, width = values.shape[1], g.shape[1]
    sorted_features, entries = order(indices)

    def block(features_of: Array, entries: Array) -> tuple[Array, Array]:
        first = jnp.concatenate([jnp.ones(1, bool), features_of[1:] != features_of[:-1]])
        place = jnp.cumsum(first) - 1
        weights = jnp.where(place[None, :] == jnp.arange(ENTRIES)[:, None], values.reshape(-1)[entries], 0.0)
        sums = jnp.matmul(weights, g[entries // k].astype(jnp.float32), precision="highest")
        return jnp.full(ENTRIES, features, jnp.int32).at[place].set(features_of), sums

    def add(total: Array, blocks: tuple[Array, Array]) -> tuple[Array, None]:
        rows_of, sums = jax.vmap(block)(*blocks)
        return total.at[rows_of.reshape(-1)].add(sums.reshape(-1, width), mode="drop"), None

    blocks = _at_a_time(ENTRIES * max(width, ENTRIES))
    padding = (0, -len(entries) % (blocks * ENTRIES))
    padded = jnp.pad(sorted_features, padding, constant_values=features), jnp.pad(entries, padding)
    steps = padded[0].reshape(-1, blocks, ENTRIES), padded[1].reshape(-1, blocks, ENTRIES)
    return jax.lax.scan(add, jnp.zeros((features, width), jnp.float32), steps)[0]


def _product(x: Array, rows: Array) -> Array:
    return jnp.matmul(x, rows.T, precision=platforms.precision(x, rows), preferred_element_type=jnp.float32)


def _sum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision=platforms.precision(a, b), preferred_element_type=jnp.float32)


def _take(rows: Array, indices: Array) -> Array:
    return rows.at[indices].get(mode="fill", fill_value=0)


def _at_a_time(numbers: int) -> int:
    return max(1, GATHERED[platforms.current()] // numbers)
