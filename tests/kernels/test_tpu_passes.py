"""The TPU kernels of the sparse passes against float64, in both interpreters: that of JAX, and that of a TPU's memory.

The second starts from memory full of NaN, and moves what a copy moves only when it is waited for.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxinterp.kernels import pallas_tpu
from jaxinterp.kernels.pallas_tpu import gather, outer
from jaxinterp.preflight.program_text import arrays, numbers_of, sorts
from tests.kernels import oracle

INTERPRETERS = {"jax": True, "tpu": pltpu.InterpretParams()}
SHAPES = [(5, 576, 33, 3), (7, 768, 41, 32), (3, 2304, 20, 9), (9, 130, 50, 1)]
"""Tokens, width, features, k: odd numbers, k = 1, and k above what is computed with at a time."""


@pytest.fixture(autouse=True)
def small(request, monkeypatch):
    """Fewer rows at a time: an interpreter's code grows with them; a test of the real sizes says so."""
    if "real sizes" not in (request.node.function.__doc__ or ""):
        monkeypatch.setattr(gather, "UNIT", 16)
        for name in ("CHUNK", "BLOCK"):
            monkeypatch.setattr(outer, name, 16)


interpreters = pytest.mark.parametrize("interpret", INTERPRETERS.values(), ids=INTERPRETERS)
dtypes = {"f32": jnp.float32, "bf16": jnp.bfloat16}
by_interpreter = {"jax": ("f32", "bf16", "bf16", "f32"), "tpu": ("bf16", "f32", "f32", "bf16")}
cases = pytest.mark.parametrize(
    ("interpreter", "shape", "dtype"),
    [(name, *case) for name, types in by_interpreter.items() for case in zip(SHAPES, types, strict=True)],
    ids=str,
)


def problem(shape, dtype, seed=0):
    """g, rows, values and indices; a token has some feature twice, and entries that name no row."""
    tokens, width, features, k = shape
    rng = np.random.default_rng(seed)
    g, rows = rng.normal(size=(tokens, width)), rng.normal(size=(features, width))
    indices = rng.integers(0, features + 1, (tokens, k))
    indices[0, 0] = features
    indices[-1, k // 2 :] = indices[-1, 0]
    values = jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32)
    return jnp.asarray(g, dtype), jnp.asarray(rows, dtype), values, jnp.asarray(indices, jnp.int32)


@cache
def compiled(name, sizes, **options):
    """A pass, compiled quickly; `sizes` are the rows at a time, so that none is reused for others."""
    return jax.jit(
        partial(getattr(pallas_tpu, name), **options), compiler_options={"xla_backend_optimization_level": 0}
    )


def run(name, *arguments, **options):
    return compiled(name, (gather.UNIT, gather.SCALARS, outer.CHUNK), **options)(*arguments)


@cases
def test_gather_sum(interpreter, shape, dtype):
    _, rows, values, indices = problem(shape, dtypes[dtype])
    got = run("gather_sum", values, indices, rows, interpret=INTERPRETERS[interpreter])
    assert got.dtype == jnp.float32
    oracle.close(got, oracle.gather_sum(values, indices, rows), 1e-6)


@cases
def test_sampled_dot(interpreter, shape, dtype):
    g, rows, _, indices = problem(shape, dtypes[dtype])
    got = run("sampled_dot", g, rows, indices, interpret=INTERPRETERS[interpreter])
    assert got.dtype == jnp.float32 and got.shape == indices.shape
    oracle.close(got, oracle.sampled_dot(g, rows, indices), 1e-6)


@cases
def test_outer_sum(interpreter, shape, dtype):
    g, _, values, indices = problem(shape, dtypes[dtype])
    got = run("outer_sum", values, indices, g, features=shape[2], interpret=INTERPRETERS[interpreter])
    assert got.dtype == jnp.float32
    oracle.close(got, oracle.outer_sum(values, indices, g, shape[2]), 1e-6)


def indices_of(kind, tokens, k, features, rng):
    """Features that meet the edges of chunks and blocks in every way that there is."""
    if kind == "one feature":
        return np.full((tokens, k), features - 1)
    if kind == "no row":
        return np.full((tokens, k), features)
    if kind == "mostly no row":
        return np.where(rng.random((tokens, k)) < 0.9, features, rng.integers(0, features, (tokens, k)))
    if kind == "first and last":
        return np.where(rng.random((tokens, k)) < 0.5, 0, features - 1)
    if kind == "whole chunks":  # every block begins where a chunk does
        return np.sort(np.arange(tokens * k) // outer.CHUNK * outer.BLOCK % features).reshape(k, tokens).T
    return rng.integers(0, features, (tokens, k))


@pytest.mark.parametrize("dtype", dtypes.values(), ids=dtypes)
def test_all_passes_at_real_sizes(dtype):
    """The real sizes of units, chunks and blocks; two blocks of features."""
    g, rows, values, indices = problem((11, 200, 150, 40), dtype)
    got = run("gather_sum", values, indices, rows, interpret=True)
    oracle.close(got, oracle.gather_sum(values, indices, rows), 1e-6)
    got = run("sampled_dot", g, rows, indices, interpret=True)
    oracle.close(got, oracle.sampled_dot(g, rows, indices), 1e-6)
    oracle.close(
        run("outer_sum", values, indices, g, features=150, interpret=True),
        oracle.outer_sum(values, indices, g, 150),
        1e-6,
    )


@pytest.mark.parametrize("kind", ["one feature", "no row", "mostly no row", "first and last", "whole chunks", "any"])
@interpreters
def test_outer_sum_of_chunks_and_blocks(interpret, kind):
    tokens, k, features, width = 96, 8, 6 * outer.BLOCK + 5, 40
    rng = np.random.default_rng(0)
    indices = jnp.asarray(indices_of(kind, tokens, k, features, rng), jnp.int32)
    g = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
    values = jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32)
    got = np.asarray(run("outer_sum", values, indices, g, features=features, interpret=interpret))
    oracle.close(got, oracle.outer_sum(values, indices, g, features), 1e-6)
    untouched = np.setdiff1d(np.arange(features), np.asarray(indices))
    assert not got[untouched].any(), "a row without entries is not zero"


