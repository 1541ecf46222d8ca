"""Every implementation gives the passes of the float64 oracle: one base of tests, run by each of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import dispatch, mosaic_gpu
from tests.kernels import oracle

NAMES = ["reference", "xla", "xla of a gpu", "dense", "pallas_tpu:interpret", "pallas_gpu:interpret"]
NAMES += [] if mosaic_gpu.available() else ["mosaic_gpu:interpret"]  # only the newest jax has its interpreter
ENCODERS = NAMES + ([] if mosaic_gpu.available() else ["mosaic_gpu_fused:interpret"])  # its other passes: mosaic_gpu's
SHAPES = [(3, 20, 48, 5), (33, 96, 130, 1), (7, 64, 64, 64), (17, 576, 1000, 32), (5, 768, 520, 8), (4, 2304, 260, 7)]
"""Tokens, width, features, k: multiples of nothing, k = 1 and k = M, widths that are no power of two."""

DTYPES = [jnp.float32, jnp.bfloat16]


def marks(name):
    """Interpreters are slow."""
    return [pytest.mark.slow] if ":" in name else []


SMALLER = {(17, 576, 1000, 32): None, (4, 2304, 260, 7): (1, 2304, 66, 3)}
"""What an interpreter that takes milliseconds a row gets instead: one token of the same width, or nothing."""


def given_to(name, shape):
    """The shape that an implementation is asked about; None: it is left out."""
    return SMALLER.get(shape, shape) if name.startswith("mosaic") else shape


def cases_of(names):
    return [
        pytest.param(name, shape, dtype, id=f"{name}-{shape}-{dtype.__name__}", marks=marks(name))
        for name in names
        for number, shape in enumerate(given_to(name, each) for each in SHAPES)
        if shape
        for dtype in (DTYPES if ":" not in name else DTYPES[number % 2 : number % 2 + 1])  # interpreters are slow
    ]


def every_of(names):
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in names])


every, every_encoder = every_of(NAMES), every_of(ENCODERS)
cases, encoder_cases = (pytest.mark.parametrize(("name", "shape", "dtype"), cases_of(of)) for of in (NAMES, ENCODERS))


def find(name, of, tokens, width, features, k):
    base, _, platform = name.partition(" of a ")
    function = dispatch.find(base, of, tokens=tokens, features=features, k=k, width=width)

    def there(*arguments):
        """What plain XLA does on another platform, run on this one."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxinterp.kernels.platforms.current", lambda: platform)
            return function(*arguments)

    return there if platform else function


def encoder(name, shape):
    """The encode pass, or a skip where the implementation says that it cannot do this shape."""
    try:
        return find(name, "encode", *shape)
    except UserError as refused:
        pytest.skip(str(refused))


def problem(shape, dtype=jnp.float32, seed=0):
    tokens, width, features, _ = shape
    rng = np.random.default_rng(seed)
    x, rows = rng.normal(size=(tokens, width)), rng.normal(size=(features, width)) / width**0.5
    return jnp.asarray(x, dtype), jnp.asarray(rows, dtype), jnp.asarray(0.1 * rng.normal(size=features), jnp.float32)


def entries(shape, seed=1):
    """Values and indices: some twice in a token, some that name no row."""
    tokens, _, features, k = shape
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, features + 1, (tokens, k))
    return jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32), jnp.asarray(indices, jnp.int32)


@encoder_cases
def test_encode_selects_what_float64_selects(name, shape, dtype):
    """Invariant 23."""
    x, rows, bias = problem(shape, dtype)
    values, indices = encoder(name, shape)(x, rows, bias, shape[3])
    assert values.dtype == jnp.float32 and indices.dtype == jnp.int32 and values.shape == (shape[0], shape[3])
    oracle.check_selection(values, indices, x, rows, bias)


@every_encoder
@pytest.mark.parametrize("k", [1, 6, 31])
def test_ties_go_to_the_lowest_index(name, k):
    """Invariant 23."""
    shape = (21, 8, 300, k)
    rng = np.random.default_rng(k)
    x, rows = (jnp.asarray(rng.integers(-1, 2, size), jnp.float32) for size in ((21, 8), (300, 8)))
    values, indices = encoder(name, shape)(x, rows, jnp.zeros(300), k)
    expected_values, expected_indices = oracle.topk(oracle.pre_activations(x, rows, np.zeros(300)), k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(indices, expected_indices)


@every_encoder
def test_forbidden_features_come_last_by_index(name):
    shape = (9, 16, 200, 12)
    x, rows, bias = problem(shape)
    bias = jnp.where(jnp.arange(200) % 40 == 3, bias, -jnp.inf)  # five may be chosen
    values, indices = encoder(name, shape)(x, rows, bias, 12)
    expected_values, expected_indices = oracle.topk(oracle.pre_activations(x, rows, bias), 12)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)


