"""Attention in blocks of queries, which a CPU takes where nobody looks at the pattern: the numbers of all pairs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.data.activations import harvest
from jaxinterp.models.attention import BLOCKS, LONG, Attention
from jaxinterp.models.layers import no_tap, random_linear
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.transformer import TransformerConfig, initialise

BATCH, SEQ, WIDTH = 2, LONG, 24
KINDS = {
    "plain": {},
    "window": {"window": 40},
    "cap": {"cap": 2.0},
    "sinks": {"sinks": jnp.linspace(-1.0, 1.0, 6)},
    "chunk": {"chunk": 48},
    "not causal": {"causal": False},
}


def attention(**kind):
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((WIDTH, 24), (WIDTH, 8), (WIDTH, 8), (24, WIDTH))
    q, k, v, o = (random_linear(key, *size, bias=False) for key, size in zip(keys, sizes, strict=True))
    fields = {
        "q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o, "query_norm": None, "key_norm": None, "heads": 6,
        "kv_heads": 2, "scale": 0.3, "causal": True, "window": None, "cap": None, "rotary_dimensions": 4,
        "rotary_base": 1e4, "rotary_scaling": None,
    }  # fmt: skip
    return Attention(**fields | kind)


def looked_at(name, value):
    """A tap that may look at every array: the pattern is made."""
    return value


def both(given, x, real, rules):
    """Output and gradient in x, by blocks and by all pairs."""

    def of(tap):
        loss = lambda x: jnp.sum(jnp.sin(given(x, tap=tap, rules=rules, real=real)))
        return given(x, tap=tap, rules=rules, real=real), jax.grad(loss)(x)

    return jax.jit(lambda: (of(no_tap), of(looked_at)))()


def has_all_pairs(given, x, tap):
    """Whether the traced program holds a whole pattern."""
    text = str(jax.make_jaxpr(lambda x: given(x, tap=tap))(x))
    return f"{SEQ},{SEQ}]" in text.replace(f"bool[{SEQ},{SEQ}]", "").replace(f"i32[{SEQ},{SEQ}]", "")


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((BATCH, SEQ, WIDTH)), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_the_numbers_of_all_pairs(kind, x):
    """Values and derivatives; padding in the second window, and the rule that holds the pattern, with the plain one."""
    given = attention(**KINDS[kind])
    plain = kind == "plain"
    real = jnp.ones((BATCH, SEQ), bool).at[1, :30].set(False) if plain else None
    for rules in (EXACT, Rules(attention=True)) if plain else (EXACT,):
        (out, gradient), (expected, by_pairs) = both(given, x, real, rules)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, by_pairs, rtol=1e-4, atol=1e-4)


def test_a_causal_mask_alone_leaves_pairs_out(x):
    """No whole pattern is in the program where nobody looks; one is where somebody does, or without the mask."""
    assert not has_all_pairs(attention(), x, no_tap)
    assert has_all_pairs(attention(), x, looked_at)
    assert has_all_pairs(attention(causal=False), x, no_tap)


def test_keys_behind_a_block_would_show(x):
    """Control: a block without its last key is another number, as a prefix cut one too short would give."""
    given = attention()
    cut = jnp.tril(jnp.ones((SEQ, SEQ), bool), -1).at[0, 0].set(True)
    query, key, value = given.project(x)
    right = given.attend(query, key, value, jnp.tril(jnp.ones((SEQ, SEQ), bool)), in_order=True)
    wrong = given.attend(query, key, value, cut, in_order=True)
    assert float(jnp.max(jnp.abs(right - wrong))) > 1e-2
    assert SEQ % BLOCKS == 0


def test_a_harvest_makes_no_pattern():
    """Its program holds no array of all pairs, and has the numbers of a run that keeps everything."""
    config = TransformerConfig(
        vocab_size=50, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_mlp=16, context=SEQ, rotary_dimensions=8
    )
    model = initialise(config, jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (2, SEQ)), jnp.int32)
    windows = {"tokens": tokens, "weight": jnp.ones(tokens.shape)}
    take = eqx.filter_jit(lambda names: harvest(model, windows, names).arrays)
    text = str(jax.make_jaxpr(lambda: harvest(model, windows, ("blocks/0/mlp/out",)).arrays)())
    assert f"f32[2,2,{SEQ},{SEQ}]" not in text
    found, with_pattern = take(("blocks/0/mlp/out",)), take(("blocks/0/mlp/out", "blocks/0/attn/pattern"))
    np.testing.assert_allclose(found["blocks/0/mlp/out"], with_pattern["blocks/0/mlp/out"], rtol=1e-5, atol=1e-5)
