"""What saves memory changes little or nothing else: parts of a harvest, narrow activations and moments, remat."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import Harvest
from jaxinterp.kernels import encode_topk, sparse_decode
from jaxinterp.methods import SkipTranscoder, Transcoder
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.objectives import total
from jaxinterp.objectives.end_to_end import divergence
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.program import Program

SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 10}
METHOD = SkipTranscoder(features=64, k=4, dead_after=500, learning_rate=3e-3)


def compiled(method, **memory):
    """The step, for one device, of larger windows."""
    shapes = model_shapes("tiny", dtype="float32")
    program = Program(method.recipe(20), method.needs("blocks/1/mlp"), make_mesh(), 4096, 256, 2, seed=0, **memory)
    return program.compile(shapes, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_a_harvest_in_parts_gives_the_same_rows_in_the_same_order(subject, text, mesh):
    """Invariant 24."""
    whole = fit(METHOD, subject, text, **SIZES)
    parts = fit(METHOD, subject, text, **SIZES, harvest_parts=4, mesh=make_mesh(*mesh))
    for name, leaf in named_leaves(whole.decomposition).items():
        np.testing.assert_allclose(named_leaves(parts.decomposition)[name], leaf, rtol=0, atol=3e-5, err_msg=name)


def memory(parts):
    """Bytes of temporary memory of a step whose harvest is cut into so many parts."""
    return compiled(METHOD, harvest_parts=parts).memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def at_once():
    return memory(1)


def test_a_harvest_in_parts_takes_less_memory(at_once):
    assert memory(8) < 0.6 * at_once


def test_parts_must_divide_the_windows_of_a_shard(subject, text):
    with pytest.raises(UserError, match=r"harvest_parts=3 cannot cut the 8 windows .* take a divisor of 4"):
        fit(METHOD, subject, text, **SIZES, harvest_parts=3, mesh=make_mesh(2, 1))


def test_parts_are_cut_and_joined_in_order():
    take = Harvest(("x",), parts=2, shards=3)
    rows = jnp.arange(24).reshape(12, 2)
    cut = take._cut(rows)
    assert cut.shape == (2, 6, 2)
    assert cut[0, :, 0].tolist() == [0, 2, 8, 10, 16, 18]  # two windows of every shard
    np.testing.assert_array_equal(take._join(cut), rows)


@pytest.mark.slow
def test_bfloat16_activations_train_alike(subject, text):
    """The buffer is half as large, parameters and their gradients stay float32, and the fit is nearly as good."""
    wide, narrow = (fit(METHOD, subject, text, **SIZES, activations=dtype) for dtype in ("float32", "bfloat16"))
    assert narrow.state.buffer.arrays["blocks/1/mlp/in"].dtype == jnp.bfloat16
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(narrow.state.method))
    assert narrow.history[-1]["fvu"] == pytest.approx(wide.history[-1]["fvu"], rel=0.02)
    assert narrow.history[-1]["fvu"] != wide.history[-1]["fvu"]


def test_the_encoder_s_gradient_is_not_rounded_to_bfloat16():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (32, 16)).astype(jnp.bfloat16)
    rows, decoder = (jax.random.normal(key, (64, 16)) for key in keys[1:])

    def loss(rows):
        values, indices = encode_topk(x, rows, jnp.zeros(64), k=4)
        return jnp.sum(sparse_decode(values, indices, decoder) ** 2)

    gradient = jax.grad(loss)(rows)
    assert gradient.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(gradient - gradient.astype(jnp.bfloat16).astype(jnp.float32)))) > 0
    exact = encode_topk(x.astype(jnp.float32), rows.astype(jnp.bfloat16).astype(jnp.float32), jnp.zeros(64), k=4)
    for ours, other in zip(encode_topk(x, rows, jnp.zeros(64), k=4), exact, strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_first_moment_in_bfloat16(subject, text):
    wide = fit(METHOD, subject, text, **SIZES)
    narrow = fit(replace(METHOD, moments="bfloat16"), subject, text, **SIZES)
    kinds = {name: leaf.dtype for name, leaf in named_leaves(narrow.state.method.optimizer).items()}
    assert {kind for name, kind in kinds.items() if "/mu/" in name} == {jnp.dtype("bfloat16")}
    assert {kind for name, kind in kinds.items() if "/nu/" in name} == {jnp.dtype("float32")}
    assert narrow.history[-1]["fvu"] == pytest.approx(wide.history[-1]["fvu"], rel=0.02)


@pytest.mark.slow
def test_remat_computes_again_and_changes_no_gradient(subject, text):
    """The model in the loop: residual streams are kept, the rest is computed again."""
    kept, again = (
        Transcoder(features=64, activation="relu", learning_rate=3e-3, objective=total(divergence(remat=remat)))
        for remat in (False, True)
    )
    first, second = (fit(method, subject, text, **(SIZES | {"steps": 10})) for method in (kept, again))
    assert second.history[-1]["kl"] == pytest.approx(first.history[-1]["kl"], abs=1e-6)
    # Memory is the compiler's affair: a TPU's takes a fifth (docs/performance.md), a CPU's computes all of it at once.
    plain, remat = (compiled(method).cost_analysis()["flops"] for method in (kept, again))
    assert 1.1 * plain < remat < 1.6 * plain
