"""On a mesh of eight devices: the same indices, the same training, and only the collectives that are named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import encode_groups, encode_ranked, encode_topk, keep_largest, rank, select_topk
from jaxinterp.preflight.program_text import exchanges, size_of
from tests.kernels import programs

TOKENS, FEATURES, WIDTH, K = 48, 64, 24, 7
meshes = pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)


def mesh_of(shape):
    return jax.make_mesh(shape, ("data", "feature"), axis_types=(AxisType.Auto,) * 2)


def integers(*shape, seed=0):
    """Small integers: pre-activations are full of ties."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


def spread(parameters, mesh):
    specs = {name: P() if name == "decoder_bias" else P("feature") for name in parameters}
    return {name: jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in parameters.items()}


SELECTIONS = {
    "value": lambda x, rows, bias: encode_topk(x, rows, bias, k=K),
    "one feature of a shard": lambda x, rows, bias: encode_topk(x, rows, bias, k=40),
    "forbidden": lambda x, rows, bias: encode_topk(x, rows, bias, k=K, allowed=jnp.arange(FEATURES) % 13 == 0),
    "size": lambda x, rows, bias: encode_ranked(x, rows, bias, rank.by_size(), k=K),
    "threshold": lambda x, rows, bias: encode_ranked(x, rows, bias, rank.above(jnp.linspace(2, 4, FEATURES)), k=K),
    "effect": lambda x, rows, bias: encode_ranked(x, rows, bias, rank.by_effect(x + 1, rows - 1), k=K),
    "groups": lambda x, rows, bias: encode_groups(x, rows, bias, k=16),
    "pre-activations": lambda x, rows, bias: select_topk(x @ rows.T + bias, k=K),
    "batch": lambda x, rows, bias: keep_largest(encode_topk(x, rows, bias, k=20)[0], 5 * TOKENS),
}


@meshes
@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_bit_identical(shape, name):
    """Invariant 5, ties included."""
    x, rows, bias = integers(TOKENS, WIDTH), integers(FEATURES, WIDTH, seed=1), integers(FEATURES, seed=2)
    expected = SELECTIONS[name](x, rows, bias)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, P(s))) for a, s in ((x, "data"), (rows, "feature"), (bias, "feature"))
        ]
        got = jax.jit(SELECTIONS[name])(*placed)
    for ours, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, right)


@meshes
def test_twenty_steps_of_adam_agree(shape):
    """Invariant 5."""
    optimizer = optax.adam(1e-3)

    def train(parameters, x):
        state = optimizer.init(parameters)
        step = jax.jit(lambda parameters, state, x: programs.step(parameters, state, x, K, optimizer))
        for _ in range(20):
            parameters, state = step(parameters, state, x)
        return parameters

    parameters = programs.parameters(FEATURES, WIDTH)
    x = jax.random.normal(jax.random.key(5), (TOKENS, WIDTH))
    alone, mesh = train(parameters, x), mesh_of(shape)
    with jax.set_mesh(mesh):
        together = train(spread(parameters, mesh), jax.device_put(x, NamedSharding(mesh, P("data"))))
    for name in parameters:
        np.testing.assert_allclose(together[name], alone[name], rtol=0, atol=2e-5)
        assert not np.allclose(alone[name], parameters[name], atol=1e-3), f"{name} did not train"


def test_collectives_of_a_gradient():
    """Over `feature`: candidates, one [tokens, d] sum forward, one [tokens, k] sum backward; weights over `data`."""
    mesh = mesh_of((2, 4))
    with jax.set_mesh(mesh):
        parameters = spread(programs.parameters(FEATURES, WIDTH), mesh)
        x = jax.device_put(jnp.ones((TOKENS, WIDTH)), NamedSharding(mesh, P("data")))
        gradient = jax.jit(jax.grad(lambda parameters, x: programs.loss(parameters, x, K)))
        text = gradient.lower(parameters, x).compile().as_text()
    owned, of_data, candidates = FEATURES // 4, TOKENS // 2, 4 * K
    found = sorted(f"{kind} {shape}" for kind, shapes in exchanges(text) for shape in shapes)
    assert sorted(set(found)) == sorted(
        {
            f"all-gather f32[{of_data},{candidates}]",
            f"all-gather s32[{of_data},{candidates}]",
            f"all-reduce f32[{of_data},{WIDTH}]",
            f"all-reduce f32[{of_data},{K}]",
            f"reduce-scatter f32[{owned // 2},{WIDTH}]",
            f"reduce-scatter f32[{owned // 2}]",
            f"all-reduce f32[{WIDTH}]",
        }
    )
    assert found.count(f"reduce-scatter f32[{owned // 2},{WIDTH}]") == 2, "one for each matrix"


def test_the_bytes_of_the_candidates():
    """A sharded encode moves tokens x k x shards x 8 bytes per data shard, and nothing else."""
    mesh = mesh_of((2, 4))
    with jax.set_mesh(mesh):
        parameters = spread(programs.parameters(FEATURES, WIDTH), mesh)
        x = jax.device_put(jnp.ones((TOKENS, WIDTH)), NamedSharding(mesh, P("data")))
        encode = jax.jit(lambda p, x: encode_topk(x, p["encoder"], p["encoder_bias"], k=K))
        found = exchanges(encode.lower(parameters, x).compile().as_text())
    assert sum(size_of(array) for _, arrays in found for array in arrays) == TOKENS // 2 * K * 4 * 8


def test_what_does_not_divide_is_refused():
    with jax.set_mesh(mesh_of((2, 4))):
        x, rows, bias = integers(TOKENS, WIDTH), integers(FEATURES, WIDTH), integers(FEATURES)
        with pytest.raises(UserError, match="features=63 cannot be spread evenly over the mesh axis feature=4"):
            encode_topk(x, rows[:63], bias[:63], k=K)
        with pytest.raises(UserError, match="tokens=47 cannot be spread evenly over the mesh axis data=2"):
            encode_topk(x[:47], rows, bias, k=K)
        with pytest.raises(UserError, match="groups=2 cannot be spread evenly over the mesh axis feature=4"):
            encode_groups(x, rows, bias, k=2)


@meshes
def test_what_cannot_be_spread_is_selected_all_the_same(shape):
    """The axis need not be one of features: windows of a text, the six values of a code."""
    scores = integers(9, 6)
    expected = select_topk(scores, k=4)
    with jax.set_mesh(mesh_of(shape)):
        got = jax.jit(lambda scores: select_topk(scores, k=4))(scores)
    for ours, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, right)


@meshes
def test_real_numbers_choose_the_same_features_outside_rounding(shape):
    """A shard's matmul has other sizes than the whole: its sums may differ in their last bits."""
    rng = np.random.default_rng(0)
    x, rows, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(TOKENS, 96), (512, 96), (512,)])
    values, indices = encode_topk(x, rows, bias, k=K)
    with jax.set_mesh(mesh_of(shape)):
        got_values, got = jax.jit(lambda *arrays: encode_topk(*arrays, k=K))(x, rows, bias)
    np.testing.assert_allclose(got_values, values, rtol=1e-5)
    pre = np.sort(np.asarray(x @ rows.T + bias), axis=1)[:, ::-1]
    clear = (pre[:, :K] - pre[:, 1 : K + 1]).min(axis=1) > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], indices[clear])
