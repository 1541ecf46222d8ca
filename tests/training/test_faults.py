"""What can go wrong while a run trains, saves and is resumed: nothing that was saved is lost. Invariant 9."""

import errno
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import Rows
from jaxinterp.methods import SkipTranscoder
from jaxinterp.models.load import Subject
from jaxinterp.objectives import Ratio, reconstruction, total
from jaxinterp.storage.checkpoints import Checkpoints
from jaxinterp.training.fit import fit
from jaxinterp.training.guard import Losses, Preempted, Preemption
from jaxinterp.training.loop import Run
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.program import Program
from jaxinterp.training.state import TrainState, all_finite
from tests.training.small import METHOD, SIZES, numbers, same


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_number_that_is_not_finite_is_found(dtype):
    """Among zeros and the greatest numbers of either sign; whole numbers are not asked."""
    most = float(jnp.finfo(dtype).max)
    good = np.array([0.0, -0.0, most, -most, most], np.float32)
    for bad, finite in ((1.0, True), (np.nan, False), (np.inf, False), (-np.inf, False)):
        tree = {"steps": jnp.arange(3), "moments": jnp.asarray(np.append(good, bad), dtype)}
        assert bool(all_finite(tree)) == finite


@pytest.mark.parametrize("number", Preemption.SIGNALS)
def test_a_signal_in_the_last_step_is_passed_on(number):
    """The run is complete; what comes after it is asked to stop."""
    heard = []
    before = signal.signal(number, lambda *_: heard.append(1))
    try:
        with Preemption():
            os.kill(os.getpid(), number)
            assert not heard
        assert heard == [1]
    finally:
        signal.signal(number, before)


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a shell that starts the suite in the background lets it ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_interrupts_at_once(capsys, interruptible):
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.asked(together=True) and preemption.by == "SIGINT"
        assert "Ctrl-C again stops at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_saves_says_so_and_the_finished_run_has_all_rows(subject, text, tmp_path, interruptible):
    def stop(row):
        if row["step"] == 10:
            os.kill(os.getpid(), signal.SIGINT)

    sizes = SIZES | {"checkpoint": tmp_path / "run"}
    with pytest.raises(Preempted, match="stopped by SIGINT after step 11; everything is saved: continue with --resume"):
        fit(METHOD, subject, text, **sizes, track=(stop,))
    assert not (tmp_path / "run.lock").exists()
    resumed = fit(METHOD, subject, text, **sizes, resume=True)
    assert [row["step"] for row in resumed.history] == [5, 10, 15, 20]
    again = fit(METHOD, subject, text, **sizes, resume=True)
    assert again.history == resumed.history and len(again.history) == 4


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


def test_a_method_may_have_no_loss():
    def step(_, state):
        return at(state.step + 1), {"fvu": ratio(1.0)}

    run = Run(step, None, lambda: WINDOWS, 5, 5, None, (), Losses(None, None))
    assert int(run.from_state(at(0)).step) == 5 and run.history[0]["fvu"] == 1 and "loss" not in run.history[0]
