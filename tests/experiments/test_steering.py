"""The steering command: SAE features, the fluency column, and going on with a file that another call began."""

import json

import numpy as np
import pytest

from experiments import steering
from experiments.steering import interval, main, options, table
from jaxinterp.core.errors import UserError
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from tests.causal.toys import small_transformer
from tests.experiments.small_run import write_corpus


def test_features_and_fluency_from_the_command(tmp_path, monkeypatch, capsys):
    """The options of docs/evidence/causes.md, on a tiny model; a second call measures only what is missing."""
    subject = Subject(small_transformer(), byte_tokenizer(), "small")
    monkeypatch.setattr(steering, "load", lambda name: subject)
    text, out = write_corpus(tmp_path / "text"), tmp_path / "steering.json"
    common = [
        "--layers", "1", "--concepts", "food", "--seeds", "0", "--lineas-steps", "0", "--pairs", "2", "--features", "2",
        "--sae-layers", "1", "--sae-tokens", "1024", "--sae-features", "64", "--sae-text", str(text), "--out", str(out),
    ]  # fmt: skip
    rows = main([*common, "--methods", "SAE", "--words", "2"])
    assert [row["direction"] for row in rows] == 6 * ["SAE"] and all(row["fluency"] >= 1 for row in rows)
    assert all(row["converged"] and row["concept"] > 0 for row in rows)
    for row in rows:  # as a call without --words leaves it
        del row["fluency"]
    monkeypatch.setattr(steering, "fit", None)  # must not be called: the autoencoder was kept
    out.write_text(json.dumps(rows))
    again = main([*common, "--methods", "SAE", "random", "--words", "2"])
    assert sorted(row["direction"] for row in again) == 6 * ["SAE"] + 6 * ["random"]
    assert all("fluency" in row for row in again), "rows without the column are measured again"
    assert json.loads(out.read_text()) == again
    last = capsys.readouterr().out
    assert main([*common, "--methods", "SAE", "--words", "2"]) == again
    with pytest.raises(
        UserError, match=r"has rows of model 'smollm2-135m' at target 0\.25, not of 'smollm2-135m' at 0\.5"
    ):
        main([*common, "--target", "0.5"])
    assert "unsteered: fluency" in last and "fluency nan" not in last


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
