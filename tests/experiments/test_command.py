"""What all experiments share on the command line: names, folders, files and printing."""

import json

import pytest

from jaxinterp.commands.on_text import OnText
from jaxinterp.commands.shell import (
    check_distinct,
    check_folder,
    chosen,
    command,
    folder_of_a_run,
    measured_on,
    open_folder,
    print_table,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.storage.lock import lock, unlock
from jaxinterp.training.guard import Preempted


def test_names_are_chosen_without_their_blanks_and_all_where_none_is_named():
    assert chosen(" b ,a,", "abc") == ["b", "a"] and chosen("", "abc") == chosen(" , ", "abc") == ["a", "b", "c"]
    assert chosen("one, two; three", ["one, two", "three"], ";") == ["one, two", "three"]


def test_a_name_that_is_not_there_is_told_with_the_names_and_the_nearest():
    with pytest.raises(UserError, match=r"only='gatd' is not among: topk, gated. Did you mean 'gated'\?"):
        chosen("topk,gatd", ["topk", "gated"])
    with pytest.raises(UserError, match="only: topk stands there 2 times"):
        chosen("topk, topk", ["topk", "gated"])
    check_distinct("ks", (1, 2))
    with pytest.raises(UserError, match="ks: 8 stands there 2 times"):
        check_distinct("ks", (8, 4, 8))


def test_a_folder_is_resumed_with_its_own_settings_only(tmp_path):
    check_folder(tmp_path / "absent", {"k": 1}, resume=False)
    folder = open_folder(tmp_path / "r", {"k": 1, "heldout_tokens": 10, "ce_tokens": 5})
    with pytest.raises(UserError, match="is not empty: pass --resume"):
        check_folder(folder, {"k": 1}, resume=False)
    check_folder(folder, {"k": 1, "heldout_tokens": 10, "ce_tokens": 6}, resume=True)
    with pytest.raises(UserError, match="was run with heldout_tokens=10, not 11"):
        check_folder(folder, {"k": 1, "heldout_tokens": 11, "ce_tokens": 5}, resume=True)


def test_what_is_no_run_is_not_resumed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has files but no config\.json"):
        check_folder(tmp_path, {"k": 1}, resume=True)
    (tmp_path / "config.json").write_text('{"k": 1')
    with pytest.raises(UserError, match=r"config.json is broken \(line 1\): delete it"):
        check_folder(tmp_path, {"k": 1}, resume=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_refused_run_leaves_no_folder_that_blocks_the_next(tmp_path):
    out = tmp_path / "r"
    with pytest.raises(UserError, match="no"), folder_of_a_run(out, {"k": 1}):
        (out / "log.jsonl").write_text("")
        raise UserError("no")
    assert not out.exists()
    with pytest.raises(UserError, match="later"), folder_of_a_run(out, {"k": 1}):
        (out / "checkpoints" / "10").mkdir(parents=True)
        raise UserError("later")
    assert read_json(out / "config.json") == {"k": 1}, "what a checkpoint stands in is kept"
    with pytest.raises(UserError, match="again"), folder_of_a_run(out, {"k": 1}):
        raise UserError("again")
    assert (out / "checkpoints" / "10").exists()
    with pytest.raises(UserError, match="is being written by"), folder_of_a_run(tmp_path / "t", {"k": 1}) as out:
        held = lock(out / "checkpoints")  # another run that began at the same moment
        (out / "log.jsonl").write_text("its own")
        lock(out / "checkpoints")
    assert (tmp_path / "t" / "log.jsonl").exists(), "what another run may still write to is kept"
    with pytest.raises(UserError, match="is being written by"):
        open_folder(tmp_path / "t", {"k": 2})
    assert read_json(tmp_path / "t" / "config.json") == {"k": 1}
    unlock(held)
    with pytest.raises(RuntimeError), folder_of_a_run(tmp_path / "s", {"k": 1}):
        raise RuntimeError("a crash keeps what there is")
    assert (tmp_path / "s" / "config.json").exists()


def test_files_are_replaced_in_one_step(tmp_path):
    write_json(tmp_path / "a" / "r.json", {"x": [1, 2]})
    write_json(tmp_path / "a" / "r.json", {"x": 3})
    assert json.loads((tmp_path / "a" / "r.json").read_text()) == {"x": 3}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["r.json"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "r.json", {"x": object()})
    assert read_json(tmp_path / "a" / "r.json") == {"x": 3}


def test_brackets_and_long_paths_are_printed_as_they_are(capsys):
    path = "/somewhere/" + "deep/" * 30 + "[run]/report.html"
    say(f"Report: {path}", "second [bold]line")
    assert capsys.readouterr().out == f"Report: {path}\nsecond [bold]line\n"


def test_a_table_leaves_out_what_a_row_lacks(capsys):
    columns = {"name": ("name", "{}"), "value": ("value", "{:.2f}")}
    print_table(columns, [{"name": "a [b]", "value": 0.5}, {"name": "c"}, {"name": "d", "value": float("nan")}])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["name", "value"] and lines[2:] == [["a", "[b]", "0.50"], ["c"], ["d", "nan"]]


def test_what_was_measured_is_told_and_settings_are_plain(tmp_path):
    assert "on 1,500 tokens" in measured_on([{"tokens": 1500, "ce_tokens": 700}])
    settings = settings_of(OnText(out=tmp_path, ce_tokens=7))
    assert "out" not in settings and "resume" not in settings and settings["ce_tokens"] == 7
    assert "steps" not in settings and json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("k=0 must be at least 1."), 2, "error: k=0 must be at least 1."),
        (
            Preempted(30, saved=True),
            75,
            "stopped by SIGTERM after step 30; everything is saved: continue with --resume",
        ),
    ],
)
def test_how_a_run_ends_is_one_line_and_a_code(monkeypatch, capsys, raised, code, words):
    def main(config):
        raise raised

    monkeypatch.setattr("sys.argv", ["experiment", "--out", "there"])
    with pytest.raises(SystemExit) as ended:
        command(OnText, main, "made up")
    assert ended.value.code == code and words in capsys.readouterr().err
