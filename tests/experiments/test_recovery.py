"""The recovery experiment's command: a short run misses its threshold and says so, resumes, and tells a typo."""

import json
import re

import pytest

from experiments import recovery
from experiments.planted_methods import controls, methods
from experiments.recovery import Config, main, missed, reading
from jaxinterp.core.errors import UserError

NAN = float("nan")


@pytest.mark.slow
def test_a_short_run_writes_its_rows_and_a_page_and_fails_by_its_exit_code(tmp_path, capsys):
    config = Config(out=tmp_path / "r", only="topk, skip_transcoder", seeds=1, steps=100)
    with pytest.raises(SystemExit) as stopped:
        main(config)
    assert stopped.value.code == 1
    rows = json.loads((tmp_path / "r" / "recovery.json").read_text())
    assert set(rows) == {"topk", "skip_transcoder", "topk, k x 3"}
    assert 0.3 < rows["topk"]["mcc"] < methods()["topk"].threshold and rows["topk"]["l0"] == pytest.approx(3, abs=0.1)
    assert -1 < rows["topk"]["code_correlation"] < 1 and rows["topk"]["sign_errors"] == 0
    assert "read" in rows["skip_transcoder"] and "read" not in rows["topk"]
    said = capsys.readouterr()
    assert "not as expected: topk has MCC" in said.err and "random rows" in said.out
    assert "independent implementation" in (tmp_path / "r" / "report.html").read_text()

    kept = (tmp_path / "r" / "recovery.json").read_bytes()
    with pytest.raises(SystemExit):
        main(Config(out=tmp_path / "r", only="topk", seeds=1, steps=100, resume=True))
    assert (tmp_path / "r" / "recovery.json").read_bytes() == kept, "rows that were there are not made again"
    with pytest.raises(UserError, match="steps=100, not 200"):
        main(Config(out=tmp_path / "r", only="topk", seeds=1, steps=200, resume=True))


def row(mcc, threshold=0.9, control="", fvu=0.1, **more):
    return {"mcc": mcc, "threshold": threshold, "control": control, "fvu": fvu} | more


GOOD = {"topk": row(0.95), "transcoder": row(0.96, read=0.99), "k x 3": row(0.85, 0.93, "topk", 0.09)}


def test_where_all_is_as_it_must_be_the_command_ends_well(tmp_path, capsys, monkeypatch):
    made = GOOD["topk"] | {"mccs": [0.95], "frr_9": 1.0, "stability": 1.0}
    scores = {0.97: made | {"mcc": 0.99}, 0.93: made | {"mcc": 0.85}}
    monkeypatch.setattr(
        recovery, "recovered", lambda entry, config: dict(scores[entry.threshold], control=entry.control)
    )
    monkeypatch.setattr(recovery, "chance", lambda seeds: {"mcc": 0.4})
    main(Config(out=tmp_path / "r", only="topk"))
    assert "1 of 1 methods reach" in (tmp_path / "r" / "report.html").read_text()
    assert capsys.readouterr().err == ""


def test_nothing_is_missed_where_all_is_as_it_must_be():
    assert missed(GOOD, {"mcc": 0.4}) == []
    said = reading(GOOD, {"mcc": 0.4}, [])
    assert "2 of 2 methods reach" in said[0] and "FVU 0.090 beside 0.100 of topk" in said[1]


@pytest.mark.parametrize(
    ("changes", "floor", "words"),
    [
        ({"topk": row(0.89)}, 0.4, "topk has MCC 0.890, not 0.90"),
        ({"topk": row(NAN)}, 0.4, "topk has MCC nan, not 0.90"),
        ({"transcoder": row(0.96, read=0.5)}, 0.4, "transcoder has read vectors at 0.500"),
        ({"k x 3": row(0.93, 0.93, "topk")}, 0.4, r"k x 3 \(a control\) has MCC 0.930, not below 0.93"),
        ({"k x 3": row(NAN, 0.93, "topk")}, 0.4, "MCC nan, not below 0.93"),
        ({"k x 3": row(0.85, 0.93, "topk", fvu=0.103)}, 0.4, "FVU 0.103, worse than 0.100"),
        ({}, 0.9, "random rows have MCC 0.900"),
        ({}, NAN, "random rows have MCC nan"),
    ],
)
def test_what_is_not_as_it_must_be_is_named(changes, floor, words):
    (wrong,) = missed(GOOD | changes, {"mcc": floor})
    assert re.search(words, wrong)


def test_every_control_belongs_to_a_method():
    assert {entry.control for entry in controls().values()} <= set(methods())
    assert not any(entry.control for entry in methods().values())


def test_a_method_that_is_not_there_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match=r"only='gatd' is not among: .*Did you mean 'gated'"):
        main(Config(out=tmp_path / "r", only="gatd"))
    with pytest.raises(UserError, match="seeds=0 must be at least 1"):
        main(Config(out=tmp_path / "r", seeds=0))
    assert not (tmp_path / "r").exists()
