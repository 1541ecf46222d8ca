"""Comparisons at equal L0: the interpolation by hand, the commands at a small size, and what a mistake says."""

import json
import math

import pytest

from experiments import compare_dictionaries, gradient_sae, transcoder_vs_sae
from experiments.comparison import METRICS, at_l0, comparable
from jaxinterp.errors import UserError

SMALL = {
    "model": "tiny", "features": 64, "tokens": 10_240, "heldout_tokens": 2048, "seq": 64, "batch_size": 256,
    "text": "docs",
}  # fmt: skip


def rows_at(*points):
    return [dict.fromkeys(METRICS, value) | {"l0": l0} for l0, value in points]


def test_between_two_settings_metrics_are_linear_in_log_l0():
    row = at_l0(rows_at((8.0, 0.4), (64.0, 0.1), (16.0, 0.3)), 32.0)
    assert row["how"] == "between" and row["l0"] == 32
    assert row["fvu"] == pytest.approx(0.3 + (0.1 - 0.3) * math.log(2) / math.log(4))


def test_a_near_setting_is_taken_as_it_is_and_a_far_one_is_not_compared():
    assert at_l0(rows_at((34.0, 0.4), (8.0, 0.1)), 32.0) == rows_at((34.0, 0.4))[0] | {"how": "measured"}
    far = at_l0(rows_at((100.0, 0.4), (90.0, 0.5)), 32.0)
    assert far["l0"] == 90 and far["how"] == "nearest" and comparable([far]) == []
    assert at_l0(rows_at((0.0, 1.0), (90.0, 0.5)), 32.0)["how"] == "nearest", "nothing active is no setting"


@pytest.mark.slow
def test_all_dictionaries_are_compared(tmp_path, capsys):
    config = compare_dictionaries.Config(
        out=tmp_path / "r", only="topk, group bias, skip transcoder", l0=8, ce_tokens=2048, **SMALL
    )
    compare_dictionaries.main(config)
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert {row["method"] for row in results["at"]} == {
        "topk", "group bias", "skip transcoder", "neurons", "pca", "linear", "random features",
    }  # fmt: skip
    for k, row in zip((4, 8, 16), results["all"]["topk"], strict=True):
        assert row["setting"] == f"topk, k {k}" and row["l0"] == pytest.approx(k, rel=0.05)
    fvu = [row["fvu"] for row in results["all"]["topk"]]
    assert fvu[0] > fvu[1] > fvu[2]
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count('class="series') == 2 * 4, "three methods and the neurons, in two charts"
    said = capsys.readouterr().out
    assert "leaves the least variance unexplained" in said.replace("\n", " ") and "an order, not" in said


def test_mistakes_are_told_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match=r"only='gatd' is no method.*gated"):
        compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", only="gatd"))
    with pytest.raises(UserError, match="l0=500 must lie between"):
        compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", l0=500, features=64))
    with pytest.raises(UserError, match="is no MLP"):
        transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", site="blocks/0/attn", ks=(4,), **SMALL))
    with pytest.raises(UserError, match="steered=100 must lie between"):
        gradient_sae.main(gradient_sae.Config(out=tmp_path / "r", steered=100, k=4, **SMALL))
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_transcoders_are_compared_with_autoencoders(tmp_path, capsys):
    transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", ks=(2, 8), ce_tokens=2048, **SMALL))
    rows = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [(row["method"], row["k"]) for row in rows][:2] == [("autoencoder", 2), ("autoencoder", 8)]
    said = capsys.readouterr().out.replace("\n", " ")
    won = sum(rows[2 + i]["fvu"] <= rows[i]["fvu"] for i in (0, 1))
    assert f"by FVU? The transcoder is at least as good as the autoencoder at {won} of 2" in said
    assert (tmp_path / "r" / "report.html").stat().st_size > 20_000


@pytest.mark.slow
def test_gradient_saes_are_scored_with_and_without_the_gradient(tmp_path):
    gradient_sae.main(gradient_sae.Config(out=tmp_path / "r", k=4, steered=4, site="blocks/3/mlp", **SMALL))
    rows = {row["method"]: row for row in json.loads((tmp_path / "r" / "results.json").read_text())}
    plain = rows["topk"]
    assert plain["fvu"] == pytest.approx(plain["no_gradient"]["fvu"], rel=1e-4), "strength 0 does not look at it"
    assert rows["effect alone"]["fvu"] > 1.05 * rows["effect alone"]["no_gradient"]["fvu"]
    assert all(row["steering_kl"] > 0 and row["effect"] > 0 for row in rows.values())
