"""Parts of heads against NumPy: what each head writes to the stream, normed as the whole is, times the read vector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import TopK
from jaxinterp.evaluation.features.head_parts import head_parts
from jaxinterp.models.edits import Add
from jaxinterp.models.run import run
from tests.report.as_dictionary import as_dictionary

TOKENS = jnp.asarray(np.random.default_rng(3).integers(97, 105, (2, 12)))
POSITIONS, FEATURE = np.array([7, 11]), 5


def test_parts_of_heads_and_of_the_rest_add_up_to_the_pre_activation(subject, dictionary):
    scaled = dataclasses.replace(dictionary, input_scale=jnp.asarray(2.0), input_mean=0.1 + dictionary.input_mean)
    found = np.asarray(head_parts(scaled, subject.model, TOKENS, FEATURE, jnp.asarray(POSITIONS)), np.float64)
    trace, blocks = run(subject.model, TOKENS), subject.model.blocks
    rows = np.arange(2)
    at = lambda name: np.asarray(trace[name], np.float64)[rows, POSITIONS]
    stream, read = at("blocks/1/resid/mid"), at("blocks/1/mlp/in")
    assert subject.model.config.norm == "rms"
    gain = read / stream  # of each dimension: the scale is that of the whole stream
    vector = np.asarray(scaled.encoder[FEATURE], np.float64) / 2
    for layer in (0, 1):
        z, weight = at(f"blocks/{layer}/attn/z"), np.asarray(blocks[layer].attn.o_proj.weight, np.float64)
        heads, width = z.shape[1:]
        writes = np.einsum("bhd,hdm->bhm", z, weight.reshape(heads, width, -1))
        np.testing.assert_allclose(
            found[:, layer], np.einsum("bhm,bm,m->bh", writes, gain, vector), rtol=1e-4, atol=1e-5
        )
    attention = sum(at(f"blocks/{layer}/attn/out") for layer in (0, 1))
    rest = ((stream - attention) * gain) @ vector
    pre = (read - np.asarray(scaled.input_mean)) @ vector
    constant = -np.asarray(scaled.input_mean, np.float64) @ vector
    np.testing.assert_allclose(found.sum((1, 2)) + rest + constant, pre, rtol=1e-4, atol=1e-4)
    assert np.abs(found.sum((1, 2)) + rest - pre).max() > 1e-3, "broken: without the constant"


def test_a_derivative_of_the_norm_s_scale_would_be_another_number(subject, dictionary):
    """The broken variant: the same gradient, by the ordinary rules."""
    found = head_parts(dictionary, subject.model, TOKENS[:1], FEATURE, jnp.asarray(POSITIONS[:1]))
    z = run(subject.model, TOKENS[:1])["blocks/1/attn/z"]

    def fires(moved):
        read = run(subject.model, TOKENS[:1], edits={"blocks/1/attn/z": Add(moved)})["blocks/1/mlp/in"]
        return read[0, POSITIONS[0]] @ dictionary.encoder[FEATURE]

    broken = jnp.sum(z * jax.grad(fires)(jnp.zeros_like(z)), axis=(0, 1, 3))
    assert np.abs(np.asarray(broken - found[0, 1])).max() > 0.05 * np.abs(np.asarray(found[0, 1])).max()


def test_what_reads_no_sum_of_heads_is_refused(subject):
    neurons = as_dictionary(subject, Sites("blocks/1/mlp/hidden", "blocks/1/mlp/out"), TopK(2))
    with pytest.raises(UserError, match="reads blocks/1/mlp/hidden: heads have a part in mlp/in"):
        head_parts(neurons, subject.model, TOKENS, FEATURE, jnp.asarray(POSITIONS))