@interpreters
def test_sums_of_values_come_along(interpret):
    g, _, values, indices = problem((30, 40, 37, 6), jnp.bfloat16)
    total, sums = run("outer_and_value_sum", values, indices, g, features=37, interpret=interpret)
    oracle.close(total, oracle.outer_sum(values, indices, g, 37), 1e-6)
    oracle.close(sums, oracle.outer_sum(values, indices, np.ones((30, 1)), 37)[:, 0], 1e-6)


def test_one_feature_given_twice_to_a_token_is_counted_once_each():
    values, indices, g = jnp.array([[2.0, 3.0]]), jnp.array([[4, 4]]), jnp.ones((1, 8))
    np.testing.assert_allclose(run("outer_sum", values, indices, g, features=6, interpret=True)[4], 5 * np.ones(8))


@pytest.mark.parametrize("name", ["gather_sum", "sampled_dot"])
def test_what_stands_beside_a_row_does_not_leak(name):
    """Rows of bfloat16 move in pairs, and an entry without a row moves some row all the same."""
    g, rows, values, indices = problem((6, 64, 12, 5), jnp.bfloat16)
    used = np.unique(np.asarray(indices))
    rows = jnp.where(jnp.isin(jnp.arange(12), used[used % 3 > 0])[:, None], rows, jnp.nan)
    indices = jnp.where(indices % 3 > 0, indices, 12)
    arguments = (values, indices, rows) if name == "gather_sum" else (g, rows, indices)
    got = run(name, *arguments, interpret=True)
    assert bool(jnp.isfinite(got).all())


def test_a_few_grid_steps_of_gathers(monkeypatch):
    """More tokens than a grid step takes, and a last step that is not full."""
    monkeypatch.setattr(gather, "SCALARS", 256)
    g, rows, values, indices = problem((75, 96, 65, 6), jnp.float32)
    got = run("gather_sum", values, indices, rows, interpret=True)
    oracle.close(got, oracle.gather_sum(values, indices, rows), 1e-6)
    got = run("sampled_dot", g, rows, indices, interpret=True)
    oracle.close(got, oracle.sampled_dot(g, rows, indices), 1e-6)


@pytest.mark.parametrize("features", [50, 2**30], ids=["one key", "two keys"])
def test_order_is_by_feature_then_token(features):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 51, (40, 7))
    of_entry, tokens = pallas_tpu.order(jnp.asarray(indices, jnp.int32), features)
    kept = np.minimum(indices, features).ravel()
    right = np.lexsort((np.repeat(np.arange(40), 7), kept))
    np.testing.assert_array_equal(of_entry, kept[right])
    np.testing.assert_array_equal(tokens, right // 7)


def test_the_same_bits_every_time():
    g, _, values, indices = problem((40, 32, 9, 16), jnp.bfloat16)
    first, second = (run("outer_sum", values, indices, g, features=9, interpret=True) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_two_weight_gradients_share_one_sort():
    def both(values, indices, g):
        one = pallas_tpu.outer_sum(values, indices, g, 50, interpret=True)
        return one, pallas_tpu.outer_sum(2 * values, indices, g + 1, 50, interpret=True)

    arguments = jnp.ones((64, 4)), jnp.ones((64, 4), jnp.int32), jnp.ones((64, 8))
    assert len(sorts(jax.jit(both).lower(*arguments).compile().as_text())) == 1


def test_lowered_for_a_tpu_nothing_is_large():
    """At real sizes, in what the TPU compiler gets: no tokens x features, no tokens x k x width, no copy of rows."""
    tokens, width, features, k = 4096, 256, 4096, 16

    def passes(g, rows, values, indices):
        y = pallas_tpu.gather_sum(values, indices, rows)
        return y, pallas_tpu.sampled_dot(g, rows, indices), pallas_tpu.outer_sum(values, indices, g, features)

    sizes = ((tokens, width), jnp.bfloat16), ((features, width), jnp.bfloat16), ((tokens, k), jnp.float32)
    arguments = [jax.ShapeDtypeStruct(*size) for size in (*sizes, ((tokens, k), jnp.int32))]
    device = AbstractDevice("TPU v5e", 1, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(passes).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3
    biggest = max(map(numbers_of, arrays(text)))
    assert biggest <= max(features, tokens) * width < tokens * k * width / 2


@pytest.mark.parametrize(
    ("of", "change"),
    [("gather_sum", {"k": 1025}), ("sampled_dot", {"width": 16384}), ("outer_sum", {"features": 2**24})],
)
def test_what_cannot_run_is_refused_with_a_way_out(of, change):
    shape = {"tokens": 8192, "features": 24576, "k": 32, "width": 768}
    assert pallas_tpu.refusal(of, **shape) is None
    assert "take" in pallas_tpu.refusal(of, **shape | change)