@every_encoder
def test_rows_of_negative_values_are_selected_alike(name):
    shape = (9, 16, 200, 12)
    x, rows, bias = problem(shape)
    values, indices = encoder(name, shape)(x, rows, bias - 1000, 12)
    oracle.check_selection(values, indices, x, rows, bias - 1000)


@every_encoder
def test_nan_counts_as_the_greatest_number(name):
    """Invariant 23."""
    shape = (9, 16, 200, 4)
    x, rows, bias = problem(shape)
    bias = bias.at[150].set(jnp.nan).at[77].set(jnp.copysign(jnp.nan, -1.0))
    values, indices = encoder(name, shape)(x, rows, bias, 4)
    expected_values, expected_indices = oracle.topk(oracle.pre_activations(x, rows, bias), 4)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)


@cases
def test_sparse_passes_equal_the_dense_formulas(name, shape, dtype):
    _, width, features, _ = shape
    g, rows, _ = problem(shape, dtype)
    values, indices = entries(shape)
    tolerance = 1e-5 if dtype == jnp.float32 or name not in ("dense", "reference") else 1e-2
    got = find(name, "gather_sum", *shape)(values, indices, rows)
    oracle.close(got, oracle.gather_sum(values, indices, rows), tolerance)
    oracle.close(find(name, "sampled_dot", *shape)(g, rows, indices), oracle.sampled_dot(g, rows, indices))
    got = find(name, "outer_sum", *shape)(values, indices, g, features)
    oracle.close(got, oracle.outer_sum(values, indices, g, features), tolerance)
    assert got.shape == (features, width) and got.dtype == jnp.float32
    untouched = np.setdiff1d(np.arange(features), np.asarray(indices))
    assert not np.asarray(got)[untouched].any(), "a row without entries is not zero"


@every
def test_one_feature_may_have_every_token(name):
    shape = (300, 20, 40, 3)
    g, _, _ = problem(shape)
    values, indices = entries(shape)
    indices = indices.at[:, 1].set(7)
    got = find(name, "outer_sum", *shape)(values, indices, g, 40)
    oracle.close(got, oracle.outer_sum(values, indices, g, 40))


@every
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**31), st.data())
def test_small_shapes_of_any_kind(name, tokens, width, features, seed, data):
    if name.startswith("mosaic"):
        tokens, features = min(tokens, 3), min(features, 9)
    k = data.draw(st.integers(1, features))
    shape = (tokens, width, features, k)
    rng = np.random.default_rng(seed)
    x, rows = (jnp.asarray(rng.integers(-2, 3, (n, width)), jnp.float32) for n in (tokens, features))
    bias = jnp.asarray(np.where(rng.random(features) < 0.3, -np.inf, rng.integers(-2, 3, features)), jnp.float32)
    try:
        run = find(name, "encode", *shape)
    except UserError:
        run = find("xla", "encode", *shape)
    got = run(x, rows, bias, k)
    for ours, right in zip(got, oracle.topk(oracle.pre_activations(x, rows, bias), k), strict=True):
        np.testing.assert_array_equal(ours, right)
    values, indices = entries(shape, seed % 1000)
    oracle.close(find(name, "gather_sum", *shape)(values, indices, rows), oracle.gather_sum(values, indices, rows))
    oracle.close(find(name, "sampled_dot", *shape)(x, rows, indices), oracle.sampled_dot(x, rows, indices))
    got = find(name, "outer_sum", *shape)(values, indices, x, features)
    oracle.close(got, oracle.outer_sum(values, indices, x, features))


def test_a_lost_entry_would_be_seen():
    """The control: the oracle's check refuses a selection with one wrong feature, and one value off."""
    shape = SHAPES[3]
    x, rows, bias = problem(shape)
    values, indices = (np.array(array) for array in find("xla", "encode", *shape)(x, rows, bias, 32))
    oracle.check_selection(values, indices, x, rows, bias)
    outsider = next(feature for feature in range(1000) if feature not in indices[5])
    for spoil in ("index", "value"):
        spoilt_values, spoilt_indices = values.copy(), indices.copy()
        if spoil == "index":
            spoilt_indices[5, -1] = outsider
            spoilt_values[5, -1] = (x[5] @ rows[outsider] + bias[outsider]).item()
        else:
            spoilt_values[5, -1] -= 1e-3
        with pytest.raises(AssertionError):
            oracle.check_selection(spoilt_values, spoilt_indices, x, rows, bias)
