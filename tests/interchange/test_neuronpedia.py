"""Neuronpedia's batch files: SAEDashboard's keys and types, and the numbers by brute force."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.features.peaks import collect
from jaxinterp.interchange import write_neuronpedia
from jaxinterp.models.run import run
from tests.interchange.written_batches import SITE, subject_text_dictionary

GOLDEN = json.loads((Path(__file__).parent / "neuronpedia_golden.json").read_text())


@pytest.fixture(scope="module")
def made() -> Any:
    """(subject, held-out text, a random dictionary)."""
    return subject_text_dictionary()


def kinds(value: Any) -> Any:
    """The keys and types of a JSON value; of a list those of its first entry."""
    if isinstance(value, dict):
        return {key: kinds(each) for key, each in value.items()}
    if isinstance(value, list):
        return [kinds(value[0])] if value else []
    return type(value).__name__


def test_keys_and_types_are_theirs_and_numbers_are_right(made: Any, tmp_path: Path) -> None:
    subject, text, dictionary = made
    options = {
        "model_id": "tiny",
        "sae_set": "mine",
        "features": [0, 3, 5],
        "tokens": 64,
        "a_file": 2,
        "dataset": "cats",
    }
    first, second = write_neuronpedia(dictionary, subject, text, tmp_path / "np", **options)
    batch = json.loads(first.read_text())
    assert [each["feature_index"] for each in batch["features"]] == [0, 3]
    assert json.loads(second.read_text())["features"][0]["feature_index"] == 5
    assert list(batch) == list(GOLDEN) and batch["layer"] == 1
    for feature in batch["features"]:
        wanted, found = kinds(GOLDEN["features"][0]), kinds(feature)
        empty = [key for key, value in found.items() if value == [] != wanted[key]]
        assert not [key for key in empty if "correlated" not in key]
        assert list(found) == list(wanted) and {**found, **{key: wanted[key] for key in empty}} == wanted
    windows = collect(text, 64, 0)
    tokens = np.stack([window["tokens"] for window in windows])
    weight = np.stack([window["weight"] for window in windows]) > 0
    x = np.asarray(run(subject.model, jnp.asarray(tokens))[SITE])
    a = np.maximum(x @ np.asarray(dictionary.encoder).T + np.asarray(dictionary.encoder_bias), 0) * weight[..., None]
    feature = batch["features"][1]
    assert feature["frac_nonzero"] == pytest.approx((a[..., 3] > 0).sum() / weight.sum())
    best = max(feature["activations"], key=lambda each: max(each["values"]))
    assert max(best["values"]) == pytest.approx(a[..., 3].max(), abs=1e-3)
    assert best["bin_min"] == -1 and best["values"][best["qualifying_token_index"]] == max(best["values"])
    texts = ["".join(map(chr, window["tokens"])) for window in windows]
    assert "".join(best["tokens"]) in texts and len(best["tokens"]) == 16
    shares = {(each["bin_min"], each["bin_max"]): each["bin_contains"] for each in feature["activations"][1:]}
    shares = {bounds: share for bounds, share in shares.items() if bounds[0] >= 0}
    for (lower, upper), share in shares.items():
        meant = ((a[..., 3] > lower - 1e-6) & (a[..., 3] <= upper + 1e-3) & (a[..., 3] > 0)).sum() / weight.sum()
        assert share == pytest.approx(meant, abs=1 / weight.sum() + 1e-5)
    assert sum(feature["freq_hist_data_bar_heights"]) == (a[..., 3] > 0).sum()


def test_what_cannot_be_shown_is_refused(made: Any, tmp_path: Path) -> None:
    subject, text, dictionary = made
    with pytest.raises(UserError, match="99 is not one of 12"):
        write_neuronpedia(dictionary, subject, text, tmp_path, model_id="a", sae_set="b", features=[99])
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError):
        write_neuronpedia(dictionary, subject, text, tmp_path, model_id="a", sae_set="b")
