"""The exact transcoders of a ReLU model: nothing is lost, alone or all together."""

import dataclasses

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.decompositions.exact import exact_transcoder
from jaxinterp.evaluation.scoreboard import score, scoreboard
from jaxinterp.evaluation.several import score_layers
from jaxinterp.models.edits import SetTo
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.models.transformer import initialise

SMALL = dataclasses.replace(TINY, layers=2, d_model=32, heads=2, kv_heads=2, d_mlp=64)
OPTIONS = {"tokens": 512, "ce_tokens": 512}


@pytest.fixture(scope="module")
def subject():
    """Two layers, with biases behind the MLPs."""
    model = planted_transformer(jax.random.key(0), SMALL)
    biases = lambda model: [block.mlp.down_proj.bias for block in model.blocks]
    return Subject(eqx.tree_at(biases, model, [jnp.linspace(-1, 1, 32)] * 2), None, "small")


@pytest.fixture(scope="module")
def heldout():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(16):
        weight = np.ones(32, np.float32)
        weight[[0, 5]] = 0
        tokens = rng.integers(0, 256, 32, np.int32)
        rows.append({"tokens": tokens, "weight": weight, "document": np.full(32, number, np.int32)})
    return grain.MapDataset.source(rows)


def transcoders(model):
    return PerLayer(
        tuple(exact_transcoder(block.mlp, f"blocks/{layer}/mlp") for layer, block in enumerate(model.blocks))
    )


def test_replacing_every_mlp_by_its_exact_transcoder_changes_no_logit(subject):
    """Equal to the last bit: planted MLPs with biases, and random ones without."""
    random = initialise(dataclasses.replace(SMALL, mlp_bias=False), jax.random.key(3))
    tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 256)
    for model in (subject.model, random):
        every = transcoders(model)
        replaced = replace(model, {part.sites.leaf: part for part in every.parts})
        assert not any(type(block.mlp).__name__ == "MLP" for block in replaced.blocks)
        np.testing.assert_array_equal(run(replaced, tokens).logits, run(model, tokens).logits)


@pytest.mark.slow
def test_they_score_perfectly_together_and_alone(subject, heldout):
    rows = score_layers(transcoders(subject.model), subject, heldout, **OPTIONS)
    assert [row["method"] for row in rows] == ["all", *(f"blocks/{layer}/mlp/out" for layer in range(2))]
    for row in rows:
        assert row["fvu"] < 1e-10 and row["kl"] < 1e-9 and row["top1_agreement"] == 1, row["method"]
        assert row["ce_replaced"] == pytest.approx(row["ce_clean"], abs=1e-5)
    assert rows[0]["l0"] == pytest.approx(sum(row["l0"] for row in rows[1:]))
    assert rows[0]["ce_zero"] != pytest.approx(rows[1]["ce_zero"], abs=1e-4), "all ablated, and one"


def test_protocols_say_what_is_replaced_and_what_it_reads(subject, heldout):
    """Against a direct computation: `together` writes what was decoded of the unchanged model's inputs."""
    blocks = subject.model.blocks
    swapped = PerLayer(tuple(exact_transcoder(blocks[1 - layer].mlp, f"blocks/{layer}/mlp") for layer in (0, 1)))
    whole = grain.MapDataset.source([heldout[i] | {"weight": np.ones(32, np.float32)} for i in range(16)])
    board = scoreboard({"swapped": swapped}, subject, whole, protocols=("together", "propagated", "alone"), **OPTIONS)
    assert [row["method"] for row in board] == ["swapped", "swapped", *(f"swapped: {n}" for n in swapped.sites.writes)]
    together, propagated, first, second = board
    tokens = jnp.asarray(np.stack([heldout[i]["tokens"] for i in range(16)]))
    clean = run(subject.model, tokens)
    outputs = swapped(tuple(clean[name] for name in swapped.sites.reads))
    edits = {name: SetTo(output) for name, output in zip(swapped.sites.writes, outputs, strict=True)}
    log_p = np.asarray(jax.nn.log_softmax(run(subject.model, tokens, edits=edits).logits[:, :-1]), np.float64)
    nll = -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1)
    assert together["ce_replaced"] == pytest.approx(nll.mean(), rel=1e-4)
    assert abs(propagated["ce_replaced"] - nll.mean()) > 1e-3, "errors that travel are seen"
    assert together["fvu"] == propagated["fvu"] == pytest.approx((first["fvu"] + second["fvu"]) / 2, rel=1e-6)
    assert score(swapped, subject, whole, **OPTIONS)["ce_replaced"] == propagated["ce_replaced"]
    with pytest.raises(UserError, match="a row for each of 2 arrays: call scoreboard"):
        score(swapped, subject, whole, protocol="alone", **OPTIONS)


