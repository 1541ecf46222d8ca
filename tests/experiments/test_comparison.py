"""Comparisons at equal L0: interpolation by hand, what is said of made-up numbers, the commands at a small size."""

import json
import math

import pytest

from experiments import compare_dictionaries, every_dictionary, transcoder_vs_sae
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.equal_sparsity import METRICS, agreement, ahead, at_l0, comparable, order
from jaxinterp.report.pareto import pareto

SMALL = {
    "model": "tiny", "features": 64, "tokens": 10_240, "heldout_tokens": 2048, "seq": 64, "batch_size": 256,
    "text": "docs",
}  # fmt: skip
NAN = float("nan")


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
    assert at_l0(rows_at((0.0, 1.0), (90.0, 0.5)), 32.0)["how"] == "nearest", "nothing active is not a setting"


def test_what_two_settings_do_not_share_is_not_kept_between_them():
    low, high = rows_at((16.0, 0.3), (64.0, 0.1))
    common = {"method": "m", "reads": "a/out", "ce_clean": 2.0}
    low |= common | {"setting": "k 16", "fvu_interval": [0.2, 0.4]}
    high |= common | {"setting": "k 64", "fvu_interval": [0.0, 0.2]}
    row = at_l0([low, high], 32.0)
    assert row["how"] == "between" and {"method", "reads", "ce_clean"} <= row.keys()
    assert not {"setting", "fvu_interval"} & row.keys()


def test_nothing_is_lost_by_sorting():
    rows = [{"fvu": value} for value in (0.3, NAN, 0.1)]
    assert [row["fvu"] for row in ahead(rows, "fvu")][:2] == [0.1, 0.3] and len(ahead(rows, "fvu")) == 3
    assert comparable([row("a", NAN, 3.0)]) == []


def test_intervals_that_overlap_are_level():
    def at(low, high):
        return {"ce_replaced_interval": (low, high)}

    assert order(at(1, 2), at(3, 4)) == "lower" and order(at(3, 4), at(1, 2)) == "higher"
    assert order(at(1, 3), at(2, 4)) == order(at(1, 2), at(2, 3)) == "level"


def row(method, fvu, ce, *, reads="out", how="measured", l0=8.0):
    found = dict.fromkeys(METRICS, 0.5) | {"method": method, "fvu": fvu, "ce_replaced": ce, "ce_clean": 2.0}
    return found | {"reads": f"blocks/1/mlp/{reads}", "how": how, "l0": l0}


def said_of(rows, rivals=()):
    return compare_dictionaries.reading(rows, list(rivals), 8, 0.002)


def test_orders_are_compared_by_their_rank_correlation():
    same = [row(name, value, 2 + value) for name, value in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)]
    swapped = [*same[:2], row("c", 0.3, 2.4), row("d", 0.4, 2.3)]
    assert agreement(same, "fvu", "ce_replaced") == pytest.approx(1)
    assert agreement(swapped, "fvu", "ce_replaced") == pytest.approx(0.8)
    assert agreement(same[:3], "fvu", "ce_replaced") is None
    assert agreement([row("a", 0.1, 2)] * 4, "fvu", "ce_replaced") is None
    said = said_of(same)
    assert "a leaves the least variance unexplained (0.100) and d the most (0.400)" in said[0]
    assert "nearly the same order: their rank correlation is 1.00" in said[1]
    assert "a similar order: their rank correlation is 0.80" in said_of(swapped)[1]
    turned = [row(name, value, 3 - value) for name, value in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)]
    assert "different orders: their rank correlation is -1.00" in said_of(turned)[1]
    assert "rank correlation" not in " ".join(said_of(same[:3]))


def test_one_method_is_not_the_first_and_the_last():
    said = said_of([row("a", 0.1, 2.1)])
    assert "One of the autoencoders is at L0 8, a" in said[0] and "the most" not in said[0]


def test_a_lead_within_the_intervals_is_told():
    def with_interval(name, ce, width):
        return row(name, ce - 2, ce) | {"ce_replaced_interval": (ce - width, ce + width)}

    near, far = ([with_interval("a", 2.1, width), with_interval("b", 2.3, width)] for width in (0.15, 0.05))
    assert "the 95 % intervals of these two overlap" in said_of(near)[0]
    assert "intervals" not in said_of(far)[0] and "intervals" not in said_of([*far[:1], row("b", 0.3, 2.3)])[0]


def test_rivals_count_where_they_have_that_l0_and_rates_are_told():
    rows = [row("relu L1", 0.1, 2.1), row("b", 0.3, 2.2), row("t", 0.3, 2.2, reads="in")]
    rivals = [row("pca", 0.2, 2.3), row("neurons", 0.1, 2.2, reads="in", how="nearest", l0=20.0)]
    said = said_of(rows, rivals)
    assert "1 of these 2 are ahead of pca in FVU (0.200); not: b." in said
    assert not any("neurons" in sentence for sentence in said), "it has another L0"
    assert "at a peak of 0.002, 5 times that for relu L1" in said[-1]
    assert "times that" not in said_of([row("b", 0.3, 2.2)])[-1]


def test_what_is_not_compared_is_named():
    said = said_of([row("a", 0.1, 2.1), row("far", 0.1, 2.1, how="nearest"), row("broken", NAN, NAN)])
    assert "No setting of far came to L0 8: the nearest is in the table and not compared." in said
    assert "The numbers of broken are not finite: not compared." in said
    assert not any("One of the" in sentence and "far" in sentence for sentence in said)


