"""TensorBoard and Weights & Biases behind one function; the real writers, their files read back."""

import struct
import sys

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.training.tracking import JsonLines, read_rows, tracker

ROWS = [{"step": step, "loss": 1.0 / step, "tokens": 100 * step, "words": "not a number"} for step in (10, 20, 30)]


def scalars(folder):
    """(step, name, value) of the event files, in their order; each record is framed by its length and checksums."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = [], []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.session_log.status == 1:
                purged.append(event.step)
            found += [
                (event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if not value.HasField("tensor")
            ]
    return found, purged


def test_tensorboard_files_hold_every_number(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX, an extra, is not installed")
    track = tracker(f"tensorboard:{tmp_path}/tb", config={"k": 32})
    for row in ROWS:
        track(row)
    track.close()
    found, purged = scalars(tmp_path / "tb")
    assert [(step, name) for step, name, _ in found] == [(s, n) for s in (10, 20, 30) for n in ("loss", "tokens")]
    assert found[0][2] == pytest.approx(0.1) and found[-1][2] == 3000 and purged == []
    with pytest.raises(UserError, match=r"tensorboard:.*tb holds a run: resume it"):
        tracker(f"tensorboard:{tmp_path}/tb")


def test_a_resumed_tensorboard_run_hides_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboardX")
    for resume in (False, True):
        track = tracker(f"tensorboard:{tmp_path}/tb", resume=resume)
        for row in ROWS[resume:]:
            track(row)
        track.close()
    assert scalars(tmp_path / "tb")[1] == [20]


def test_weights_and_biases_keeps_a_run_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb, an extra, is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    track = tracker("wandb:project/run", config={"k": 32})
    for row in ROWS:
        track(row)
    track.close()
    assert [path.name for path in tmp_path.rglob("*.wandb")] == ["run-run.wandb"]


def test_a_file_of_json_lines_is_a_tracker_too(tmp_path):
    track = tracker(str(tmp_path / "log.jsonl"))
    assert isinstance(track, JsonLines)
    track(ROWS[0])
    assert read_rows(tmp_path / "log.jsonl") == ROWS[:1]


@pytest.mark.parametrize(
    ("where", "module", "message"),
    [
        ("tensorboard:runs", "tensorboardX", r"needs tensorboardX: .*'jaxinterp\[tensorboard\]'"),
        ("wandb:project/run", "wandb", r"needs wandb: .*'jaxinterp\[wandb\]'"),
    ],
)
def test_a_missing_package_is_told_with_its_extra(monkeypatch, where, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=message):
        tracker(where)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("tensorbord:runs", "track='tensorbord:runs': give tensorboard:FOLDER.* Did you mean 'tensorboard'"),
        ("tensorboard:", "track='tensorboard:': give"),
        ("wandb:project", "write it as wandb:project/run"),
        ("wandb:a/b/c", "write it as wandb:project/run"),
        ("log.csv", "track='log.csv': give"),
    ],
)
def test_what_is_no_tracker_is_refused(where, message):
    with pytest.raises(UserError, match=message):
        tracker(where)
