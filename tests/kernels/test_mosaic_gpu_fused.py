"""The fused Mosaic GPU encoder: interpreted with race detection against float64 numpy, and lowered for a Hopper GPU.

tests/kernels/test_implementations.py runs it on the base of tests that all implementations share.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import dispatch, mosaic_gpu
from jaxinterp.kernels import mosaic_gpu_fused as fused
from tests.kernels import oracle
from tests.kernels.gpu_problem import needs, on

TOKENS, WIDTH, FEATURES, K = 20, 8, 300, 6  # one shape for many cases: two tiles of features, a part of one of tokens
CROWDED = np.arange(64, 74)  # features of one group


@pytest.fixture
def clean():
    """A caught race leaves the interpreter's memory as it is."""
    yield
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    reset_gpu_interpret_mode_state()


@cache
def compiled(k):
    return jax.jit(partial(fused.encode_counted, k=k, interpret=True))


def problem(tokens, width, features, dtype=jnp.bfloat16, integers=False, seed=0):
    rng = np.random.default_rng(seed)
    draw = (lambda *size: rng.integers(-2, 3, size)) if integers else (lambda *size: rng.normal(size=size))
    x, rows, bias = draw(tokens, width), draw(features, width) / (1 if integers else width**0.5), draw(features)
    return jnp.asarray(x, dtype), jnp.asarray(rows, dtype), jnp.asarray(bias, jnp.float32)


def check_equal(got, x, rows, bias, k=K):
    """Bit for bit: for problems in small integers, whose sums float32 has exactly."""
    values, indices = oracle.topk(oracle.pre_activations(x, rows, bias), k)
    np.testing.assert_array_equal(got[1], indices)
    np.testing.assert_array_equal(got[0], values)


@needs
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_selects_what_float64_selects_and_does_not_race(dtype):
    """float32 is six bfloat16 products, in more pieces than there are slots."""
    x, rows, bias = problem(TOKENS, WIDTH, FEATURES, dtype)
    values, indices, redone = compiled(K)(x, rows, bias)
    assert values.dtype == jnp.float32 and indices.dtype == jnp.int32 and values.shape == (TOKENS, K)
    oracle.check_selection(values, indices, x, rows, bias)
    assert redone <= 2


@needs
def test_what_the_groups_cannot_vouch_for_is_redone():
    """Ties everywhere; a third of the features forbidden; a NaN in one token; the best of another share a group."""
    x, rows, bias = problem(TOKENS, WIDTH, FEATURES, integers=True)
    x = x.at[:, 0].set(0).at[5, 0].set(1).at[3, 1].set(jnp.nan)
    rows = rows.at[:, 0].set(0).at[CROWDED, 0].set(100 + jnp.arange(10) % 4)
    forbidden = np.random.default_rng(1).random(FEATURES) < 0.3
    bias = jnp.where(forbidden, -jnp.inf, bias).at[CROWDED].set(0)
    got = compiled(K)(x, rows, bias)
    check_equal(got, x, rows, bias)
    assert set(np.asarray(got[1])[5]) < set(CROWDED)
    assert 2 <= got[2] < TOKENS, "at least those two, and not all"


@needs
@pytest.mark.parametrize("allowed", [0, 4, 250])
def test_forbidden_features_come_last_by_index(allowed):
    x, rows, bias = problem(TOKENS, WIDTH, FEATURES, integers=True)
    chosen = np.random.default_rng(allowed).choice(FEATURES, allowed, replace=False)
    bias = jnp.full(FEATURES, -jnp.inf).at[chosen].set(bias[chosen])
    got = compiled(K)(x, rows, bias)
    check_equal(got, x, rows, bias)
    assert got[2] == 0 or allowed == 250


@needs
@pytest.mark.parametrize("special", [jnp.nan, jnp.inf])
def test_a_number_that_is_none_costs_time_and_nothing_else(special):
    x, rows, bias = problem(TOKENS, WIDTH, FEATURES, integers=True)
    bias = bias.at[jnp.array([290, 77])].set(special)
    got = compiled(K)(x, rows, bias)
    check_equal(got, x, rows, bias)
    assert got[2] == TOKENS


@needs
def test_without_the_certificate_a_lost_value_would_be_seen(monkeypatch):
    """The control: nothing is redone, and the oracle says so."""
    monkeypatch.setattr(fused, "again", lambda x, failed, values, indices, select, at_once: (values, indices))
    x, rows, bias = problem(TOKENS, WIDTH, FEATURES, integers=True)
    got = jax.jit(partial(fused.encode_counted, k=K, interpret=True))(x, rows, bias.at[CROWDED].set(1000))
    with pytest.raises(AssertionError):
        check_equal(got, x, rows, bias.at[CROWDED].set(1000))