def test_one_setting_draws_a_mark_and_no_line_and_a_silent_one_is_told():
    charts = pareto({"line": [row("line", 0.1, 2.1), row("line", 0.2, 2.2, l0=4.0)], "one": [row("one", 0.3, 2.3)]})
    assert all(chart.svg.count('class="series') == 1 and "one: 8.000, " in chart.svg for chart in charts)
    assert "not drawn" not in charts[0].note
    assert "not drawn (dead)" in pareto({"dead": [row("dead", 1.0, 3.0, l0=0.0)], "a": [row("a", 0.1, 2.1)]})[0].note


def test_groups_divide_the_features_and_their_targets_add_up_to_multiples_of_the_l0():
    assert [every_dictionary.groups_of(features) for features in (2304, 1152, 640, 64, 2309)] == [9, 9, 10, 8, 1]
    adapted = every_dictionary.methods(2304, 64, 1e-3, 100)["group bias"]
    for count, method in zip((64, 128, 256), adapted.values(), strict=True):
        assert float(method.make_activation().targets().sum()) == pytest.approx(count, rel=1e-4)
    with pytest.raises(UserError, match=r"features=2309 has no divisor from 4 to 10.*take 2300"):
        every_dictionary.check_groups(2309)


@pytest.mark.slow
def test_all_dictionaries_are_compared_and_compared_again_on_resuming(tmp_path, capsys):
    options = {"only": "topk, matryoshka, group bias, skip transcoder", "l0": 8, "ce_tokens": 2048}
    compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", **options, **SMALL))
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert {row["method"] for row in results["at"]} == {
        "topk", "matryoshka", "group bias", "skip transcoder", "neurons", "pca", "linear", "random features",
    }  # fmt: skip
    for k, row in zip((4, 8, 16), results["all"]["topk"], strict=True):
        assert row["setting"] == f"topk, k {k}" and row["l0"] == pytest.approx(k, rel=0.05)
    fvu = [row["fvu"] for row in results["all"]["topk"]]
    assert fvu[0] > fvu[1] > fvu[2]
    page = (tmp_path / "r" / "report.html").read_text()
    assert "random features: " in page and "learning_rate of gated, relu L1, transcoder L1" in page
    said = capsys.readouterr().out
    assert (
        "leaves the least variance unexplained" in said and "an order, not" in said and "Measured on held-out" in said
    )

    compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", resume=True, **options, **SMALL))
    again = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [row["fvu"] for row in again["at"]] == [row["fvu"] for row in results["at"]]


def test_mistakes_are_told_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match=r"only='gatd' is not among: .*Did you mean 'gated'"):
        compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", only="gatd"))
    with pytest.raises(UserError, match="topk stands there 2 times"):
        compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", only="topk,topk"))
    with pytest.raises(UserError, match="l0=500 must lie between"):
        compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", l0=500, features=64))
    with pytest.raises(UserError, match="features=1154 has no divisor"):
        compare_dictionaries.main(compare_dictionaries.Config(out=tmp_path / "r", features=1154))
    with pytest.raises(UserError, match="is not an MLP"):
        transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", site="blocks/0/attn", ks=(4,), **SMALL))
    with pytest.raises(UserError, match="ks: 8 stands there 2 times"):
        transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", ks=(8, 4, 8), **SMALL))
    for name in ("ce_tokens", "heldout_tokens"):
        with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
            transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", ks=(4,), **SMALL | {name: 0}))
    assert not (tmp_path / "r").exists()


def paired(method, k, fvu, ce, l0=None):
    intervals = {"fvu_interval": (fvu - 0.01, fvu + 0.01), "ce_replaced_interval": (ce - 0.1, ce + 0.1)}
    return row(method, fvu, ce, l0=l0 or float(k)) | intervals | {"k": k}


def test_transcoders_are_counted_sparsity_by_sparsity():
    rows = [paired("autoencoder", 4, 0.2, 2.5), paired("autoencoder", 8, 0.1, 2.2)]
    rows += [paired("transcoder", 4, 0.3, 2.45), paired("transcoder", 8, 0.05, 2.1)]
    rows += [paired("skip transcoder", 4, 0.3, 2.1), paired("skip transcoder", 8, 0.2, 2.5, l0=6.0)]
    said = transcoder_vs_sae.answers(rows)
    assert "by cross-entropy? The transcoder is at least as good as the autoencoder at 2 of 2" in said[0]
    assert "k 4: 2.450 / 2.500" in said[0] and "overlap at 2" in said[0]
    assert "by FVU? The transcoder is at least as good as the autoencoder at 1 of 2" in said[1]
    assert "overlap at 0" in said[1] and "*" not in said[0] + said[1]
    assert "at 1 of 2" in said[2] and "k 8: 2.500 / 2.100*" in said[2]
    assert said[4] == "* At equal k, but with k 8: 6.0 and 8.0 active features: no comparison at equal L0."


@pytest.mark.slow
def test_transcoders_are_compared_with_autoencoders_and_scored_again_on_resuming(tmp_path, capsys):
    options = {"ks": (2, 8), "ce_tokens": 2048}
    transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", **options, **SMALL))
    rows = json.loads((tmp_path / "r" / "results.json").read_text())
    assert [(row["method"], row["k"]) for row in rows][:2] == [("autoencoder", 2), ("autoencoder", 8)]
    said = capsys.readouterr().out
    won = sum(rows[2 + i]["fvu"] <= rows[i]["fvu"] for i in (0, 1))
    assert f"by FVU? The transcoder is at least as good as the autoencoder at {won} of 2" in said
    assert (tmp_path / "r" / "report.html").stat().st_size > 20_000

    transcoder_vs_sae.main(transcoder_vs_sae.Config(out=tmp_path / "r", resume=True, **options, **SMALL))
    assert json.loads((tmp_path / "r" / "results.json").read_text()) == rows
