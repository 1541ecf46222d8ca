"""The GPU kernels: interpreted against float64 numpy, and lowered for CUDA without a GPU."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from jaxinterp.kernels import encode_topk, pallas_gpu, sparse_decode
from jaxinterp.preflight.program_text import arrays, shape_of, sorts
from tests.kernels import oracle
from tests.kernels.gpu_problem import LARGE, described, problem

CASES = [
    ((37, 24, 53, 5), jnp.float32),
    ((33, 576, 41, 1), jnp.bfloat16),  # two tiles of columns and a bit; k = 1
    ((17, 768, 29, 9), jnp.bfloat16),  # three tiles
    ((5, 2304, 11, 33), jnp.float32),  # nine tiles; k is not a multiple of a group
    ((131, 40, 7, 12), jnp.float32),  # 1572 entries in 7 runs: longer than one chunk
]
"""Tokens, width, features, k. tests/kernels/test_implementations.py runs the kernels on more."""
SMALL = CASES[0][0]
K = LARGE[3]

dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])

gather_sum, sampled_dot, outer_sum = (
    partial(run, interpret=True) for run in (pallas_gpu.gather_sum, pallas_gpu.sampled_dot, pallas_gpu.outer_sum)
)
five_runs = jax.jit(partial(outer_sum, features=5))


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_interpreted_passes_equal_float64(shape, dtype):
    values, indices, g, rows = problem(shape, dtype)
    for got, expected in (
        (gather_sum(values, indices, rows), oracle.gather_sum(values, indices, rows)),
        (sampled_dot(g, rows, indices), oracle.sampled_dot(g, rows, indices)),
        (outer_sum(values, indices, g, shape[2]), oracle.outer_sum(values, indices, g, shape[2])),
    ):
        assert got.dtype == jnp.float32 and got.shape == expected.shape
        oracle.close(got, expected)


def test_an_index_of_no_row_reads_zeros_and_writes_nothing():
    values, indices, g, rows = problem(SMALL)
    nowhere = jnp.full_like(indices, rows.shape[0])
    assert not gather_sum(values, nowhere, rows).any()
    assert not sampled_dot(g, rows, nowhere).any()
    assert not outer_sum(values, nowhere, g, rows.shape[0]).any()


def test_features_without_an_entry_get_zeros():
    values, indices, g, _ = problem((9, 20, 3, 4))
    got = np.asarray(outer_sum(values, jnp.where(indices < 3, indices * 50, 400), g, 400))
    assert got[[0, 50, 100]].any(axis=1).all()
    assert not np.delete(got, [0, 50, 100], axis=0).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3 * pallas_gpu.CHUNK), min_size=5, max_size=5), st.integers(0, 2**31))
def test_runs_may_be_of_any_length(lengths, seed):
    """Features with any numbers of entries, shuffled: runs that start, stop and go on at cuts of the sorted entries."""
    rng = np.random.default_rng(seed)
    lengths = [*lengths, 15 * pallas_gpu.CHUNK + 1 - sum(lengths)]  # the rest names no row
    indices = rng.permutation(np.repeat(np.arange(6), lengths)).astype(np.int32)[:, None]
    values, g = (rng.integers(-3, 4, (len(indices), width)).astype(np.float32) for width in (1, 3))
    got = five_runs(jnp.asarray(values), jnp.asarray(indices), jnp.asarray(g))
    np.testing.assert_array_equal(got, oracle.outer_sum(values, indices, g, 5))


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_runs_may_end_at_a_cut(length):
    first = pallas_gpu.CHUNK + length
    indices = jnp.repeat(jnp.arange(3), jnp.array([first, pallas_gpu.CHUNK, 2]))[:, None]
    ones = jnp.ones(indices.shape)
    np.testing.assert_array_equal(outer_sum(ones, indices, ones, 3)[:, 0], [first, pallas_gpu.CHUNK, 2])


def test_order_names_the_run_of_each_feature():
    indices = jnp.array([[4, 1], [1, 6], [6, 4], [1, 0]])  # of 6 features: 6 is not a row
    entries, starts, stops = pallas_gpu.order(indices, 6)
    np.testing.assert_array_equal(entries, [7, 1, 2, 6, 0, 5, 3, 4])
    np.testing.assert_array_equal(starts, [0, 1, 0, 0, 4, 0])
    np.testing.assert_array_equal(stops, [1, 4, 0, 0, 6, 0])


def test_two_weight_gradients_share_one_sort():
    values, indices, g, _ = problem(SMALL)

    def two(values, indices, others, g):
        return outer_sum(values, indices, g, 53), outer_sum(2 * values, others, g[:, :8], 53)

    shared = jax.jit(lambda values, indices, g: two(values, indices, indices, g)).lower(values, indices, g)
    assert len(sorts(shared.compile().as_text())) == 1
    assert (
        len(sorts(jax.jit(two).lower(values, indices, indices, g).compile().as_text())) == 2
    )  # nobody knows that they are equal


def test_the_whole_gradient_has_one_sort():
    _, _, x, rows = problem((33, 24, 53, 5))
    program = jax.jit(gradient("pallas_gpu:interpret", 5)).lower(x, rows, jnp.zeros(53), rows)
    assert len(sorts(program.compile().as_text())) == 1


def gradient(implementation, k):
    """Of a small autoencoder, in both dictionaries and the biases."""

    def loss(x, encoder, bias, decoder):
        values, indices = encode_topk(x, encoder, bias, k=k, implementation=implementation)
        return jnp.sum((sparse_decode(jax.nn.relu(values), indices, decoder, implementation=implementation) - x) ** 2)

    return jax.grad(loss, (1, 2, 3))


def lowered(function, *arguments):
    """The program for an H200, from a machine without one."""
    described = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", None, "gpu"))
    with jax.sharding.use_abstract_mesh(described):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@dtypes
@pytest.mark.parametrize("shape", [LARGE, (511, 576, 4099, 9), (511, 2304, 4099, 64)], ids=str)
def test_kernels_lower_for_cuda(dtype, shape):
    values, indices, g, rows = described(dtype, shape)
    programs = (
        (1, lowered(pallas_gpu.gather_sum, values, indices, rows)),
        (1, lowered(pallas_gpu.sampled_dot, g, rows, indices)),
        (2, lowered(lambda *entries: pallas_gpu.outer_sum(*entries, shape[2]), values, indices, g)),
    )
    for kernels, text in programs:
        assert text.count("@__gpu$xla.gpu.triton") == kernels
        check_no_large_array(text, shape)


def test_the_whole_gradient_lowers_for_cuda():
    shape = (1021, *LARGE[1:])  # more tokens than the encoder takes at a time
    _, _, x, rows = described(jnp.bfloat16, shape)
    bias = jax.ShapeDtypeStruct(shape[2:3], jnp.float32)
    text = lowered(gradient("pallas_gpu", K), x, rows, bias, rows)
    # Decode, the gradient of the values, two for each dictionary's; that of x is dropped here or by the compiler.
    assert text.count("@__gpu$xla.gpu.triton") in (6, 7)
    check_no_large_array(text, shape)


def check_no_large_array(text, shape):
    tokens, width, features, k = shape
    found = set(map(shape_of, arrays(text)))
    assert (features, width) in found  # the pattern finds arrays
    for array in found:
        assert np.prod(array, dtype=np.int64) < tokens * k * width, array
        assert not {tokens, features} <= set(array), array


def test_without_the_backend_the_reason_is_told(monkeypatch):
    assert pallas_gpu.available() is None
    monkeypatch.setattr(pallas_gpu, "triton", None)
    assert "no Triton backend" in pallas_gpu.available()
    assert "no Triton backend" in pallas_gpu.refusal("outer_sum", tokens=8, features=16, k=2, width=4)


@pytest.mark.parametrize(
    ("kind", "capability", "reason"),
    [("NVIDIA H200", "9.0", None), ("Tesla T4", "7.5", "needs 8.0"), ("MI300X", "gfx942", "not a CUDA GPU")],
)
def test_a_gpu_that_triton_cannot_use_is_told(monkeypatch, kind, capability, reason):
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    said = pallas_gpu.available()
    assert said is None if reason is None else reason in said and kind in said


def test_more_entries_than_can_be_counted_are_refused():
    assert "32 bits" in pallas_gpu.refusal("outer_sum", tokens=2**26, features=2**15, k=32, width=768)
