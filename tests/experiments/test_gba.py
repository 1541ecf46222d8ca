"""The GBA experiment, small: rows and groups that mean something, resumed, refused."""

import json

import jax
import numpy as np
import pytest

from experiments.gba import PLANT, Config, entries, main
from experiments.gba_report import reading
from jaxinterp.core.errors import UserError

SMALL = {"features": 160, "steps": 600, "batch_size": 128, "seeds": 1}


@pytest.mark.slow
def test_the_plant_has_samples_of_two_sparsities_and_every_feature_the_same_frequency():
    active = np.asarray(PLANT.codes(jax.random.key(0), 4000)) > 0
    assert set(active.sum(1)) == {3, 20} and (active.sum(1) == 20).mean() == 0.5
    np.testing.assert_allclose(active.mean(0), 11.5 / 128, atol=0.02)


@pytest.mark.slow
def test_a_small_run_recovers_something_keeps_its_ceilings_and_resumes(tmp_path, capsys):
    config = Config(out=tmp_path / "g", only="GBA, full range; TopK, k 20", **SMALL)
    main(config)
    results = json.loads((tmp_path / "g" / "results.json").read_text())
    rows, floor = results["rows"], results["floor"]
    assert set(rows) == {"GBA, full range", "TopK, k 20"}
    assert min(row["mcc"] for row in rows.values()) > floor["mcc"] + 0.03
    assert rows["TopK, k 20"]["l0"] == pytest.approx(20, abs=0.5)
    groups = results["groups"]["GBA, full range"]
    assert [round(group["target"], 3) for group in groups[:2]] == [0.5, 0.251] and len(groups) == 10
    medians = [group["median"] for group in groups]
    assert np.corrcoef(np.log([group["target"] for group in groups]), medians)[0, 1] > 0.5
    html = (tmp_path / "g" / "report.html").read_text()
    assert "frequency against target" in html and "random rows" in capsys.readouterr().out

    assert "code_correlation" in rows["TopK, k 20"] and 0 < rows["TopK, k 20"]["fvu"] < 1
    main(Config(out=tmp_path / "g", only="GBA, full range; TopK, k 20", resume=True, **SMALL))
    again = json.loads((tmp_path / "g" / "results.json").read_text())
    assert again["rows"] == results["rows"], "rows that were there are not made again"


def row(value, reported=None):
    return {"frr_8": value, "frr_9": value, "mcc": value, "fvu": 0.1, "reported": reported}


FLOOR = {"mcc": 0.4, "frr_9": 0.0}


def test_sentences_follow_the_numbers():
    good = {"GBA, full range": row(1.0, (1.0, 1.0)), "GBA, range too low": row(0.1, (0.1, 0.1)), "TopK, k 20": row(0.9)}
    bad = {"GBA, full range": row(0.2, (1.0, 1.0)), "GBA, range too low": row(0.2), "TopK, k 20": row(0.9)}
    said, other = (" ".join(reading(rows, {}, FLOOR)) for rows in (good, bad))
    assert "too low hurt, as reported" in said and "is level with" in said and "all 2 rows that the paper has" in said
    assert (
        "too low do not hurt, unlike" in other
        and "is behind" in other
        and "GBA, full range 0.20, 0.20 (1.00, 1.00)" in other
    )


def test_nothing_is_said_of_what_was_not_compared_and_ceilings_only_where_they_hold():
    alone = " ".join(reading({"BA, one group": row(0.5)}, {}, FLOOR))
    assert "reported" not in alone and "the fewest" not in alone and "Control" not in alone
    full = {"GBA, full range": row(0.5)}
    group = {"target": 0.1, "median": 0.08, "above the target": 0.0}
    kept, broken = (
        " ".join(reading(full, {"GBA, full range": [group | {"above the target": above}]}, FLOOR)) for above in (0, 0.4)
    )
    assert "A target is a ceiling" in kept and "in 1 of 1 groups" in kept
    assert "no ceilings here" in broken and "40.0%" in broken and "A target is" not in broken


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    for changes, words in (
        ({"only": "GBA, ful range"}, "is not among: .*Did you mean 'GBA, full range'"),
        ({"only": "TopK, k 20; TopK, k 20"}, "TopK, k 20 stands there 2 times"),
        ({"features": 645}, "groups=10 must divide features=645"),
        ({"features": 40}, "features=40 must be at least 50"),
        ({"seeds": 0}, "seeds=0"),
    ):
        with pytest.raises(UserError, match=words):
            main(Config(out=tmp_path / "g", **{**SMALL, **changes}))
    assert not (tmp_path / "g").exists()
    assert entries(Config(out=tmp_path))["GBA, range too low"].reported == (0.383, 0.039)
