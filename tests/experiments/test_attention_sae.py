"""The attention experiment, small: what it writes, that its numbers hang together, and what a mistake says."""

import json

import numpy as np
import pytest

from experiments.attention_sae import Config, main, summarise
from jaxinterp.errors import UserError

pytestmark = pytest.mark.slow

SMALL = {
    "model": "tiny",
    "site": "blocks/0/attn",
    "features": 64,
    "k": 4,
    "tokens": 12_800,
    "seq": 64,
    "batch_size": 256,
}
SMALL |= {"heldout_tokens": 2048, "ce_tokens": 1024, "attributed_tokens": 1024, "examples": 3, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of small text files."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(60):
        words = " ".join(f"the {index + n} quick brown foxes jump over {n * index} lazy dogs." for n in range(12))
        (folder / f"{index}.txt").write_text(words)
    return str(folder)


def test_a_run_splits_codes_exactly_and_keeps_its_dictionaries(tmp_path, corpus):
    out = tmp_path / "a"
    main(Config(out=out, text=corpus, **SMALL))
    results = json.loads((out / "results.json").read_text())
    assert results["largest_error"] < 1e-3
    assert [row["writes"] for row in results["scoreboard"]] == ["blocks/0/attn/z", "blocks/0/attn/out"]
    assert all(row["fvu"] < 0.9 and row["l0"] <= 4 for row in results["scoreboard"])
    assert sum(results["features_by_dominant_head"]) == results["live"] <= 64
    assert 0.25 < results["dominant_share_chance"] < 0.4 and 0.25 < results["dominant_share"] <= 1
    assert 0 < results["mean_distance"] < 64 and len(results["features"]) == 3
    assert results["sentences"][1] in (out / "report.html").read_text()

    dictionary = (out / "z" / "dictionary.safetensors").read_bytes()
    with pytest.raises(UserError, match="is not empty: pass --resume"):
        main(Config(out=out, text=corpus, **SMALL))
    main(Config(out=out, text=corpus, resume=True, **SMALL))
    assert (out / "z" / "dictionary.safetensors").read_bytes() == dictionary
    again = json.loads((out / "results.json").read_text())
    assert again | {"seconds": 0} == results | {"seconds": 0}


def test_the_summary_by_hand():
    """Three live features: two of head 0 that read the token before, one of head 1 that reads far back; one is dead."""
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    table = {"fired": np.array([2.0, 5, 1, 0]), "distance": np.array([1.0, 1, 40, 0]), "error": np.array(1e-6)}
    table |= {
        "itself": np.zeros(4),
        "window start": np.zeros(4),
        "heads": np.array([[0.9, 0.1], [0.3, 0.7], [0, 1], [1, 0]]),
    }
    table |= {"token before": np.array([1.0, 0.9, 0, 0]), "far": np.array([0, 0, 1.0, 0])}
    found = summarise(table, shares, np.full((4, 2), 0.5))
    assert found["live"] == 3 and found["features_by_dominant_head"] == [2, 1] and found["of_one_head"] == 1
    assert found["heads_agree"] == pytest.approx(2 / 3) and found["mean_distance"] == pytest.approx(14)
    assert found["mostly"] == pytest.approx({"itself": 0, "token before": 2 / 3, "far": 1 / 3, "window start": 0})
    assert found["heads"][1]["distance"] == 40 and found["dominant_share"] == pytest.approx((0.9 + 0.6 + 0.8) / 3)
    with pytest.raises(UserError, match="no feature fires on the attributed tokens"):
        summarise(table | {"fired": np.zeros(4)}, shares, shares)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "blocks/0/mlp"}, "is no attention sublayer: name one leaf"),
        ({"site": "blocks/9/attn"}, "no site 'blocks/9/attn/z'"),
        ({"k": 65}, "k=65 must lie between 1 and features=64"),
        ({"batch_size": 100}, "batch_size=100 must be a multiple of the windows' length 64"),
        ({"examples": 0}, "examples=0 must be at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tmp_path, corpus, changes, words):
    with pytest.raises(UserError, match=words):
        main(Config(out=tmp_path / "a", text=corpus, **SMALL | changes))
    assert not (tmp_path / "a").exists()
