"""The scoreboard against direct computation, and the decompositions whose scores are known."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.plain import Neurons
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.evaluation.scoreboard import Table, row_of, score, scoreboard
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from tests.evaluation.whole import Whole
from tests.helpers import random_dictionary

SITE = "blocks/1/mlp"
SITES = Sites(f"{SITE}/in", f"{SITE}/out")
OPTIONS = {"tokens": 1024, "ce_tokens": 1024}


@pytest.fixture(scope="module")
def subject():
    return load("tiny")


@pytest.fixture(scope="module")
def heldout():
    """48 windows of 32 tokens in documents of 20; position 0 and one token value have no weight."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, 48 * 32).astype(np.int32)
    document = (np.arange(48 * 32) // 20).astype(np.int32)
    weight = (tokens != 7).astype(np.float32)
    weight[::32] = 0
    columns = {"tokens": tokens, "weight": weight, "document": document}
    rows = [{name: column.reshape(48, 32)[i] for name, column in columns.items()} for i in range(48)]
    return grain.MapDataset.source(rows)


def test_the_mlp_itself_scores_perfectly(subject, heldout):
    mlp = subject.model.blocks[1].mlp
    row = score(Whole(mlp, jnp.zeros(64), SITES), subject, heldout, **OPTIONS)
    assert row["fvu"] < 1e-10 and row["kl"] < 1e-9 and row["top1_agreement"] == 1
    assert row["ce_replaced"] == pytest.approx(row["ce_clean"], abs=1e-5)
    assert row["ce_recovered_zero"] == pytest.approx(1, abs=1e-3)
    assert row["ce_zero"] == row["ce_mean"] != row["ce_clean"]  # its training mean is given as zero


def test_every_number_equals_its_definition(subject, heldout):
    dictionary = random_dictionary(TopK(4), d_in=64, d_out=64)
    row = score(dictionary, subject, heldout, **OPTIONS)
    batch = {k: np.concatenate([b[k] for b in take(heldout, 1024)]) for k in ("tokens", "weight", "document")}
    tokens, weight = jnp.asarray(batch["tokens"]), batch["weight"]
    clean = run(subject.model, tokens)

    def instead(value):
        """The model with `value` at every token that has weight."""
        return run(subject.model, tokens, edits={f"{SITE}/out": lambda y: jnp.where(weight[..., None] > 0, value, y)})

    replaced = instead(dictionary(clean[f"{SITE}/in"]))
    zero, mean = instead(0.0), instead(dictionary.target_mean)
    y, guess = np.asarray(clean[f"{SITE}/out"], np.float64), np.asarray(dictionary(clean[f"{SITE}/in"]), np.float64)
    center = (y * weight[..., None]).sum((0, 1)) / weight.sum()
    fvu = (((y - guess) ** 2).sum(-1) * weight).sum() / (((y - center) ** 2).sum(-1) * weight).sum()
    assert row["fvu"] == pytest.approx(fvu, rel=1e-4)
    counts = weight[:, :-1] * weight[:, 1:] * (batch["document"][:, :-1] == batch["document"][:, 1:])
    assert row["ce_tokens"] == counts.sum() and row["tokens"] == weight.sum()

    def ce(trace):
        log_p = np.asarray(jax.nn.log_softmax(trace.logits[:, :-1]), np.float64)
        nll = -np.take_along_axis(log_p, batch["tokens"][:, 1:, None], -1)[..., 0]
        return (nll * counts).sum() / counts.sum()

    for name, trace in {"clean": clean, "replaced": replaced, "zero": zero, "mean": mean}.items():
        assert row[f"ce_{name}"] == pytest.approx(ce(trace), rel=1e-4), name
    expected = (row["ce_zero"] - row["ce_replaced"]) / (row["ce_zero"] - row["ce_clean"])
    assert row["ce_recovered_zero"] == pytest.approx(expected)
    p, q = (np.asarray(jax.nn.log_softmax(trace.logits[:, :-1]), np.float64) for trace in (clean, replaced))
    assert row["kl"] == pytest.approx(((np.exp(p) * (p - q)).sum(-1) * counts).sum() / counts.sum(), rel=1e-3)
    agrees = (p.argmax(-1) == q.argmax(-1)) * counts
    assert row["top1_agreement"] == pytest.approx(agrees.sum() / counts.sum())
    codes = np.asarray(dictionary.encode(clean[f"{SITE}/in"]).dense()) * weight[..., None]
    assert row["l0"] == pytest.approx((codes != 0).sum() / weight.sum())
    assert row["dead_fraction"] == pytest.approx((~(codes != 0).any((0, 1))).mean())
    error = (((y - guess) ** 2).sum(-1) * weight).ravel()
    spread = (((y - center) ** 2).sum(-1) * weight).ravel()
    interval = ratio_interval(error, spread, batch["document"].ravel())
    assert row["fvu_interval"] == pytest.approx(interval, rel=1e-4) and interval[0] < row["fvu"] < interval[1]


def test_scores_do_not_depend_on_who_else_is_scored(subject, heldout):
    """Invariant 20."""
    first, second = random_dictionary(TopK(4), d_in=64, d_out=64), random_dictionary(TopK(2), 1, d_in=64, d_out=64)
    means = {SITES.writes: jnp.full(64, 0.1)}
    both = scoreboard({"a": first, "b": second}, subject, heldout, means=means, **OPTIONS)
    alone = scoreboard({"b": second}, subject, heldout, means=means, **OPTIONS)
    assert scoreboard({"b": second}, subject, heldout, **OPTIONS)[0]["ce_mean"] != alone[0]["ce_mean"]
    assert both[1] == alone[0]


def test_baselines_against_independent_solutions(subject, heldout):
    rivals = baselines(subject, heldout, SITE, k=8, features=32, tokens=48 * 32)
    trace = run(subject.model, jnp.asarray(np.stack([heldout[i]["tokens"] for i in range(48)])))
    weight = np.stack([heldout[i]["weight"] for i in range(48)]).reshape(-1) > 0
    x, y, hidden = (
        np.asarray(trace[f"{SITE}/{p}"], np.float64).reshape(48 * 32, -1)[weight] for p in ("in", "out", "hidden")
    )
    np.testing.assert_allclose(rivals["neurons"].hidden_mean, hidden.mean(0), atol=1e-5)

    design = np.column_stack([x, np.ones(len(x))])
    best = np.linalg.lstsq(design, y, rcond=None)[0]
    error = ((y - design @ best) ** 2).sum()
    ours = ((y - np.asarray(rivals["linear"](jnp.asarray(x, jnp.float32)))) ** 2).sum()
    assert error <= ours * (1 + 1e-6) and ours < error * 1.001

    centred = y - y.mean(0)
    singular = np.linalg.svd(centred, compute_uv=False)
    residual = ((y - np.asarray(rivals["pca"](jnp.asarray(y, jnp.float32)))) ** 2).sum()
    assert residual == pytest.approx((singular[8:] ** 2).sum(), rel=1e-3)

    random = rivals["random features"]
    codes = np.asarray(random.encode(jnp.asarray(x, jnp.float32)).dense(), np.float64)
    design = np.column_stack([codes, np.ones(len(codes))])
    error = ((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum()
    ours = ((y - np.asarray(random(jnp.asarray(x, jnp.float32)))) ** 2).sum()
    assert error <= ours * (1 + 1e-6) and ours < error * 1.02


def test_neurons_keep_the_largest_and_all_of_them_are_the_mlp(subject):
    mlp = subject.model.blocks[1].mlp
    x = jax.random.normal(jax.random.key(0), (10, 64))
    mean = jnp.linspace(0.05, 0.15, 128)  # no two silent neurons are as far from it
    every = Neurons(mlp, mean, jnp.zeros(64), 128, SITES)
    np.testing.assert_allclose(every(x), mlp(x), atol=1e-4)
    few = Neurons(mlp, mean, jnp.zeros(64), 3, SITES)
    difference = np.asarray(mlp.hidden(x) - mean)
    size = np.abs(difference) * np.linalg.norm(np.asarray(mlp.down_proj.weight), axis=1)
    kept = size >= np.sort(size, axis=1)[:, -3:-2]
    np.testing.assert_allclose(few(x), mlp.write(jnp.where(kept, difference, 0) + mean), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(few.encode(x).dense()) != 0, kept)


@pytest.mark.parametrize("name", ["neurons", "pca", "linear", "random features"])
def test_every_baseline_can_stand_in_the_leaf_s_place(subject, heldout, name):
    rival = baselines(subject, heldout, SITE, k=8, features=32, tokens=1024)[name]
    stand_in = replace(subject.model, {SITE: StandIn(subject.model.blocks[1].mlp, rival)})
    tokens = jnp.arange(20)[None]
    trace = run(subject.model, tokens)
    edited = run(subject.model, tokens, edits={f"{SITE}/out": lambda _: rival(trace[rival.sites.reads])})
    np.testing.assert_allclose(run(stand_in, tokens).logits, edited.logits, rtol=1e-4, atol=1e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        effect = rng.normal(1.0, 0.5, 40)  # one draw a document, shared by its 25 tokens
        document = np.repeat(np.arange(40), 25)
        low, high = ratio_interval(effect[document], np.ones(1000), document, resamples=300, seed=trial)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99
    one = ratio_interval(np.array([1.0, 3.0]), np.ones(2), np.zeros(2, np.int64))
    assert one == (2.0, 2.0)


@pytest.mark.parametrize("name", ["tokens", "ce_tokens"])
def test_nothing_is_scored_on_no_token(subject, heldout, name):
    with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
        score(random_dictionary(TopK(4), d_in=64, d_out=64), subject, heldout, **OPTIONS | {name: 0})


def test_another_models_dictionary_is_told(subject, heldout):
    with pytest.raises(UserError, match="Dictionary writes 48 dimensions to blocks/1/mlp/out, which has 64"):
        score(random_dictionary(TopK(4), d_in=48, d_out=48), subject, heldout, **OPTIONS)


def test_where_ablation_changes_nothing_there_is_nothing_to_recover():
    table, ones = Table(), np.ones(4)
    table.add(weight=ones, document=np.arange(4), squares=0.5 * ones, spread=ones, active=ones, fired=ones)
    table.add(counted=ones, item_document=np.arange(4), kl=0 * ones, agrees=ones)
    table.add(nll=2.5 * ones, nll_clean=2 * ones, nll_zero=2 * ones, nll_mean=3 * ones)
    row = row_of("m", SITES, table)
    assert np.isnan(row["ce_recovered_zero"]) and row["ce_recovered_mean"] == pytest.approx(0.5)
