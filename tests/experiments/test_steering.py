"""The steering command: SAE features, the fluency column, and going on with a file that another call began."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import steering
from experiments.steering import interval, main, options, table
from jaxinterp.core.errors import UserError
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.transformer import initialise
from tests.causal.toys import SMALL
from tests.experiments.small_run import write_corpus


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A subject, options as in docs/evidence/causes.md, and the autoencoder that a call keeps beside its rows."""
    folder = tmp_path_factory.mktemp("steering")
    model = initialise(dataclasses.replace(SMALL, layers=1), jax.random.key(0))
    subject = Subject(model, byte_tokenizer(), "small")
    common = [
        "--layers", "0", "--concepts", "food", "--seeds", "0", "--lineas-steps", "0", "--pairs", "2", "--features", "2",
        "--sae-layers", "0", "--sae-tokens", "1024", "--sae-features", "64", "--words", "1",
        "--sae-text", str(write_corpus(folder / "text")), "--out", str(folder / "steering.json"),
    ]  # fmt: skip
    given = options(common)
    sae = steering.trained_sae(subject, 0, given)
    assert sae.features == 64 and len(list(folder.glob("steering_sae_0_*"))) == 1
    return subject, common, given.out


def test_features_and_fluency_from_the_command(kept, monkeypatch, capsys):
    """A second call measures only what is missing, and trains nothing again."""
    subject, common, out = kept
    monkeypatch.setattr(steering, "load", lambda name: subject)
    monkeypatch.setattr(steering, "fit", None)  # must not be called: the autoencoder was kept
    rows = main([*common, "--methods", "SAE"])
    assert [row["direction"] for row in rows] == 6 * ["SAE"] and all(row["fluency"] >= 1 for row in rows)
    assert np.mean([row["kl"] for row in rows]) == pytest.approx(0.25, rel=0.5)
    assert all(row["concept"] > 0 and isinstance(row["text"], str) for row in rows)
    said = capsys.readouterr().out
    assert "unsteered: fluency" in said and "fluency nan" not in said
    for row in rows:  # as a call without --words leaves it
        del row["fluency"]
    out.write_text(json.dumps(rows))
    again = main([*common, "--methods", "SAE", "random"])
    assert sorted(row["direction"] for row in again) == 6 * ["SAE"] + 6 * ["random"]
    assert all("fluency" in row for row in again), "rows without the column are measured again"
    assert json.loads(out.read_text()) == again
    assert main([*common, "--methods", "SAE"]) == again
    with pytest.raises(UserError, match=r"has rows of model 'smollm2-135m' at target 0\.25, not of .* at 0\.5"):
        main([*common, "--target", "0.5"])


def test_intervals_are_over_seeds_and_contexts_and_fluency_is_a_geometric_mean():
    cell = {"direction": "DiM", "site": "s", "kl": 0.25, "converged": True, "concept_before": 0.1}
    rows = [
        {**cell, "seed": seed, "context": context, "concept": 0.1 * np.exp(gain), "fluency": fluency}
        for seed, context, gain, fluency in ((0, "a", 1.0, 2.0), (0, "a", 3.0, 2.0), (1, "a", 4.0, 8.0))
    ]
    (line, _) = table(rows)
    assert line["gain"] == pytest.approx(3.0) and line["low"] == pytest.approx(2.0) and line["high"] == pytest.approx(4)
    assert line["fluency"] == pytest.approx(4.0) and line["cells"] == 3
    del rows[2]["fluency"]
    assert table(rows)[0]["fluency"] == pytest.approx(2.0), "rows without the column do not count in it"
    assert all(np.isnan(interval([], [], 10)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "Dim"], "--methods 'Dim' is unknown; known: DiM"),
        (["--concepts", "foods"], "Did you mean 'food'"),
        (["--sae-tokens", "100"], "less than one step of 512 tokens"),
        (["--words", "-1"], "--words -1 must be 0"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_model_is_loaded(given, message):
    with pytest.raises(UserError, match=message):
        options(given)
