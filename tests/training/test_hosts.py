"""Several real processes on this machine: the same answer as one, an end that everybody notices, a resumed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxinterp.commands.launch import free_port
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.load import load
from jaxinterp.training.fit import fit
from jaxinterp.training.hosts import VARIABLE, check_agreement, join
from tests.training.hosted import METHOD, QUICK, SIZES, text


def of_devices(count):
    """The environment of a process with so many virtual devices."""
    flags = f"{QUICK} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def launch(processes, out, mesh, steps=20):
    """`experiments.launch` of the worker, eight virtual devices in all."""
    command = [sys.executable, "-m", "experiments.launch", str(processes), "tests.training.host_worker"]
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, str(out), mesh, str(steps)],
        env=of_devices(8 // processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def alone():
    return fit(METHOD, load("tiny"), text(), **SIZES)


def is_the_same(alone, out):
    """Losses to 1e-5, weights to a hundredth of one of Adam's steps, as on a mesh of one process."""
    found = np.load(out / "result.npz")
    for name, leaf in named_leaves(alone.decomposition).items():
        np.testing.assert_allclose(found[name.replace("/", ".")], leaf, rtol=0, atol=3e-5, err_msg=name)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in alone.history]
    for one, row in zip(alone.history, rows, strict=True):
        assert row["loss"] == pytest.approx(one["loss"], abs=1e-5)


def finished(run):
    """What a run wrote to stdout and stderr, once it has ended well."""
    out, error = run.communicate(timeout=300)
    assert run.returncode == 0, error
    return out, error


@pytest.mark.slow
def test_a_killed_process_ends_the_run(tmp_path):
    """Everything is over within a minute, and one line says what happened."""
    out = tmp_path / "run"
    run = launch(2, out, "data=2,feature=4", 100_000)
    until = time.monotonic() + 200
    while not any((out / "checkpoints").glob("[1-9]0")) and time.monotonic() < until:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    workers = children(run.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    _, error = run.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and run.returncode != 0
    assert "launch: process 1 of 2 was ended by SIGKILL, and the others were stopped" in error
    assert not any(alive(worker) for worker in workers)


GATHERS = """
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinterp.training.hosts import join

join()
while True:
    multihost_utils.process_allgather(np.ones(1))
    Path(__file__).with_name(f"ready{jax.process_index()}").touch()
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "pause"), [(0, 0.1), (1, 0.1), (1, 300)])
def test_without_the_launcher_a_lost_process_ends_the_others(tmp_path, lost, pause):
    """By signs of life, of which none may be missing for longer than 30 s; by an end that our code does not see.

    Processes that exchange numbers all the time, as those of a run do, or do not: then only the signs of life can tell.
    That a whole run ends: the test above.
    """
    script, address = tmp_path / "gathers.py", f"localhost:{free_port()}"
    script.write_text(GATHERS)
    given = of_devices(4) | {"PYTHONPATH": str(Path.cwd())}
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(pause)],
            env=given | {VARIABLE: f"{address},2,{index}"},
            stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]
    until = time.monotonic() + 300
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < until:
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.1)
    workers[lost].kill()
    killed = time.monotonic()
    assert workers[1 - lost].wait(timeout=90) != 0
    assert time.monotonic() - killed < 60


SHORT = "--tokens 5120 --seq 32 --batch-size 256 --features 64 --heldout-tokens 512 --ce-tokens 256"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "text", "code"),
    [
        ("transcoder --k 4 --pages 2", "", 0),
        ("transcoder --k 4 --pages 2", "no/such/text", 2),
        ("sweep --sweep k=2,4 --sweep seed=0,1", "", 0),
    ],
)
def test_the_launcher_runs_a_whole_experiment(tmp_path, experiment, text, code):
    """Training in both, the report in the first; and a mistake ends both, though each would wait for the other."""
    (tmp_path / "text").mkdir()
    for index in range(60):
        words = " ".join(f"the {index + n} quick brown foxes jump over {n * index} lazy dogs." for n in range(12))
        (tmp_path / "text" / f"{index}.txt").write_text(words)
    command = [sys.executable, "-m", "experiments.launch", "2", *f"experiments.{experiment} --model tiny".split()]
    places = ["--text", text or str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--mesh", "data=2,feature=4"]
    run = subprocess.run([*command, *places, *SHORT.split()], env=of_devices(4), capture_output=True, timeout=500)
    assert run.returncode == code, run.stderr.decode()
    assert (tmp_path / "out" / "report.html").is_file() == (code == 0)


@pytest.mark.slow
def test_two_processes_are_one_and_another_number_passes_over_damage_that_some_see(alone, tmp_path):
    """Invariant 5. Two processes, the model spread over both, are one; then the second's part of the newest checkpoint
    is gone: of four processes on another mesh some miss it, all go on from the one before, and are one in the end.

    None waits for the others. Of the four, two read the same rows of every batch; logs and result are the first one's.
    """
    out, _ = finished(launch(2, tmp_path / "run", "data=2,feature=2,model=2"))
    assert "2 processes, 8 devices" in out
    is_the_same(alone, tmp_path / "run")
    (lost,) = (tmp_path / "run" / "checkpoints" / "20" / "state").glob("ocdbt.process_1")
    shutil.rmtree(lost / "d")
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "result.npz").unlink()
    started = time.monotonic()
    out, error = finished(launch(4, tmp_path / "run", "data=2,feature=4"))
    assert "step 20 in" in error and "continues from step 15" in error, error
    assert time.monotonic() - started < 150, "Orbax's barriers wait for five minutes"
    assert "4 processes, 8 devices" in out
    found = np.load(tmp_path / "run" / "result.npz")
    for name, leaf in named_leaves(alone.decomposition).items():
        np.testing.assert_allclose(found[name.replace("/", ".")], leaf, rtol=0, atol=3e-5, err_msg=name)


def stop_when_ready(run, folder):
    """SIGTERM to the launcher, once both processes have left their file."""
    until = time.monotonic() + 100
    while len(list(folder.glob("ready*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)


WAITS = """
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxinterp.commands.shell import command
from jaxinterp.training.hosts import join


@dataclass(frozen=True)
class Config:
    hosts: str = "auto"


def main(config):
    join(config.hosts)
    Path(__file__).with_name(f"ready{jax.process_index()}").touch()
    time.sleep(120)


command(Config, main, "")
"""


@pytest.mark.slow
def test_sigterm_before_the_first_step_is_not_lost(tmp_path):
    """JAX has its own listener for SIGTERM in several processes, which does nothing."""
    (tmp_path / "waits.py").write_text(WAITS)
    run = subprocess.Popen(
        [sys.executable, "-m", "experiments.launch", "2", "waits"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    stop_when_ready(run, tmp_path)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 75 and "stopped by SIGTERM: continue with --resume" in error


def test_what_waits_for_a_preempted_process_is_preempted_too(tmp_path):
    """As in JAX's last barrier: the first process ends with 75, and the second is aborted for it."""
    (tmp_path / "ends.py").write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        f"index = int(os.environ['{VARIABLE}'].split(',')[2])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75) if index == 0 else (time.sleep(1), os.abort()))\n"
        "Path(__file__).with_name(f'ready{index}').touch()\ntime.sleep(60)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-m", "experiments.launch", "2", "ends"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
    )
    stop_when_ready(run, tmp_path)
    assert run.wait(timeout=60) == 75


