"""The recovery experiment's command: a short run misses its threshold and says so, resumes, and tells a typo."""

import json

import pytest

from experiments.recovery import Config, main, methods
from jaxinterp.errors import UserError


@pytest.mark.slow
def test_a_short_run_writes_its_rows_and_fails_by_its_exit_code(tmp_path, capsys):
    config = Config(out=tmp_path / "r", only="topk", seeds=1, steps=100)
    with pytest.raises(SystemExit) as stopped:
        main(config)
    assert stopped.value.code == 1
    rows = json.loads((tmp_path / "r" / "recovery.json").read_text())
    assert set(rows) == {"topk", "topk, k x 3"} and 0.3 < rows["topk"]["mcc"] < methods()["topk"].threshold
    said = capsys.readouterr()
    assert "not as expected: topk" in said.err and "random rows" in said.out

    kept = (tmp_path / "r" / "recovery.json").read_bytes()
    with pytest.raises(SystemExit):
        main(Config(out=tmp_path / "r", only="topk", seeds=1, steps=100, resume=True))
    assert (tmp_path / "r" / "recovery.json").read_bytes() == kept, "rows that were there are not made again"
    with pytest.raises(UserError, match="steps=100, not 200"):
        main(Config(out=tmp_path / "r", only="topk", seeds=1, steps=200, resume=True))


def test_a_method_that_is_not_there_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match=r"only='gatd' is no method: .*gated"):
        main(Config(out=tmp_path / "r", only="gatd"))
    assert not (tmp_path / "r").exists()
