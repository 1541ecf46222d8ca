"""Gradient SAEs, compared: with and without the gradient, measured on held-out text; what is said of ties; resumed."""

import json

import pytest

from experiments.gradient_sae import Config, answers, main
from jaxinterp.core.errors import UserError

SMALL = {
    "model": "tiny", "features": 64, "tokens": 10_240, "heldout_tokens": 2048, "ce_tokens": 2048, "seq": 64,
    "batch_size": 256, "k": 4, "steered": 4, "site": "blocks/3/mlp",
}  # fmt: skip


@pytest.mark.slow
def test_they_are_scored_with_and_without_the_gradient_and_scored_again_on_resuming(tmp_path, capsys):
    main(Config(out=tmp_path / "r", **SMALL))
    rows = {row["method"]: row for row in json.loads((tmp_path / "r" / "results.json").read_text())}
    plain, pure = rows["topk"], rows["effect alone"]
    assert plain["fvu"] == pytest.approx(plain["no_gradient"]["fvu"], rel=1e-4), "strength 0 does not look at it"
    assert plain["effect"] == pytest.approx(plain["no_gradient"]["effect"], rel=1e-4)
    assert pure["fvu"] > 1.05 * pure["no_gradient"]["fvu"]
    assert pure["effect"] != pytest.approx(pure["no_gradient"]["effect"], rel=1e-2)
    assert all(row["steering_kl"] > 0 and row["steering_error"] > 0 and row["effect"] > 0 for row in rows.values())
    assert "best of 4 variants" in capsys.readouterr().out

    main(Config(out=tmp_path / "r", resume=True, **SMALL))
    again = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [row["fvu"] for row in again] == [row["fvu"] for row in rows.values()]


def row(method, ce, *, width=0.01, dead=0.1, kl=1.0, error=0.1, alone=None):
    found = {"method": method, "ce_replaced": ce, "ce_replaced_interval": (ce - width, ce + width), "ce_clean": 2.0}
    found |= {"fvu": 0.1, "effect": 0.2, "dead_fraction": dead, "steering_kl": kl, "steering_error": error}
    return found | {"no_gradient": row(method, alone or ce, alone=0) if alone != 0 else None}


def test_sentences_follow_the_numbers():
    plain = row("topk", 2.5)
    said = answers([plain, row("a", 2.4, dead=0.05, kl=1.5, alone=2.495), row("b", 2.6, dead=0.2, kl=0.5)])
    assert "best of 2 variants, chosen on this same text, is a" in said[0] and "lower than the one plain" in said[0]
    assert "best of the 2 is a at 2.495: within the 95 % intervals of plain TopK's" in said[1]
    assert "fewer by more than 1% in a, more in b" in said[4]
    assert "standard error of the difference: a; less: b" in said[5]


def test_ties_are_called_ties():
    said = answers([row("topk", 2.5), row("a", 2.495, dead=0.095, kl=1.2)])
    assert (
        "within the 95 % intervals" in said[0] and "in none, more in none" in said[4] and "none; less: none" in said[5]
    )
    assert "higher than the one plain" in answers([row("topk", 2.5), row("a", 2.6)])[0]


def test_mistakes_are_told_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match="steered=100 must lie between"):
        main(Config(out=tmp_path / "r", **SMALL | {"steered": 100}))
    with pytest.raises(UserError, match="heldout_tokens=0 must be at least 1"):
        main(Config(out=tmp_path / "r", **SMALL | {"heldout_tokens": 0}))
    assert not (tmp_path / "r").exists()
