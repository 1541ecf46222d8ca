"""What can go wrong while a run saves and is resumed: nothing that was saved is lost. Invariant 9."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from jaxinterp.data.activations import Rows
from jaxinterp.errors import UserError
from jaxinterp.methods import SkipTranscoder
from jaxinterp.models.load import Subject
from jaxinterp.objectives import Ratio, reconstruction, total
from jaxinterp.storage.checkpoints import Checkpoints
from jaxinterp.training.fit import fit
from jaxinterp.training.guard import Losses, Preempted, Preemption
from jaxinterp.training.loop import Run
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.program import Program
from jaxinterp.training.state import TrainState
from jaxinterp.trees import named_leaves
from tests.training.test_fit import METHOD, SIZES, same

NUMBERS = "of 0.5/numbers"
SHAPES = {NUMBERS: jax.ShapeDtypeStruct((4096,), jnp.float32), "flags": jax.ShapeDtypeStruct((3,), jnp.bool_)}


def numbers(seed):
    return {NUMBERS: jax.random.normal(jax.random.key(seed), (4096,)), "flags": jnp.array([True, False, True])}


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


def test_a_second_writer_is_refused(tmp_path):
    words = rf"is being written by process {os.getpid()} on .*: wait for it"
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=True), pytest.raises(UserError, match=words):
        Checkpoints(tmp_path / "run", {"k": 1}, resume=True)
    saved(tmp_path / "run")


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


@pytest.mark.slow
def test_sigterm_saves_and_the_resumed_run_is_the_uninterrupted_one(subject, text, tmp_path):
    """To the last bit, though it stopped between two logged steps."""

    def stop(row):
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    sizes = SIZES | {"checkpoint": tmp_path / "parts"}
    with pytest.raises(Preempted, match="after step 6; everything is saved") as stopped:
        fit(METHOD, subject, text, **sizes, track=(stop,))
    assert stopped.value.step == 6
    whole = fit(METHOD, subject, text, **SIZES)
    same(whole.state, fit(METHOD, subject, text, **sizes, resume=True).state)


@pytest.mark.slow
def test_a_resumed_run_may_have_another_mesh(subject, text, tmp_path):
    whole = fit(METHOD, subject, text, **SIZES)
    sizes = SIZES | {"checkpoint": tmp_path / "run", "save_every": 10}
    fit(METHOD, subject, text, **sizes, stop_after=10, mesh=make_mesh(2, 4))
    moved = fit(METHOD, subject, text, **sizes, resume=True, mesh=make_mesh(4, 2))
    for name, leaf in named_leaves(whole.decomposition).items():
        np.testing.assert_allclose(np.asarray(named_leaves(moved.decomposition)[name]), leaf, atol=3e-5, err_msg=name)
    assert whole.history[-1]["loss"] == pytest.approx(moved.history[-1]["loss"], abs=1e-5)


def leaping(decomposition, batch, key, *, model=None):
    """An objective whose reported loss is a thousand times as large at step 14."""
    loss, metrics = total(reconstruction())(decomposition, batch, key)
    return loss, metrics | {"loss": Ratio(jnp.where(batch.step == 13, 1000.0, 1.0) * loss, jnp.ones(()))}


@pytest.mark.slow
def test_a_loss_that_leaps_ends_the_run(subject, text, tmp_path):
    method = SkipTranscoder(features=64, k=4, objective=leaping)
    sizes = SIZES | {"checkpoint": tmp_path / "run", "save_every": 5}
    with pytest.raises(
        UserError, match=r"at step 14 is \d+ times the size of the usual .*; the checkpoint of step 10 is kept"
    ) as first:
        fit(method, subject, text, **sizes)
    with pytest.raises(UserError) as again:
        fit(method, subject, text, **sizes, resume=True)
    assert str(again.value).partition(";")[0] == str(first.value).partition(";")[0]
    assert fit(method, subject, text, **SIZES, spike=None).history[-1]["step"] == 20


def test_an_unread_lock_is_let_go_by_death(tmp_path):
    """SIGKILL leaves nothing that keeps the next run out."""
    program = (
        "import os, signal, sys; from jaxinterp.storage.checkpoints import Checkpoints; "
        "Checkpoints(sys.argv[1], {'k': 1}, resume=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    saved(tmp_path / "run")


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


def full_disk(monkeypatch, steps):
    """Saves of these steps fail as they do where no room is left."""
    save = ocp.training.Checkpointer.save_checkpointables_async

    def fails(self, step, *arguments, **options):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, *arguments, **options)

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", fails)


def test_a_full_disk_stops_the_run(subject, text, tmp_path, monkeypatch):
    full_disk(monkeypatch, {10})
    sizes = SIZES | {"checkpoint": tmp_path / "run", "save_every": 5}
    with pytest.raises(UserError, match=r"step 10 could not be written .*No space left.*; that of step 5 is kept"):
        fit(METHOD, subject, text, **sizes)


def test_on_a_full_disk_the_checkpoint_that_is_there_is_named(subject, text, tmp_path, monkeypatch):
    """Going on without that of step 10: what ends the run at step 14 names that of step 5."""
    full_disk(monkeypatch, {10})
    method = SkipTranscoder(features=64, k=4, objective=leaping)
    sizes = SIZES | {"checkpoint": tmp_path / "run", "save_every": 5, "on_failed_save": "continue"}
    with (
        pytest.warns(UserWarning, match="step 10 could not be written .*: the run continues"),
        pytest.raises(UserError, match=r"at step 14 .*; the checkpoint of step 5 is kept"),
    ):
        fit(method, subject, text, **sizes)


@pytest.mark.parametrize("on_failed_save", ["stop", "continue"])
def test_a_preempted_run_does_not_say_that_it_saved_where_it_could_not(
    subject, text, tmp_path, monkeypatch, on_failed_save
):
    def stop(row):
        if row["step"] == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    full_disk(monkeypatch, {11})
    sizes = SIZES | {"checkpoint": tmp_path / "run", "save_every": 5, "on_failed_save": on_failed_save}
    if on_failed_save == "stop":
        with pytest.raises(UserError, match=r"step 11 could not be written .*; that of step 10 is kept"):
            fit(METHOD, subject, text, **sizes, track=(stop,))
    else:
        with pytest.warns(UserWarning, match="could not be written"), pytest.raises(Preempted) as stopped:
            fit(METHOD, subject, text, **sizes, track=(stop,))
        assert not stopped.value.saved and stopped.value.kept == 10
        assert "step 11; that step could not be saved: continue from step 10" in str(stopped.value)


def test_sigterm_in_the_last_step_is_passed_on():
    """The run is complete; what comes after it is asked to stop."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with Preemption():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not heard
        assert heard == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_before_the_first_step_saves_the_first_step(subject, text, tmp_path, monkeypatch):
    def first_state(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(self, *arguments)

    start = Program.first_state
    monkeypatch.setattr(Program, "first_state", first_state)
    with pytest.raises(Preempted, match="after step 1; everything is saved"):
        fit(METHOD, subject, text, **SIZES | {"checkpoint": tmp_path / "run"})


def test_other_weights_under_the_same_name_are_refused(subject, text, tmp_path):
    sizes = SIZES | {"steps": 5, "checkpoint": tmp_path / "run"}
    fit(METHOD, subject, text, **sizes)
    other = Subject(jax.tree.map(jnp.negative, subject.model), None, subject.name)
    with pytest.raises(UserError, match="was made with weights='"):
        fit(METHOD, other, text, **sizes, resume=True)


def test_a_second_sigterm_does_not_end_the_writing(subject, text, tmp_path, monkeypatch):
    """When `Preempted` is raised, the files are there; until then SIGTERM is listened to."""
    settle, seen = Checkpoints.settle, []

    def watched(self):
        pending = self._pending is not None
        if pending:
            seen.append(signal.getsignal(signal.SIGTERM))
        return settle(self)

    monkeypatch.setattr(Checkpoints, "settle", watched)
    with pytest.raises(Preempted):
        fit(
            METHOD,
            subject,
            text,
            **SIZES | {"checkpoint": tmp_path / "run"},
            track=(lambda row: os.kill(os.getpid(), signal.SIGTERM),),
        )
    assert len(seen) == 1 and seen[0] != signal.getsignal(signal.SIGTERM)
    assert (tmp_path / "run" / "5").is_dir() or (tmp_path / "run" / "6").is_dir()


def at(step):
    return TrainState({"w": jnp.ones(1)}, Rows({}, jnp.ones(1)), jax.random.key(0), jnp.int32(step))


@settings(deadline=None)
@given(log_every=st.integers(1, 6), times=st.integers(1, 12), steps=st.integers(1, 60))
def test_the_newest_written_checkpoint_is_never_more_than_save_every_steps_back(log_every, times, steps):
    """Invariant 28, also where a write is done only when somebody waits for it."""
    begun, written, behind = [], [0], []

    def settle():
        written[:] = begun[-1:] or written
        return written[0]

    def save(state):
        settle()
        begun.append(int(state.step))
        return settle

    def step(_, state):
        behind.append(int(state.step) + 1 - written[0])  # what a kill would cost at the end of this step
        return at(state.step + 1), {"loss": ratio(0.5)}

    save_every = times * log_every
    run = Run(step, None, lambda: WINDOWS, steps, log_every, save_every, (), Losses(None, None), save)
    run.from_state(at(0))
    assert max(behind) <= save_every and written == [steps]
    assert len(begun) <= 1 + steps // max(log_every, save_every // 3), "and saves are no more than that needs"


def ratio(loss):
    return Ratio(jnp.float32(loss), jnp.ones(()))


WINDOWS = {"tokens": jnp.zeros((2, 4), jnp.int32), "weight": jnp.ones((2, 4))}


def checked(losses, steps):
    for step, loss in enumerate(steps):
        losses.add(step, ratio(loss), WINDOWS)
    losses.check(lambda: "nothing")


def test_the_usual_loss_is_saved_with_the_state_and_a_leap_is_one_after_a_resume(tmp_path):
    before = Losses(100.0, None)
    checked(before, [0.5] * 20)
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=False) as checkpoints:
        checkpoints.save(20, numbers(1), {"next_index": 10}, before.recent)
    with Checkpoints(tmp_path / "run", {"k": 1}, resume=True) as checkpoints:
        after = Losses(100.0, None, recent=checkpoints.losses(20))
    with pytest.raises(UserError, match=r"at step 0 is 199 times the size of the usual 0.5"):
        checked(after, [100.0])


def test_a_negative_loss_may_rise_by_a_little():
    losses = Losses(100.0, None)
    checked(losses, [-0.5] * 20 + [0.001, 1.0])
    with pytest.raises(UserError, match=r"is 119 times the size of the usual -0.5"):
        checked(losses, [59.0])


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


def test_without_file_locks_a_run_goes_on_unlocked_and_says_so(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="is not locked: its file system knows no locks"):
        saved(tmp_path / "run", steps=(1,))


def test_a_method_without_a_loss_is_told(subject):
    def step(frozen, state):
        return state, {"fvu": ratio(1.0)}

    run = Run(step, None, lambda: WINDOWS, 5, 5, None, (), Losses(None, None))
    with pytest.raises(UserError, match="metrics have no 'loss', only 'fvu'"):
        run.from_state(at(0))
