"""The AFA experiment on the tiny model: lengths and comparisons that mean something; refusals; the control."""

import json

import jax
import pytest

from experiments.afa import Config, at_their_l0, main, methods, reading
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.quasi_orthogonality import CODE_LENGTHS, code_lengths
from tests.evaluation.planted_codes import planted_pairs, planted_twelve

SMALL = {
    "model": "tiny", "features": 96, "k": 4, "afa": (1 / 32,), "tokens": 5120, "seq": 64, "batch_size": 256,
    "heldout_tokens": 2048, "ce_tokens": 512, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(120):
        words = " ".join(f"the {index + n} quick brown foxes jump over {n * index} lazy dogs." for n in range(12))
        (folder / f"{index}.txt").write_text(words)
    return folder


@pytest.mark.slow
def test_a_small_run(tmp_path, corpus, capsys):
    out = tmp_path / "a"
    main(Config(out=out, text=str(corpus), **SMALL))
    results = json.loads((out / "results.json").read_text())
    names = ["topk 4", "topk 16", "topk 64", "relu L1", "top-AFA 0.0312"]
    assert [row["method"] for row in results["scoreboard"]] == names == list(results["lengths"])
    fvu = [row["fvu"] for row in results["scoreboard"]]
    assert fvu[0] > fvu[1] > fvu[2] and max(fvu) < 1
    lengths = results["lengths"]
    assert lengths["topk 4"]["|f|/|z| median"] < lengths["top-AFA 0.0312"]["|f|/|z| median"] < 1.1
    for row in lengths.values():
        assert 0 < row["eps_mean"] < row["eps_max"] < 1 and row["under-active"] + row["over-active"] <= 1
        assert 0 < row["|fD|/|z| median"] < 1.2 and row["|f|/|fD| shuffled"] > 0.8
    (rival,) = results["top-AFA against TopK"]
    assert rival["TopK read off"] in ("measured", "between", "nearest") and rival["L0"] > 10
    html = (out / "report.html").read_text()
    assert "ZF plot of topk 4" in html and html.count('class="reference"') >= 5
    assert "active features" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty"):
        main(Config(out=out, text=str(corpus), **SMALL))


RIVAL = {"method": "top-AFA 1", "L0": 60.0, "FVU": 0.2, "TopK FVU": 0.3, "CE": 3.0, "TopK CE": 3.1}


def length(related, rest, shuffled):
    found = dict.fromkeys(CODE_LENGTHS, 0.0)
    return found | {
        "|f|/|z| median": related * rest,
        "|f|/|fD| median": related,
        "|fD|/|z| median": rest,
        "|f|/|fD| shuffled": shuffled,
    }


def test_sentences_follow_the_numbers():
    rows = {"related": length(0.7, 1.0, 1.0), "long": length(1.1, 1.0, 1.0)}
    said = reading(rows, [RIVAL | {"TopK read off": "measured"}], 64)
    assert "1 of 2 dictionaries (related)" in said[0] and "nearest to the line is long" in said[0]
    assert "related 0.70 = 0.70 and 1.00" in said[1]
    assert "In related more than half" in said[2] and "related directions" in said[2]
    assert "leaves less variance unexplained" in said[3]
    crowded = reading({"a": length(0.7, 1.0, 0.72)}, [RIVAL | {"TopK read off": "nearest"}], 64)
    assert "with the same codes at random features too" in crowded[2] and "not compared" in crowded[3]
    assert "related directions" not in " ".join(crowded)
    row = {"method": "topk 4", "l0": 4.0, "fvu": 0.5, "ce_replaced": 3.0}
    assert at_their_l0([row, row | {"method": "top-AFA 1", "l0": 50.0}])[0]["TopK read off"] == "nearest"


def test_what_is_not_reconstructed_is_not_blamed_on_related_features():
    """Orthonormal atoms, 12 active, 4 of them kept: the gap is large, and no direction is related to another."""
    dictionary, x = planted_twelve()
    said = " ".join(reading({"topk 4": code_lengths(dictionary, x, jax.random.key(0)).numbers}, [], 32))
    assert "In topk 4 codes are too short only for what is not reconstructed" in said
    assert "related directions" not in said
    dictionary, x = planted_pairs(related=True)
    said = " ".join(reading({"topk 2": code_lengths(dictionary, x, jax.random.key(0)).numbers}, [], 32))
    assert "related directions" in said and "only for what is not reconstructed" not in said


def test_a_dictionary_without_pairs_of_features_is_left_out():
    lone = dict.fromkeys(CODE_LENGTHS) | {"eps_mean": 0.1}
    said = reading({"dead": lone, "a": length(1.0, 1.0, 1.0)}, [], 64)
    assert "in: dead" in said[0] and "0 of 1 dictionaries" in said[1]
    assert "in: dead" in reading({"dead": lone}, [], 64)[0]


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    for changes, words in (
        ({"afa": ()}, "afa=()"),
        ({"l1": 0.0}, "l1=0.0"),
        ({"k": 7}, "k=7 must lie between 2 and a sixteenth of features=96"),
        ({"k": 1}, "k=1 must lie between 2"),
        ({"afa": (0.1, 0.10001)}, "afa: 0.1 stands there 2 times"),
        ({"ce_tokens": 0}, "ce_tokens=0 must be at least 1"),
        ({"batch_size": 100}, "batch_size=100"),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
            main(Config(out=tmp_path / "a", **{**SMALL, **changes}))
    assert not (tmp_path / "a").exists()
    assert next(iter(methods(Config(out=tmp_path)))) == "topk 32"
