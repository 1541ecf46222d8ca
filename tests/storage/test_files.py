"""Files in one step, with the user's umask; what a full disk says, on a real file system of one megabyte."""

import errno
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinterp.core.errors import UserError, cause, first_line
from jaxinterp.storage.checkpoints import Checkpoints
from jaxinterp.storage.files import check_empty, write_arrays, write_file, write_text
from jaxinterp.storage.lock import lock, unlock


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("write", ["text", "arrays"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk, write):
    def written(size):
        if write == "text":
            return write_text(small_disk / "deep" / "page.html", "x" * size)
        return write_arrays(small_disk / "deep" / "page.html", {"w": np.ones(size // 4, np.float32)})

    written(100_000)
    before = (small_disk / "deep" / "page.html").read_bytes()
    with pytest.raises(UserError, match=r"page.html could not be written: No space left on device") as refused:
        written(2_000_000)
    assert len(str(refused.value).splitlines()) == 1
    assert files(small_disk) == ["page.html"] and (small_disk / "deep" / "page.html").read_bytes() == before


def test_a_checkpoint_on_a_full_disk_says_so_in_one_line_without_tracebacks(small_disk, caplog):
    """Orbax tells a full disk in its last words, and its threads log a traceback each."""
    small, large = ({"w": jax.random.normal(jax.random.key(0), (size,))} for size in (1_000, 400_000))
    with (
        pytest.raises(UserError, match=r"step 2 .*: No space left on device; that of step 1 is kept") as refused,
        Checkpoints(small_disk / "run", {"k": 1}, resume=False) as checkpoints,
    ):
        checkpoints.save(1, small, {"next_index": 1}, history=[{"step": 1, "loss": 0.5}])
        checkpoints.save(2, large, {"next_index": 2})
    assert len(str(refused.value).splitlines()) == 1 and "Traceback" not in caplog.text
    with Checkpoints(small_disk / "run", {"k": 1}, resume=True) as checkpoints:
        assert checkpoints.latest == 1 and checkpoints.history(1) == [{"step": 1, "loss": 0.5}]
    assert not (small_disk / "run.lock").exists()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_permissions_of_the_user_s_umask(tmp_path, umask):
    """safetensors makes files of mode 0600."""
    before = os.umask(umask)
    try:
        for path in (
            write_text(tmp_path / "a" / "t.json", "{}"),
            write_arrays(tmp_path / "a" / "w.safetensors", {"w": np.ones(3)}),
        ):
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)
    np.testing.assert_array_equal(load_file(tmp_path / "a" / "w.safetensors")["w"], np.ones(3))


def test_arrays_keep_their_shapes_also_scalars_and_transposed_ones(tmp_path):
    arrays = {"scalar": np.asarray(2.5, np.float32), "turned": np.arange(6.0).reshape(2, 3).T, "none": np.zeros((0, 2))}
    back = load_file(write_arrays(tmp_path / "w.safetensors", arrays))
    for name, array in arrays.items():
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    def fails(path):
        path.write_text("half")
        raise KeyboardInterrupt

    write_text(tmp_path / "t", "old")
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "t", fails)
    assert files(tmp_path) == ["t"] and (tmp_path / "t").read_text() == "old"
    with pytest.raises(ValueError, match="its own mistake"):
        write_file(tmp_path / "t", lambda path: (_ for _ in ()).throw(ValueError("its own mistake")))


def test_a_folder_with_files_is_not_overwritten_silently(tmp_path):
    assert check_empty(tmp_path / "new", overwrite=False) == tmp_path / "new"
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="is not empty: pass overwrite=True"):
        check_empty(tmp_path, overwrite=False)
    assert check_empty(tmp_path, overwrite=True) == tmp_path
    with pytest.raises(UserError, match="is a file"):
        check_empty(tmp_path / "a", overwrite=True)


def test_the_cause_is_found_however_deep_it_lies():
    deep = ValueError("RESOURCE_EXHAUSTED: Failed writing " + "x" * 400 + ": No space left on device [os_error_code]")
    assert cause(deep) == "No space left on device"
    try:
        try:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        except OSError as error:
            raise RuntimeError("library words") from error
    except RuntimeError as error:
        assert cause(error) == "Read-only file system"
    assert cause(KeyError("k")) == "KeyError: 'k'"
    long = first_line(ValueError("a" * 300 + " the end"))
    assert len(long) < 220 and long.endswith("the end") and long.startswith("ValueError: aaa")


def test_the_lock_goes_away_with_the_run_and_one_left_by_a_kill_is_taken_over(tmp_path):
    held = lock(tmp_path / "run")
    with pytest.raises(UserError, match="is being written by"):
        lock(tmp_path / "run")
    unlock(held)
    assert files(tmp_path) == []
    (tmp_path / "run.lock").write_text("process 1 on nowhere")
    unlock(lock(tmp_path / "run"))
    assert files(tmp_path) == []


def test_a_lock_that_was_removed_while_it_was_taken_is_taken_anew(tmp_path, monkeypatch):
    """Between our opening of the file and our locking it, its holder may remove it."""
    from jaxinterp.storage import lock as module

    opened = []

    def flock(file, how):
        if not opened:
            os.unlink(tmp_path / "run.lock")
        opened.append(file)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    held = lock(tmp_path / "run")
    assert len(opened) == 2 and (tmp_path / "run.lock").exists()
    unlock(held)


def test_history_is_kept_and_absent_in_older_checkpoints(tmp_path):
    rows = [{"step": 10, "fvu": 0.25}, {"step": 20, "fvu": 0.125}]
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=False) as checkpoints:
        checkpoints.save(10, {"w": jnp.ones(3)}, {"next_index": 1}, history=rows[:1])
        checkpoints.save(20, {"w": jnp.ones(3)}, {"next_index": 2}, history=rows)
        checkpoints.settle()
        assert checkpoints.history(20) == rows and checkpoints.history(10) == rows[:1]
