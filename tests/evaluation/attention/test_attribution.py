"""Attribution of attention features: parts by head and by source add up to the pre-activation, and say who did it."""

from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.evaluation.attention.attribution import (
    by_head,
    by_source,
    head_shares,
    mean_distance,
    reading,
    share_at,
    share_beyond,
)
from jaxinterp.methods.sparse.attention_sparse_autoencoder import AttentionSparseAutoencoder
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise

SITE = "blocks/1/attn"
GROUPED = TransformerConfig(
    vocab_size=50,
    d_model=24,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    d_mlp=16,
    context=32,
    rotary_dimensions=8,
    windows=(None, 5),
    qkv_bias=True,
    attention_out_bias=True,
)


def biased(model):
    """The biases of attention, which start at 0, made visible."""
    places = lambda model: [bias for block in model.blocks for bias in (block.attn.v_proj.bias, block.attn.o_proj.bias)]
    noise = [jax.random.normal(jax.random.key(n), bias.shape) for n, bias in enumerate(places(model))]
    return eqx.tree_at(places, model, noise)


@cache
def subject(name):
    """(model, tokens, trace)."""
    if name == "tiny":
        model, size = load("tiny").model, 256
    else:
        model, size = biased(initialise(GROUPED, jax.random.key(0))), 50
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, size)
    return model, tokens, eqx.filter_jit(run)(model, tokens)


def dictionary_of(trace, array) -> Dictionary:
    """Random read vectors and biases, normalised by the array itself."""
    values = trace[f"{SITE}/{array}"]
    rows = values.reshape(values.shape[0] * values.shape[1], -1)
    method = AttentionSparseAutoencoder(features=20, k=4, array=array)
    sample = make_batch({f"{SITE}/{array}": rows}, jnp.ones(len(rows)), method.needs(SITE))
    start = method.recipe(1).init(jax.random.key(2), sample, None).decomposition
    keys = jax.random.split(jax.random.key(3), 2)
    random = (jax.random.normal(keys[0], start.encoder.shape), jax.random.normal(keys[1], start.encoder_bias.shape))
    return eqx.tree_at(lambda d: (d.encoder, d.encoder_bias), start, random)


def parts(model, trace, dictionary, indices, swap=lambda attention: attention):
    """By head and by source, each with the constant added up, and the pre-activations that they should give."""
    attention = swap(model.blocks[1].attn)
    read = reading(dictionary, attention)
    x = trace[dictionary.sites.reads].reshape(*indices.shape[:2], -1)
    pre = dictionary.normalise(x) @ dictionary.encoder.T + dictionary.encoder_bias
    expected = jnp.take_along_axis(pre, indices, axis=-1)
    constant = read.constant[indices]
    heads = by_head(read, trace[f"{SITE}/z"], indices)
    sources = by_source(read, attention, trace[f"{SITE}/in"], trace[f"{SITE}/pattern"], indices)
    return jnp.sum(heads, axis=-1) + constant, jnp.sum(sources, axis=-1) + constant, expected


@pytest.mark.parametrize("array", ["z", "out"])
@pytest.mark.parametrize("name", ["tiny", "grouped"])
def test_both_kinds_of_parts_add_up_to_the_pre_activation(name, array):
    model, tokens, trace = subject(name)
    dictionary = dictionary_of(trace, array)
    indices = jax.random.randint(jax.random.key(4), (*tokens.shape, 5), 0, 20)
    heads, sources, expected = parts(model, trace, dictionary, indices)
    np.testing.assert_allclose(heads, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sources, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(expected).max()) > 1


@pytest.mark.parametrize("name", ["tiny", "grouped"])
def test_values_of_the_wrong_group_do_not_add_up(name):
    """The control: key-value heads in another order."""

    def swap(attention):
        turned = lambda array: jnp.roll(array, array.shape[-1] // attention.kv_heads, axis=-1)
        value = attention.v_proj
        bias = None if value.bias is None else turned(value.bias)
        return eqx.tree_at(lambda a: a.v_proj, attention, type(value)(turned(value.weight), bias))

    model, tokens, trace = subject(name)
    dictionary = dictionary_of(trace, "z")
    indices = jnp.broadcast_to(jnp.arange(5), (*tokens.shape, 5))
    _, sources, expected = parts(model, trace, dictionary, indices, swap)
    assert float(jnp.abs(sources - expected).mean()) > 0.1


def test_a_feature_that_reads_one_head_and_one_position_says_so():
    """Attention that looks one back exactly; a read vector in head 2 alone."""
    model, tokens, trace = subject("grouped")
    dictionary = dictionary_of(trace, "z")
    rows = jnp.zeros_like(dictionary.encoder).at[0, 16:24].set(1.0)
    dictionary = eqx.tree_at(lambda d: d.encoder, dictionary, rows)
    attention, indices = model.blocks[1].attn, jnp.zeros((*tokens.shape, 1), jnp.int32)
    read = reading(dictionary, attention)
    heads = by_head(read, trace[f"{SITE}/z"], indices)[:, :, 0]
    assert float(jnp.abs(heads[..., 2]).min()) > 0 and float(jnp.abs(jnp.delete(heads, 2, axis=-1)).max()) == 0

    back = jnp.broadcast_to(jnp.eye(12, k=-1).at[0, 0].set(1.0), trace[f"{SITE}/pattern"].shape)
    sources = by_source(read, attention, trace[f"{SITE}/in"], back, indices)
    np.testing.assert_allclose(share_at(sources, 1)[:, 1:], 1, rtol=1e-6)
    np.testing.assert_allclose(mean_distance(sources)[:, 1:], 1, rtol=1e-6)
    np.testing.assert_allclose(mean_distance(sources)[:, 0], 0, atol=1e-6)
    assert float(share_beyond(sources, 1).max()) == 0 and float(share_beyond(sources, 0)[:, 1:].min()) == 1


def test_shares_of_heads_by_hand():
    rows = jnp.array([[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(head_shares(rows, 2), [[1, 0], [0.25, 0.75], [0, 0]])
    with pytest.raises(UserError, match="heads=3 do not share 4 dimensions evenly"):
        head_shares(rows, 3)


def test_other_arrays_and_replaced_sublayers_are_refused():
    model, _, trace = subject("tiny")
    dictionary = dictionary_of(trace, "z")
    with pytest.raises(UserError, match="a MLP has no heads to attribute to"):
        reading(dictionary, model.blocks[1].mlp)
    other = replace(dictionary, sites=Sites("blocks/1/mlp/out", "blocks/1/mlp/out"))
    with pytest.raises(UserError, match="'blocks/1/mlp/out': attribution to heads needs attn/z or attn/out"):
        reading(other, model.blocks[1].attn)
