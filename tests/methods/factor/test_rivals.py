"""Mixture of decoders, mixture of linear transforms, product-key neurons: each against its sum over experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions import linear_transforms, mixture_of_decoders
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.methods.factor import linear_transforms as molt
from jaxinterp.methods.factor import mixture_of_decoders as mxd
from jaxinterp.methods.factor import product_key_neurons as pk

SITES = Sites("blocks/0/mlp/in", "blocks/0/mlp/out")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def sample(tokens=200, d_in=6, d_out=5):
    draw = np.random.default_rng(7)
    x = draw.normal(size=(tokens, d_in)) * 3 + 1
    y = np.tanh(x @ draw.normal(size=(d_in, d_out))) + 2
    arrays = {SITES.reads: x.astype(np.float32), SITES.writes: y.astype(np.float32)}
    return make_batch(arrays, np.ones(tokens), SITES)


def test_a_mixture_of_decoders_is_the_sum_over_its_experts(float64):
    x, gates = normal(0, 7, 6), jax.nn.relu(normal(1, 7, 9))
    encoder, bias, decoder, scale, out = normal(2, 8, 6), normal(3, 8), normal(4, 8, 5), normal(5, 9, 5), normal(6, 5)
    found = mixture_of_decoders.mix(x, gates, encoder, bias, decoder, scale, out, "relu")
    z = np.maximum(np.asarray(x @ encoder.T + bias), 0)
    wanted = np.asarray(out) + sum(
        np.asarray(gates)[:, n, None] * (z @ (np.asarray(decoder) @ np.diag(np.asarray(scale)[n]))) for n in range(9)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        mixture_of_decoders.feature_map(decoder, scale[3]), np.asarray(decoder) @ np.diag(scale[3]), atol=1e-14
    )
    assert np.linalg.matrix_rank(mixture_of_decoders.feature_map(decoder, scale[3])) == 5
    added = z @ np.asarray(decoder) + np.asarray(gates @ scale) + np.asarray(out)  # broken variant: sum for product
    assert np.abs(added - wanted).max() > 0.1


def test_transforms_are_the_sum_of_gated_linear_maps(float64):
    ranks = molt.halving_ranks(4, 1)
    assert ranks == (4, 2, 2, 1, 1, 1, 1)
    x, gates, read, write = normal(0, 7, 6), jax.nn.relu(normal(1, 7, 7)), normal(2, 12, 6), normal(3, 12, 5)
    found, at, wanted, norms = linear_transforms.transform(x, gates, read, write, ranks), 0, np.zeros((7, 5)), []
    for t, rank in enumerate(ranks):
        matrix = np.asarray(read[at : at + rank]).T @ np.asarray(write[at : at + rank])
        wanted += np.asarray(gates)[:, t, None] * (np.asarray(x) @ matrix)
        norms.append(np.linalg.norm(matrix))
        at += rank
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(molt.frobenius_norms(read, write, ranks), norms, rtol=1e-9)
    with pytest.raises(UserError, match="11 rows"):
        linear_transforms.transform(x, gates, read, write, (4, 2, 2, 1, 1, 1))
    shuffled = linear_transforms.transform(x, gates, read, write, ranks[::-1])
    assert np.abs(shuffled - wanted).max() > 0.1


def test_gates_keep_the_k_largest():
    pre = jnp.asarray([[3.0, -1, 2, 1], [-1, -2, -3, 0.5]])
    np.testing.assert_allclose(linear_transforms.gates(pre, "topk", 2), [[3, 0, 2, 0], [0, 0, 0, 0.5]])
    np.testing.assert_allclose(linear_transforms.gates(pre, "relu", 2), [[3, 0, 2, 1], [0, 0, 0, 0.5]])


METHODS = {
    "decoders": (mxd, mxd.MixtureOfDecodersMethod(features=12, hidden=8, k=4)),
    "transforms": (molt, molt.LinearTransformsMethod(ranks=(4, 2, 2), k=2)),
    "neurons": (pk, pk.ProductKeyNeuronsMethod(n=4, channels=2, knn=2, d_key=5)),
    "peer": (pk, pk.ProductKeyNeuronsMethod(n=4, channels=2, knn=2, d_key=5, kind="peer")),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_start_is_the_mean_and_sparse_codes_are_as_good_as_dense_ones(name):
    module, method = METHODS[name]
    batch = sample()
    found = module.start(method, jax.random.key(0), batch)
    np.testing.assert_allclose(found(batch.inputs), np.broadcast_to(batch.targets.mean(0), (200, 5)), atol=1e-5)
    field = "decoder" if name == "decoders" else "write"
    rows = normal(8, *getattr(found, field).shape).astype(jnp.float32)
    found = jax.tree.unflatten(
        jax.tree.structure(found), [rows if leaf is getattr(found, field) else leaf for leaf in jax.tree.leaves(found)]
    )
    codes = found.encode(batch.inputs)
    dense = DenseCodes(codes.dense())
    np.testing.assert_allclose(found.decode(codes, batch.inputs), found.decode(dense, batch.inputs), atol=1e-3)
    assert 0 < codes.active().max() <= 4
    assert found(batch.inputs.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_they_are_kept_on_disk(name, tmp_path):
    """Invariant 7."""
    module, method = METHODS[name]
    found = module.start(method, jax.random.key(0), sample())
    again = load_decomposition(save(found, tmp_path / "kept"))
    assert type(again) is type(found)
    assert jax.tree.structure(again) == jax.tree.structure(found)
    for first, second in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first, second)
