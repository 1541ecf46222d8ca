"""Relevance rules: values never change (invariant 4), and relevance is conserved (RelP, arXiv 2508.21258)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models.edits import Add
from jaxinterp.models.layers import Linear, Norm
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import ACTIVATIONS, EXACT, RELEVANCE, Rules, activate, gate_product
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise

CONFIG = TransformerConfig(
    vocab_size=40, d_model=16, layers=3, heads=2, kv_heads=2, head_dim=8, d_mlp=24, context=32, rotary_dimensions=8
)


def bias_free_network(key, layers=3, d=12, m=20):
    """RMSNorm + SwiGLU residual blocks and a readout, in float64."""
    blocks = []
    for _ in range(layers):
        key, *keys = jax.random.split(key, 4)
        gate, up, down = (jax.random.normal(k, shape) for k, shape in zip(keys, [(d, m), (d, m), (m, d)], strict=True))
        mlp = MLP(Linear(gate, None), Linear(up, None), Linear(down, None), "silu")
        blocks.append((Norm(jnp.ones(d), None, "rms", 0.0, 0.0), mlp))
    readout = jax.random.normal(key, (d,))

    def network(x, rules):
        for norm, mlp in blocks:
            x = x + mlp(norm(x, rules), rules=rules)
        return x @ readout

    return network


def test_relevance_is_conserved_and_plain_gradients_are_not():
    with jax.enable_x64(True):
        network = bias_free_network(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (12,), jnp.float64)
        value = jax.jit(lambda x: network(x, EXACT))(x)

        def sum_of_relevance(rules):
            return x @ jax.jit(jax.grad(lambda x: network(x, rules)))(x)

        assert abs(sum_of_relevance(RELEVANCE) - value) < 1e-10 * abs(value)
        assert abs(sum_of_relevance(EXACT) - value) > 0.05 * abs(value)
        assert abs(sum_of_relevance(Rules(norm=True, activation=True)) - value) > 0.05 * abs(value)


def test_holding_attention_conserves_through_a_whole_transformer():
    model = initialise(CONFIG, jax.random.key(0))
    tokens = jnp.arange(10)[None]
    rules = Rules(norm=True, activation=True, gate=True, attention=True)
    embedded = jax.jit(lambda: run(model, tokens)["embed"])()

    def logit(delta, rules):
        return run(model, tokens, edits={"embed": Add(delta)}, rules=rules).logits[0, -1, 3]

    slope = jax.jit(jax.value_and_grad(logit), static_argnums=1)
    (value, plain), (_, held) = (slope(jnp.zeros_like(embedded), each) for each in (EXACT, rules))
    relevance, plain = (jnp.sum(embedded * each) for each in (held, plain))
    np.testing.assert_allclose(relevance, value, rtol=1e-3)
    assert abs(plain - value) > 0.05 * abs(value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rules_never_change_values(dtype):
    """Invariant 4, to the last bit."""
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), initialise(CONFIG, jax.random.key(0)))
    tokens = jnp.arange(20).reshape(2, 10)
    everything = Rules(norm=True, activation=True, gate=True, attention=True)
    exact, ruled = (jax.jit(lambda rules=rules: run(model, tokens, rules=rules))() for rules in (EXACT, everything))
    for name, value in exact.arrays.items():
        np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(ruled[name], np.float32), err_msg=name)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_secant_slope(name):
    x = jnp.asarray([-3.0, -0.5, 0.0, 1e-7, 0.7, 4.0])
    slope = jax.vmap(jax.grad(lambda x: activate(name, x, RELEVANCE)))(x)
    at_zero = jax.grad(ACTIVATIONS[name])(0.0)
    expected = jnp.where(jnp.abs(x) < 1e-6, at_zero, ACTIVATIONS[name](x) / jnp.where(x == 0, 1, x))
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_half_rule():
    a, b = jnp.asarray(3.0), jnp.asarray(-2.0)
    assert jax.grad(lambda a, b: gate_product(a, b, RELEVANCE), (0, 1))(a, b) == (-1.0, 1.5)
    assert jax.grad(lambda a, b: gate_product(a, b, EXACT), (0, 1))(a, b) == (-2.0, 3.0)
