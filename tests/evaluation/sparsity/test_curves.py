"""CETT of a whole model: the table agrees with the measure, the search with brute force."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.curves import (
    CETTCurve,
    cett_curve,
    cett_curves,
    cett_ppl,
    edits_at,
    hidden_activations,
)
from jaxinterp.evaluation.sparsity.measures import cett, cett_threshold
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise


def test_the_table_holds_the_measure_and_finds_its_thresholds():
    rng = np.random.default_rng(0)
    a = np.maximum(rng.normal(size=(40, 12)), 0).astype(np.float32)  # zeros among them
    weight, counts = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32), (np.arange(40) < 30).astype(np.float32)
    curve = cett_curve(a, weight, points=17, counts=counts)
    assert curve.epsilon[0] == 0 and (np.diff(curve.epsilon) > 0).all() and len(curve.epsilon) == 17
    for index in (0, 3, 9, 16):
        measured = cett(jnp.asarray(a[:30]), weight, float(curve.epsilon[index]))
        assert curve.achieved[index] == pytest.approx(float(measured.value()), abs=1e-6)
        above = np.abs(a[:30]) * np.linalg.norm(weight, axis=1) > curve.epsilon[index]
        assert curve.ratio[index] == pytest.approx(above.mean(), abs=1e-6)
    padded = cett_curve(a, weight, points=17)
    assert np.abs(padded.achieved - curve.achieved).max() > 1e-3  # broken: padding counts
    for target in (0.0, 0.1, 0.4, 5.0):
        own, found = (
            cett_threshold(jnp.asarray(a[:30]), weight, target, candidates=curve.epsilon),
            curve.at(target),
        )
        assert found.epsilon == own.epsilon and found.achieved <= target
        assert found.achieved == pytest.approx(own.achieved, abs=1e-6)
        assert found.ratio == pytest.approx(own.ratio, abs=1e-6)
    assert CETTCurve(np.ones(1), np.asarray([0.5]), np.asarray([0.3])).at(0.1) == (0.0, 0.0, 0.3)
    with pytest.raises(UserError, match=r"target=-1"):
        curve.at(-1.0)
    with pytest.raises(UserError, match="no active neuron"):
        cett_curve(np.zeros((3, 12), np.float32), weight)
    with pytest.raises(UserError, match="points=1"):
        cett_curve(a, weight, points=1)


def test_one_cett_for_all_layers_is_the_largest_that_perplexity_allows():
    sizes = {"vocab_size": 20, "d_model": 8, "layers": 2, "heads": 1, "kv_heads": 1, "head_dim": 8, "d_mlp": 24}
    model = initialise(TransformerConfig(**sizes, context=8, rotary_dimensions=8), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 20, (8, 8)).astype(np.int32)
    weight = np.ones((8, 8), np.float32)
    weight[0] = 0
    hidden = hidden_activations(model, [{"tokens": tokens, "weight": weight}], dense_before=1)
    assert {name: a.shape for name, a in hidden.items()} == dict.fromkeys(("blocks/0/mlp", "blocks/1/mlp"), (49, 24))
    expected = np.asarray(run(model, tokens)["blocks/1/mlp/hidden"])[1:, 1:].reshape(-1, 24)
    np.testing.assert_allclose(hidden["blocks/1/mlp"], expected, atol=1e-4)
    curves = cett_curves(model, hidden, points=33)
    clean = jax.nn.log_softmax(run(model, tokens).logits)

    def loss(edits):
        left = jax.nn.log_softmax(run(model, tokens, edits=edits).logits)
        return 1 + float(jnp.mean(jnp.sum(jnp.exp(clean) * (clean - left), axis=-1)))  # KL rises with what is left out

    found = cett_ppl(model, curves, loss, 1.0, 0.1, tolerance=0.01, dense_before=1)
    assert 0 < found.cett < 1 and 0 < found.percent <= 0.1 and 0 < found.ratio < 1
    assert found.ratio == pytest.approx(np.mean([each.ratio for each in found.layers.values()]))
    brute = {}
    for c in np.arange(1, 25) / 64:
        brute[c] = 100 * math.expm1(loss(edits_at(model, {n: o.at(c) for n, o in curves.items()}, dense_before=1)) - 1)
    allowed = [c for c, rise in brute.items() if rise <= 0.1]
    assert found.cett == pytest.approx(max(allowed), abs=1 / 64 + 0.01)
    assert min(brute.values()) < 0.1 < max(brute.values())
    everywhere = loss(edits_at(model, found.layers))  # broken: position 0 is left out, too
    assert abs(100 * math.expm1(everywhere - 1) - found.percent) > 1e-6
    assert cett_ppl(model, curves, lambda edits: 9.0, 1.0, 0.1, tolerance=0.1).cett == 0.0


def test_text_without_weight_is_refused():
    with pytest.raises(UserError, match="no token of the text has weight"):
        sizes = {"vocab_size": 20, "d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "d_mlp": 12}
        model = initialise(TransformerConfig(**sizes, context=8, rotary_dimensions=8), jax.random.key(0))
        hidden_activations(model, [{"tokens": np.zeros((1, 4), np.int32), "weight": np.zeros((1, 4), np.float32)}])
