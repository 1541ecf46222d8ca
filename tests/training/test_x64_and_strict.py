"""Dtypes are said, not left to JAX's default: x64, strict promotion and rank promotion "raise" change nothing.

A process may have `JAX_ENABLE_X64=1` or strict promotion set by another library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import load, methods, run, score, sites
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.gates import JumpReLU, jump, step
from jaxinterp.evaluation.several import score_layers
from jaxinterp.training.fit import expand, fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.program import Program
from tests.training.small_x64 import FLOATS, ONE, SIZES, TEXT, floats, strict, subject

ALL = "blocks/*/mlp"
METHODS = {
    "skip transcoder": (methods.SkipTranscoder(features=12, k=2), ONE),
    "transcoder": (methods.Transcoder(features=12, k=2), ONE),
    "autoencoder": (methods.SparseAutoencoder(features=12, k=2), ONE),
    "batch top-k": (methods.SparseAutoencoder(features=12, k=2, activation="batch_topk"), ONE),
    "jumprelu": (methods.JumpReLUSparseAutoencoder(features=12), ONE),
    "gated": (methods.GatedSparseAutoencoder(features=12), ONE),
    "matryoshka": (methods.MatryoshkaSparseAutoencoder(features=12, k=2, prefixes=(4, 12)), ONE),
    "group bias": (methods.GroupBiasAdaptation(features=20), ONE),
    "top-afa": (methods.TopAFASparseAutoencoder(features=12), ONE),
    "gradient": (methods.GradientSparseAutoencoder(features=12, k=2), ONE),
    "attention": (methods.AttentionSparseAutoencoder(features=12, k=2), "blocks/1/attn"),
    "cross-layer": (methods.CrossLayerTranscoder(features=12), ALL),
    "per layer": (methods.PerLayerTranscoders(methods.Transcoder(features=12, k=2)), ALL),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_step_of_every_method_is_float32_under_x64(name):
    """Traced, not compiled: a float64 beside a float32 in a branch, a loop or a cotangent is an error of tracing."""
    method, site = METHODS[name]
    with jax.enable_x64(True):
        model = subject().model
        program = Program(method.recipe(1), method.needs(expand(model, site)), make_mesh(), 16, 8, 2, 0)
        with jax.set_mesh(program.mesh):
            program.check(model)
            state = program.abstract_state(model)
        assert floats(state) == FLOATS


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_float32_under_x64(name):
    method, site = METHODS[name]
    with jax.enable_x64(True):
        result = fit(method, subject(), TEXT, site=site, **SIZES)
        assert floats(result.decomposition) == FLOATS and floats(result.state) == FLOATS
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.decomposition))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skip transcoder", "jumprelu", "cross-layer"])
def test_fit_and_score_under_strict_promotion(name):
    method, site = METHODS[name]
    with strict():
        small = subject()
        assert run(small.model, np.array([[1, 2, 3]])).logits.shape == (1, 3, 16)
        trained = fit(method, small, TEXT, site=site, **SIZES).decomposition
        rows = score_layers(trained, small, TEXT, tokens=32, ce_tokens=16) if site == ALL else []
        assert np.isfinite((rows or [score(trained, small, TEXT, tokens=32, ce_tokens=16)])[0]["fvu"])
        with pytest.raises((TypeError, ValueError)):  # the settings are on: a user's own code is still held to them
            jnp.ones((2, 3), jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_a_forward_pass_and_names_under_strict_promotion():
    small = subject()
    expected = run(small.model, np.array([[1, 2, 3]])).logits
    with strict():
        np.testing.assert_array_equal(run(small.model, np.array([[1, 2, 3]])).logits, expected)
        assert "blocks/1/mlp/out" in sites(small.model)
        with pytest.raises((TypeError, ValueError)):  # the settings hold for a user's own code, as before
            jnp.ones((2, 3), jnp.float32) + jnp.ones(3, jnp.bfloat16)


@pytest.mark.parametrize("under", [lambda: jax.enable_x64(True), strict], ids=["x64", "strict"])
def test_tiny_is_the_same_model(under):
    expected = named_leaves(load("tiny").model)
    with under():
        found = named_leaves(load("tiny").model)
        for name, leaf in expected.items():
            assert found[name].dtype == leaf.dtype
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf), err_msg=name)


@pytest.mark.parametrize("function", [jump, step])
def test_cotangents_have_the_parameters_dtype(function):
    with jax.enable_x64(True):
        a = jnp.asarray([[0.1, 0.2, 0.3]], jnp.float32)
        threshold = JumpReLU.start(3, 0.15, bandwidth=0.5, parametrisation="raw").threshold
        assert threshold.dtype == jnp.float32
        for weight in (1.0, jnp.float64(2.0), np.float32(2.0)):
            gradients = jax.grad(lambda a, b, w=weight: jnp.sum(w * function(a, b, 0.5)), argnums=(0, 1))(a, threshold)
            assert [gradient.dtype for gradient in gradients] == [jnp.float32, jnp.float32]