@needs
@pytest.mark.parametrize("without", ["_until_there", "_until_free", "_written"])
def test_a_race_is_caught(monkeypatch, clean, without):
    """A slot read before it is full, one filled before it is read, results sent off before they are written."""
    x, rows, bias = problem(3, WIDTH, 20, jnp.float32)
    monkeypatch.setattr(fused, without, lambda *_: None)
    with pytest.raises(Exception, match="RACE DETECTED"):
        jax.block_until_ready(jax.jit(partial(fused.encode_counted, k=2, interpret=True))(x, rows, bias))


@needs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "k", "dtype"),
    [((130, 100, 600), 12, jnp.bfloat16), ((40, 72, 1100), 64, jnp.float32)],
    ids=str,
)
def test_odd_shapes_select_what_float64_selects(shape, k, dtype):
    """Two tiles of tokens with a rest, several of features, two pieces of a row; four values a group."""
    x, rows, bias = problem(*shape, dtype)
    values, indices, _ = compiled(k)(x, rows, bias)
    oracle.check_selection(values, indices, x, rows, bias)


@needs
@pytest.mark.slow
def test_tokens_a_few_at_a_time_and_more_than_one_round_of_redoing(monkeypatch):
    """Everything ties, so that everything is redone; two chunks of tokens."""
    monkeypatch.setattr(fused, "AT_ONCE", 100)
    tokens = 2 * fused.REDONE + 30
    x, rows, bias = problem(tokens, WIDTH, FEATURES, integers=True)
    x = x.at[::2].set(0)
    bias = jnp.zeros(FEATURES)
    got = jax.jit(partial(fused.encode_counted, k=K, interpret=True))(x, rows, bias)
    check_equal(got, x, rows, bias)
    assert got[2] > fused.REDONE


def test_three_bfloat16_numbers_are_a_float32():
    """To the last bit: their sum in float64, by numpy."""
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 2.0 ** np.arange(-20, 10, 6)
    parts = np.asarray(fused._parts(jnp.asarray(array, jnp.float32))).astype(np.float64)
    np.testing.assert_array_equal(parts.sum(0), array.astype(np.float64))
    assert np.abs(parts[:2].sum(0) - array).max() > 0, "two are not enough"


@pytest.mark.parametrize("shape", [(24576, 32), (65536, 64), (131072, 64)])
def test_few_tokens_fail_if_features_fall_at_random(shape):
    """Throws of k features into the groups: how many have more than `depth` in one."""
    features, k = shape
    depth, rng = fused.depth_of(features, k), np.random.default_rng(0)
    thrown = np.sort(rng.integers(0, features // fused.GROUP, (20_000, k)), axis=1)
    assert depth == 2 and (thrown[:, depth:] == thrown[:, :-depth]).any(1).mean() < 1.3 * fused.LOST


SHAPE = {"tokens": 8192, "features": 24576, "k": 32, "width": 768, "itemsize": 2}


@needs
def test_it_lowers_for_hopper_without_pre_activations():
    """From a machine without a GPU: one kernel; no array of tokens x features. `make test-gpu` compiles it."""
    sizes = ((300, 40), jnp.bfloat16), ((4096, 40), jnp.bfloat16), ((4096,), jnp.float32)
    arguments = tuple(jax.ShapeDtypeStruct(*size) for size in sizes)
    with on("NVIDIA H200"):
        lowered = jax.jit(partial(fused.encode, k=8)).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "tensor<64x4096xf32>" in text, "redone tokens have their pre-activations"
    assert not any(f"tensor<{tokens}x4096xf32>" in text for tokens in (300, 384))


@needs
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("NVIDIA H200", "no GPU has run it"),
        ("NVIDIA H100 80GB HBM3", "no GPU has run it"),
        ("NVIDIA B200", "lacks the matrix instruction"),
        ("NVIDIA A100-SXM4-80GB", "is older than Hopper"),
    ],
)
def test_it_runs_only_where_it_is_asked_for_and_the_reason_is_said_once(caplog, kind, said):
    dispatch.choose.cache_clear()
    with on(kind), caplog.at_level("INFO", logger="jaxinterp.kernels"):
        for _ in range(2):
            assert dispatch.choose("encode", "gpu", kind, **SHAPE) == "xla"
        assert len(caplog.records) == 1 and f"mosaic_gpu_fused: {said}" in caplog.text.replace(f": {kind}", ":")
        if said.startswith("no GPU"):
            assert dispatch.find("mosaic_gpu_fused", "encode", **SHAPE) is fused.encode
        else:
            with pytest.raises(UserError, match=said):
                dispatch.find("mosaic_gpu_fused", "encode", **SHAPE)
    dispatch.choose.cache_clear()


@needs
def test_the_other_passes_are_those_of_mosaic_gpu():
    with on("NVIDIA H200"):
        for of in ("gather_sum", "sampled_dot", "outer_sum"):
            assert dispatch.find("mosaic_gpu_fused", of, **SHAPE) is getattr(mosaic_gpu, of)


@needs
def test_more_codes_than_candidates_are_refused():
    with on("NVIDIA H200"), pytest.raises(UserError, match="k=64 is more than the 32 candidates"):
        dispatch.find("mosaic_gpu_fused", "encode", **SHAPE | {"features": 64, "k": 64})
