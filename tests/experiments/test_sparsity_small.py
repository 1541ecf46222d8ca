"""The small experiments on sparsity, each whole on a tiny model: laws over training, CETT, pruning, merging."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import activation_laws, cett, merge, pruning
from jaxinterp.core.errors import UserError
from jaxinterp.models.load import Subject, load, save_subject
from jaxinterp.models.transformer import TransformerConfig, initialise


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A gated model with two groups of heads and the layout of Llama, and two texts."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = load("tiny").tokenizer
    config = TransformerConfig(tokenizer.vocab_size, 16, 2, 4, 2, 4, 32, context=64, rotary_dimensions=4)
    save_subject(Subject(initialise(config, jax.random.key(0)), tokenizer, "small"), folder / "model")
    for name, words in (("foxes", "quick brown foxes jump over"), ("ships", "old grey ships sail past")):
        (folder / name).mkdir()
        for index in range(40):
            lines = " ".join(f"the {index + n} {words} {n * index} lazy dogs." for n in range(12))
            (folder / name / f"{index}.txt").write_text(lines)
    return folder


@pytest.mark.slow
def test_activation_laws_end_to_end(given, tmp_path):
    config = activation_laws.Config(
        out=tmp_path / "run", text=str(given / "foxes"), seeds=(0,), layers=1, d_model=16, d_mlp=32, heads=2,
        vocabulary=280, seq=16, batch_size=64, tokens=64 * 60, tuning=0.5, weights=(0.3,), heldout=512,
        calibration=256, points=(0.2, 0.4, 0.6, 0.8, 1.0),
    )  # fmt: skip
    activation_laws.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["rows"]
    assert [(row["kind"], row["step"]) for row in rows[:5]] == [("silu", step) for step in (10, 20, 40, 50, 60)]
    assert all(row["zeros"] < 0.01 for row in rows[:5]) and all(row["zeros"] > 0.1 for row in rows[5:])
    assert rows[4]["ce"] < rows[0]["ce"] and all(0 < row["ratio"] <= 1 and row["percent"] <= 1 for row in rows)
    tuned = {(row["plan"], row["weight"]): row for row in results["tuned"]}
    assert len(tuned) == 3
    assert tuned["constant", 0.3]["density"] < tuned["no penalty", 0.0]["density"]
    before = (tmp_path / "run" / "results.json").read_text()
    activation_laws.main(dataclasses.replace(config, resume=True))
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(before)


def test_settings_of_the_laws_are_refused(tmp_path):
    with pytest.raises(UserError, match="the first of points"):
        activation_laws.main(activation_laws.Config(out=tmp_path / "run", tokens=20_480))
    with pytest.raises(UserError, match="must be at least 5 numbers that rise to 1"):
        activation_laws.main(activation_laws.Config(out=tmp_path / "run", points=(0.5, 1.0)))
    with pytest.raises(UserError, match="has no gated MLPs"):
        pruning.main(pruning.Config(out=tmp_path / "run", model="tiny"))


def test_equal_density_and_equal_loss_are_read_off_the_curves():
    rows = [{"ce": 4.0, "ratio": 0.2}, {"ce": 3.0, "ratio": 0.4}]
    assert activation_laws.at_loss(rows, 3.5) == pytest.approx(0.3)
    tuned = [
        {"plan": "staged", "density": 0.1, "ce": 3.0},
        {"plan": "staged", "density": 0.4, "ce": 2.0},
        {"plan": "constant", "density": 0.2, "ce": 2.7},
        {"plan": "constant", "density": 0.05, "ce": 5.0},
    ]
    first, second = activation_laws.equal_density(tuned)
    assert first == pytest.approx({"density": 0.2, "constant": 2.7, "staged": 2.5})
    assert second == pytest.approx({"density": 0.1, "staged": 3.0, "constant": 3.85})
    weights = activation_laws.stages_of(1.0, 100)
    assert weights == ((0.025, 30), (0.25, 50), (0.25, 60), (1.0, 90), (1.0, 100))


@pytest.mark.slow
def test_cett_of_a_small_model(given, tmp_path):
    config = cett.Config(
        out=tmp_path / "run", models=(str(given / "model"),), text=str(given / "foxes"), cache=tmp_path / "tokens",
        windows=4, calibration=4, seq=32, percents=(1.0, 10.0),
    )  # fmt: skip
    cett.main(config)
    first, second, far = json.loads((tmp_path / "run" / "results.json").read_text())[str(given / "model")]
    assert first["measure"] == "perplexity" and first["rise"] <= 1 and second["rise"] <= 10
    assert 0 < second["ratio"] <= first["ratio"] <= 1 and far["ratio"] < first["ratio"]


@pytest.mark.slow
def test_pruning_end_to_end(given, tmp_path):
    config = pruning.Config(
        out=tmp_path / "run", model=str(given / "model"), text=str(given / "foxes"), cache=tmp_path / "tokens",
        windows=4, calibration=4, seq=32, neurons=(0.25,),
    )  # fmt: skip
    pruning.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["score"], row["sparsity"]): row["ce"] for row in results["rows"]}
    assert len(rows) == 1 + 4 + 2 + 9
    assert all(abs(ce - rows["dense", 0.0]) > 1e-6 for key, ce in rows.items() if key[0] != "dense")
    written = results["other"]["written"]
    assert written["ce"] == pytest.approx(rows["neurons, E|a||w|", 0.25], abs=1e-4)
    assert written["numbers before"] - written["numbers after"] == 2 * 8 * 3 * 16
    assert load(tmp_path / "run" / "model").model.config.d_mlp == 24


@pytest.mark.slow
def test_merging_end_to_end(given, tmp_path):
    names = (str(given / "foxes"), str(given / "ships"))
    config = merge.Config(
        out=tmp_path / "run", model=str(given / "model"), texts=names, other="", seq=32, batch_size=128, steps=20,
        router_steps=10, router_rate=0.03, learning_rate=5e-3, scales=(0.5,), heldout=512,
    )  # fmt: skip
    merge.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name, other in (names, names[::-1]):
        assert results[f"tuned on {name}"][name] < results["base"][name] - 0.2
        assert results[f"tuned on {name}"][name] < results[f"tuned on {other}"][name]
        assert results["task arithmetic 0.5"][name] < results["base"][name]
    assert np.abs(np.asarray(results["shares"][names[0]]) - 0.3).max() > 1e-3  # the routers moved
    assert results["WEMoE"] != results["WEMoE at start"]