@pytest.mark.parametrize(
    ("codes", "code", "words"),
    [
        ((0, 0), 0, ""),
        ((75, 75), 75, ""),
        ((75, 3), 3, "process 1 of 2 ended with code 3, and the others were stopped"),
        ((0, 2), 2, "process 1 of 2 ended with code 2"),
        ((75, -9), 137, "process 1 of 2 was ended by SIGKILL"),
    ],
)
def test_the_launcher_s_code_is_that_of_the_one_that_failed(tmp_path, codes, code, words):
    """Also where another one ended well before it."""
    (tmp_path / "ends.py").write_text(
        "import os, sys, time\n"
        f"index = int(os.environ['{VARIABLE}'].split(',')[2])\n"
        f"code = {codes}[index]\n"
        "time.sleep(index)\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "experiments.launch", "2", "ends"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == code and words in run.stderr
    assert bool(run.stderr) == bool(words) and ("--resume" in run.stderr) == (code in (3, 137))


@pytest.mark.slow
def test_sigterm_saves_everywhere(tmp_path):
    """The launcher passes it on; the exit code says that the run wants to be resumed."""
    out = tmp_path / "run"
    run = launch(2, out, "data=2,feature=4", 100_000)
    until = time.monotonic() + 200
    while not any((out / "checkpoints").glob("[1-9]0")) and time.monotonic() < until:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=100)
    assert run.returncode == 75, error
    assert "everything is saved: continue with --resume" in error


def children(process):
    listed = subprocess.run(["ps", "--ppid", str(process), "-o", "pid="], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_that_were_given_different_texts_are_refused(monkeypatch):
    """What the second process gathers is put in: the same, but for the text."""

    def gathered(sums):
        other = sums.copy()
        other[1] += 1
        return np.stack([sums, other])

    monkeypatch.setattr("jaxinterp.training.hosts.multihost_utils.process_allgather", gathered)
    with pytest.raises(UserError, match=r"differ in 'text' \(here 'abc'\): give each the same command, files"):
        check_agreement({"steps": 20, "text": "abc"})


@pytest.mark.parametrize("hosts", ["localhost", "localhost:99,2", "localhost:99,2,2", "localhost:x,2,0", "somewhere"])
def test_words_that_name_no_hosts_are_refused(hosts):
    with pytest.raises(UserError, match="ADDRESS:PORT,COUNT,INDEX"):
        join(hosts)