def test_protocols_agree_on_one_array_and_unknown_ones_are_refused(subject, heldout):
    one = exact_transcoder(subject.model.blocks[1].mlp, "blocks/0/mlp")
    rows = scoreboard({"one": one}, subject, heldout, protocols=("alone", "together", "propagated"), **OPTIONS)
    for name in ("fvu", "l0", "dead_fraction", "ce_replaced", "ce_zero", "kl"):
        assert all(row[name] == pytest.approx(rows[0][name], rel=1e-5) for row in rows), name
    assert [row["protocol"] for row in rows] == ["alone", "together", "propagated"]
    with pytest.raises(UserError, match=r"protocols='togther' must be one of .*Did you mean 'together'\?"):
        scoreboard({"one": one}, subject, heldout, protocols="togther")


def test_a_wrong_layer_s_transcoder_does_not(subject, heldout):
    """The negative control: the same dictionaries in another order."""
    blocks = subject.model.blocks
    swapped = PerLayer(tuple(exact_transcoder(blocks[1 - layer].mlp, f"blocks/{layer}/mlp") for layer in (0, 1)))
    rows = score_layers(swapped, subject, heldout, **OPTIONS)
    assert all(row["fvu"] > 0.5 and row["kl"] > 1e-4 for row in rows)


def test_a_layer_alone_scores_as_the_scoreboard_has_it(subject, heldout):
    """One definition of every number: `score` of the part is the part's row of `score_layers`."""
    blocks = subject.model.blocks
    mean = jnp.linspace(-0.1, 0.1, 32)
    parts = [
        exact_transcoder(blocks[1 - layer].mlp, f"blocks/{layer}/mlp", target_mean=(1 + layer) * mean)
        for layer in (0, 1)
    ]
    rows = score_layers(PerLayer(tuple(parts)), subject, heldout, **OPTIONS)
    for part, row in zip(parts, rows[1:], strict=True):
        expected = score(part, subject, heldout, **OPTIONS)
        for name in expected.keys() - {"method", "reads", "writes", "protocol"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert rows[0]["fvu"] == pytest.approx((rows[1]["fvu"] + rows[2]["fvu"]) / 2, rel=1e-6)


def test_all_together_is_the_model_with_all_leaves_replaced(subject, heldout):
    """Against a direct computation without weights."""
    blocks = subject.model.blocks
    swapped = PerLayer(tuple(exact_transcoder(blocks[1 - layer].mlp, f"blocks/{layer}/mlp") for layer in (0, 1)))
    whole = grain.MapDataset.source([heldout[i] | {"weight": np.ones(32, np.float32)} for i in range(16)])
    row = score_layers(swapped, subject, whole, **OPTIONS)[0]
    tokens = jnp.asarray(np.stack([heldout[i]["tokens"] for i in range(16)]))
    replaced = replace(subject.model, {part.sites.leaf: part for part in swapped.parts})
    p, q = (
        np.asarray(jax.nn.log_softmax(run(model, tokens).logits[:, :-1]), np.float64)
        for model in (subject.model, replaced)
    )
    nll = -np.take_along_axis(q, np.asarray(tokens)[:, 1:, None], -1)
    assert row["ce_replaced"] == pytest.approx(nll.mean(), rel=1e-4)
    assert row["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)


def test_what_is_no_relu_mlp_is_refused(subject, heldout):
    gated = initialise(dataclasses.replace(SMALL, gated=True), jax.random.key(0)).blocks[0].mlp
    gelu = initialise(dataclasses.replace(SMALL, activation="gelu"), jax.random.key(0)).blocks[0].mlp
    for mlp in (gated, gelu):
        with pytest.raises(UserError, match="only a dense ReLU MLP"):
            exact_transcoder(mlp)
    with pytest.raises(UserError, match="is one layer"):
        score_layers(exact_transcoder(subject.model.blocks[0].mlp), subject, heldout)
