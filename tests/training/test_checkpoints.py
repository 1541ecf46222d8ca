"""Checkpoints in a folder: damage, a second writer, a full disk, and what is not damage. Invariant 9."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxinterp.core.errors import UserError
from jaxinterp.storage.checkpoints import Checkpoints
from tests.training.small import NUMBERS, numbers

SHAPES = {NUMBERS: jax.ShapeDtypeStruct((4096,), jnp.float32), "flags": jax.ShapeDtypeStruct((3,), jnp.bool_)}


def saved(folder, steps=(1, 2)):
    with Checkpoints(folder, {"k": 1}, resume=True) as checkpoints:
        for step in steps:
            checkpoints.save(step, numbers(step), {"next_index": 10 * step})


def restored(folder):
    with Checkpoints(folder, {"k": 1}, resume=True) as checkpoints:
        return checkpoints.restore(SHAPES), checkpoints.latest


def test_the_position_in_the_data_is_saved_with_the_state(tmp_path):
    saved(tmp_path / "run")
    (state, position), latest = restored(tmp_path / "run")
    np.testing.assert_array_equal(state[NUMBERS], numbers(2)[NUMBERS])
    np.testing.assert_array_equal(state["flags"], [True, False, True])
    assert position == {"next_index": 20} and latest == 2


def spoil(folder, how):
    """The newest checkpoint, damaged in the file that holds most of its numbers."""
    largest = max((path for path in (folder / "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    if how == "a bit":
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif how == "a tail":
        largest.write_bytes(data[: len(data) // 2])
    elif how == "a file":
        largest.unlink()
    else:
        shutil.rmtree(folder / "2" / "state")


@pytest.mark.parametrize("how", ["a bit", "a tail", "a file", "a folder"])
def test_a_damaged_checkpoint_is_reported_put_aside_and_passed_over(tmp_path, how):
    saved(tmp_path / "run")
    spoil(tmp_path / "run", how)
    with pytest.warns(UserWarning, match=r"checkpoint of step 2 .* is damaged .* continues from step 1"):
        (state, position), latest = restored(tmp_path / "run")
    np.testing.assert_array_equal(state[NUMBERS], numbers(1)[NUMBERS])
    assert position == {"next_index": 10} and latest == 1
    assert (tmp_path / "run-damaged" / "2.0").is_dir()
    saved(tmp_path / "run", steps=(2,))
    assert restored(tmp_path / "run")[0][1] == {"next_index": 20}


def test_where_none_can_be_read_nothing_is_touched(tmp_path):
    saved(tmp_path / "run", steps=(2,))
    spoil(tmp_path / "run", "a bit")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* \(steps 2\) can be read"):
        restored(tmp_path / "run")
    assert (tmp_path / "run" / "2").is_dir() and not (tmp_path / "run-damaged").exists()


def test_a_checkpoint_that_no_longer_tells_its_configuration_is_damaged_not_another_run_s(tmp_path):
    saved(tmp_path / "run", steps=(2,))
    (tmp_path / "run" / "2" / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* \(steps 2\) can be read"):
        restored(tmp_path / "run")


def test_arrays_of_another_layout_are_no_damage(tmp_path):
    saved(tmp_path / "run")
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=True) as checkpoints:
        with pytest.raises(UserError, match=r"step 2 .* holds array 'flags', which this run has not"):
            checkpoints.restore({NUMBERS: SHAPES[NUMBERS]})
        with pytest.raises(UserError, match=r"of shape \(4096,\), and this run needs \(5,\)"):
            checkpoints.restore(SHAPES | {NUMBERS: jax.ShapeDtypeStruct((5,), jnp.float32)})
    assert not (tmp_path / "run-damaged").exists()


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path / "run")

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16384 bytes.")

    monkeypatch.setattr(ocp, "load_checkpointables", full)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        restored(tmp_path / "run")
    assert not (tmp_path / "run-damaged").exists()


def test_what_another_process_cannot_read_is_damaged_here_too(tmp_path, monkeypatch):
    """The other process's verdict of the newest checkpoint is put in where processes tell each other theirs."""
    saved(tmp_path / "run")
    verdicts = iter([1, 0])
    monkeypatch.setattr("jaxinterp.storage.checkpoints._worst", lambda code: max(code, next(verdicts)))
    with pytest.warns(UserWarning, match="step 2 .* another process cannot read it.* continues from step 1"):
        assert restored(tmp_path / "run")[0][1] == {"next_index": 10}


def test_a_second_writer_is_refused(tmp_path):
    words = rf"is being written by process {os.getpid()} on .*: wait for it"
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=True), pytest.raises(UserError, match=words):
        Checkpoints(tmp_path / "run", {"k": 1}, resume=True)
    saved(tmp_path / "run")


def test_an_unread_lock_is_let_go_by_death(tmp_path):
    """SIGKILL leaves nothing that keeps the next run out."""
    program = (
        "import os, signal, sys; from jaxinterp.storage.checkpoints import Checkpoints; "
        "Checkpoints(sys.argv[1], {'k': 1}, resume=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    saved(tmp_path / "run")


def test_without_file_locks_a_run_goes_on_unlocked_and_says_so(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="is not locked: its file system knows no locks"):
        saved(tmp_path / "run", steps=(1,))


@pytest.mark.parametrize("on_failed_save", ["stop", "continue"])
def test_a_full_disk(tmp_path, on_failed_save):
    """No file may grow beyond a kilobyte: the run stops as told or goes on, and the older checkpoint is there."""
    saved(tmp_path / "run", steps=(1,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    words = r"checkpoint of step 2 could not be written .*; that of step 1 is kept"
    told = (
        pytest.raises(UserError, match=f"{words}: make room and resume")
        if on_failed_save == "stop"
        else pytest.warns(UserWarning, match=f"{words}: the run continues")
    )
    options = {"resume": True, "on_failed_save": on_failed_save}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        with told, Checkpoints(tmp_path / "run", {"k": 1}, **options) as checkpoints:
            checkpoints.save(2, numbers(2), {"next_index": 20})
            checkpoints.settle()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            checkpoints.save(3, numbers(3), {"next_index": 30})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    (state, _), latest = restored(tmp_path / "run")
    assert latest == (1 if on_failed_save == "stop" else 3)
    np.testing.assert_array_equal(state[NUMBERS], numbers(latest)[NUMBERS])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "run", {}, resume=False)


def test_a_folder_opened_without_saving_says_nothing_of_the_next_run(tmp_path):
    """The configuration belongs to the checkpoints: the first one that was saved counts."""
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=False):
        pass
    with Checkpoints(tmp_path / "run", {"k": 2}, resume=False) as checkpoints:
        checkpoints.save(1, numbers(1), {"next_index": 10})
    with pytest.raises(UserError, match="was made with k=2, not 1"):
        Checkpoints(tmp_path / "run", {"k": 1}, resume=True)
    with Checkpoints(tmp_path / "run", {"k": 2}, resume=True) as checkpoints:
        assert checkpoints.restore(SHAPES)[1] == {"next_index": 10}
