"""The AFA experiment on the tiny model: lengths and comparisons that mean something; refusals; the control."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.afa import Config, at_their_l0, main, measured, methods, reading
from jaxinterp.data.batch import Sites, make_batch
from jaxinterp.decompositions.activations import TopK
from jaxinterp.errors import UserError
from jaxinterp.methods import SparseAutoencoder

pytestmark = pytest.mark.slow

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
    (rival,) = results["top-AFA against TopK"]
    assert rival["TopK read off"] in ("measured", "between", "nearest") and rival["L0"] > 10
    html = (out / "report.html").read_text()
    assert "ZF plot of topk 4" in html and html.count('class="reference"') >= 5
    assert "active features" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty"):
        main(Config(out=out, text=str(corpus), **SMALL))


def test_lengths_of_orthonormal_atoms_are_exact_and_related_atoms_are_under_active_but_for_the_shuffled():
    """Two atoms of each pair are active together; where they are related, |z|^2 exceeds |f|^2."""
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(32, 32)))[0].astype(np.float32)
    related = rows.copy()
    related[1::2] = 0.8 * rows[::2] + 0.6 * rows[1::2]
    codes = np.zeros((400, 32), np.float32)
    pairs = rng.integers(0, 16, 400)
    codes[np.arange(400), 2 * pairs] = codes[np.arange(400), 2 * pairs + 1] = rng.uniform(0.5, 1.5, 400)
    found = {}
    for name, atoms in (("orthonormal", rows), ("related", related)):
        x = jnp.asarray(codes @ atoms)
        method = SparseAutoencoder(features=32, activation=TopK(2), normalise=False)
        batch = make_batch({"m/out": x}, jnp.ones(400), Sites("m/out", "m/out"))
        dictionary = method.recipe(10).init(jax.random.key(0), batch, None).decomposition
        read = np.linalg.inv(atoms).T if name == "related" else atoms
        found[name], points = measured(replaced(dictionary, read, atoms), x, 0)
        assert len(points) == 400
    assert found["orthonormal"]["|f|/|z| median"] == pytest.approx(1, abs=1e-4)
    assert found["orthonormal"]["(h-1) eps_LBO"] == pytest.approx(0, abs=1e-3)
    assert found["orthonormal"]["eps_max"] < 1e-3
    expected = 1 / np.sqrt(1.8)
    assert found["related"]["|f|/|z| median"] == pytest.approx(expected, rel=1e-3)
    assert found["related"]["(h-1) eps_LBO"] == pytest.approx(0.8, rel=1e-2)
    assert found["related"]["eps_max"] == pytest.approx(0.8, abs=1e-3)
    assert found["related"]["|f|/|z| shuffled"] == pytest.approx(1, abs=1e-3)
    assert found["related"]["under-active"] == 1


def replaced(dictionary, read, write):
    return eqx.tree_at(lambda d: (d.encoder, d.decoder), dictionary, (jnp.asarray(read), jnp.asarray(write)))


def test_sentences_follow_the_numbers():
    def length(median, shuffled):
        return {"|f|/|z| median": median, "|f|/|z| shuffled": shuffled, "under-active": float(median < 1)}

    rival = {"method": "top-AFA 1", "L0": 60.0, "FVU": 0.2, "TopK FVU": 0.3, "CE": 3.0, "TopK CE": 3.1}
    said = reading([], {"a": length(0.7, 1.0), "b": length(1.1, 1.0)}, [rival | {"TopK read off": "measured"}], 64)
    assert "1 of 2 dictionaries (a)" in said[0] and "nearest to the line is b" in said[0]
    assert "in 1 of the 1 that are too short" in said[1] and "leaves less variance unexplained" in said[2]
    other = reading([], {"a": length(0.7, 0.72)}, [rival | {"TopK read off": "nearest"}], 64)
    assert "in 0 of the 1" in other[1] and "not compared" in other[2]
    row = {"method": "topk 4", "l0": 4.0, "fvu": 0.5, "ce_replaced": 3.0}
    assert at_their_l0([row, row | {"method": "top-AFA 1", "l0": 50.0}])[0]["TopK read off"] == "nearest"


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    for changes, words in (
        ({"afa": ()}, "afa=()"),
        ({"l1": 0.0}, "l1=0.0"),
        ({"k": 7}, "k=7 must lie between 1 and a sixteenth of features=96"),
        ({"batch_size": 100}, "batch_size=100"),
    ):
        with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
            main(Config(out=tmp_path / "a", **{**SMALL, **changes}))
    assert not (tmp_path / "a").exists()
    assert next(iter(methods(Config(out=tmp_path)))) == "topk 32"
