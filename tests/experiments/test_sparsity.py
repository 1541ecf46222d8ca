"""The experiment on scores, on a small gated model: every row, resumed, and what is refused."""

import dataclasses
import json

import jax
import pytest

from experiments import massive_activations, sparsity
from jaxinterp.core.errors import UserError
from jaxinterp.models.load import Subject, load, save_subject
from jaxinterp.models.transformer import TransformerConfig, initialise


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparsity")
    tokenizer = load("tiny").tokenizer
    config = TransformerConfig(tokenizer.vocab_size, 16, 2, 2, 2, 8, 32, context=64, rotary_dimensions=8)
    save_subject(Subject(initialise(config, jax.random.key(0)), tokenizer, "small"), folder / "model")
    for index in range(40):
        words = " ".join(f"the {index + n} quick brown foxes jump over {n * index} lazy dogs." for n in range(12))
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{index}.txt").write_text(words)
    return {"model": str(folder / "model"), "text": str(folder / "text"), "windows": 4, "seq": 32}


@pytest.mark.slow
def test_every_row_is_measured_and_kept(given, tmp_path, capsys):
    config = sparsity.Config(
        out=tmp_path / "run", cache=tmp_path / "tokens", calibration=4, sparsity=(0.5, 0.9), percents=(5.0,), **given
    )
    sparsity.main(dataclasses.replace(config, only="|a| (TEAL)", most_seconds=0.0))
    assert "continue with --resume" in capsys.readouterr().out
    with pytest.raises(UserError, match="only="):
        sparsity.main(dataclasses.replace(config, resume=True))
    sparsity.main(dataclasses.replace(config, out=tmp_path / "all"))
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    rows = {(row["score"], row["sparsity"]): row["ce"] for row in results["rows"]}
    assert len(rows) == 1 + 14 * 2 + 6 + 2
    dense = rows[("dense", 0.0)]
    assert all(abs(ce - dense) > 1e-6 for key, ce in rows.items() if key[0] != "dense")
    assert abs(rows[("|a| (TEAL)", 0.9)] - dense) > abs(rows[("|a| (TEAL)", 0.5)] - dense)
    assert results["other"]["CETT-PPL-5%"]["perplexity rise %"] <= 5
    assert any(pair["first"] == "Wanda" for pair in results["compared"])
    assert "Dense perplexity" in (tmp_path / "all" / "table.md").read_text()
    before = (tmp_path / "all" / "results.json").read_text()
    sparsity.main(dataclasses.replace(config, out=tmp_path / "all", resume=True))
    assert json.loads((tmp_path / "all" / "results.json").read_text()) == json.loads(before)


@pytest.mark.slow
def test_massive_activations_of_a_small_model(given, tmp_path):
    massive_activations.main(massive_activations.Config(out=tmp_path / "run", least=1.0, ratio=3.0, **given))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["layers"]) == 2 and len(results["interventions"]) >= 6
    ce = [row["ce"] for row in results["interventions"]]
    assert ce[0] > 0 and any(abs(each - ce[0]) > 1e-6 for each in ce[1:])


def test_a_model_without_gates_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no gated MLPs"):
        sparsity.main(sparsity.Config(out=tmp_path / "run", model="tiny"))
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        sparsity.main(sparsity.Config(out=tmp_path / "run", sparsity=(1.0,)))
