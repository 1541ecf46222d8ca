"""The attention experiment, small: what it writes, that its numbers hang together, and what a mistake says."""

import json

import pytest

from experiments import attention_sae
from experiments.attention_sae import Config, main, sentences
from jaxinterp.core.errors import UserError

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


@pytest.mark.slow
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

    dictionary = (out / "z" / "decomposition.safetensors").read_bytes()
    with pytest.raises(UserError, match="is not empty: pass --resume"):
        main(Config(out=out, text=corpus, **SMALL))
    main(Config(out=out, text=corpus, resume=True, **SMALL))
    assert (out / "z" / "decomposition.safetensors").read_bytes() == dictionary
    again = json.loads((out / "results.json").read_text())
    assert again | {"seconds": 0} == results | {"seconds": 0}


@pytest.mark.slow
def test_the_scoreboard_is_kept_where_nothing_fires_on_the_attributed_tokens(tmp_path, corpus, monkeypatch):
    def silent(table, shares, chance):
        raise UserError("no feature fires")

    board = [
        {"method": name, "tokens": 9, "ce_tokens": 9, "ce_clean": 1.0, "ce_zero": 2.0, "ce_mean": 2.0} for name in "zo"
    ]
    monkeypatch.setattr(attention_sae, "summarise", silent)
    monkeypatch.setattr(attention_sae, "scoreboard", lambda *_, **__: board)
    monkeypatch.setattr(attention_sae, "attribute", lambda *_, **__: {})
    with pytest.raises(UserError, match="no feature fires"):
        main(Config(out=tmp_path / "a", text=corpus, **SMALL | {"tokens": 2560}))
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == {"scoreboard": board}
    assert (tmp_path / "a" / "z" / "decomposition.json").exists(), "a resumed run need not train again"


def test_sentences_follow_the_numbers():
    def scored(ce, width, zero=3.0):
        found = {"ce_replaced_interval": (ce - width, ce + width), "ce_clean": 2.0, "ce_zero": zero, "ce_mean": 2.5}
        return found | {"ce_recovered_zero": zero - ce, "ce_recovered_mean": 0.5, "ce_tokens": 1000}

    results = {"largest_error": 1e-6, "of_one_head": 0.25, "live": 40, "dominant_share": 0.5, "mean_distance": 3.0}
    results |= {"dominant_share_chance": 0.3, "heads_agree": 0.75}
    results |= {"mostly": {"itself": 0.1, "token before": 0.2, "far": 0.3, "window start": 0.4}}
    said = sentences(results, [scored(2.1, 0.02), scored(2.2, 0.02)])
    assert "recovers 90% and that of out 80%" in said[0] and ": a difference beyond" in said[0]
    assert ": no difference beyond" in sentences(results, [scored(2.1, 0.1), scored(2.2, 0.02)])[0]
    assert "too little to recover" in sentences(results, [scored(2.1, 0.1, zero=2.005), scored(2.2, 0.1)])[0]
    assert "25% of 40 live features" in said[2] and "30% mostly what stands more than 16" in said[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"site": "blocks/0/mlp"}, "is not an attention sublayer: name one leaf"),
        ({"site": "blocks/9/attn"}, "no site 'blocks/9/attn/z'"),
        ({"k": 65}, "k=65 must lie between 1 and features=64"),
        ({"batch_size": 100}, "batch_size=100 must be a multiple of the windows' length 64"),
        ({"examples": 0}, "examples=0 must be at least 1"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"activation": "relu"}, "l1=0.0 must be positive where activation=relu"),
        ({"ce_tokens": 0}, "ce_tokens=0 must be at least 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tmp_path, corpus, changes, words):
    with pytest.raises(UserError, match=words):
        main(Config(out=tmp_path / "a", text=corpus, **SMALL | changes))
    assert not (tmp_path / "a").exists()
