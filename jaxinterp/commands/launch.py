"""Start a command as several processes on this machine, as a pod would run it on several hosts.

Command: jaxinterp launch 2 transcoder --model tiny --mesh data=2 --out runs/two
         (each process has as many devices as it sees: for virtual ones, set XLA_FLAGS)

The first process writes to the terminal, each of the others to a file in the temporary folder. When one ends with an
error, the others are stopped, one line says so and names that file, and the exit code is not 0. SIGTERM and Ctrl-C are
passed on as SIGTERM, so that the run saves itself; its exit code is then 75, and --resume continues it.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxinterp.training.guard import PREEMPTED
from jaxinterp.training.hosts import VARIABLE

PATIENCE = 10
"""Seconds that the others have to end by themselves."""
MISTAKE = 2
"""Exit code for what the user can mend; its message says how."""
LEFT_ALONE = (-signal.SIGABRT, -signal.SIGTERM)
"""How JAX ends a process that waits for one that SIGTERM has stopped."""


def main(arguments: list[str]) -> int:
    """The exit code of the whole run."""
    if len(arguments) < 2 or not arguments[0].isdigit() or int(arguments[0]) < 1:
        if arguments[:1] in ([], ["--help"], ["-h"]):
            print(__doc__)
            return 0 if arguments else MISTAKE
        said = f"launch takes a number of processes and a command, such as launch 2 transcoder, not {arguments[0]!r}"
        print(f"error: {said}.", file=sys.stderr)
        return MISTAKE
    count, command = int(arguments[0]), arguments[1:]
    folder = Path(tempfile.mkdtemp(prefix="jaxinterp-launch-"))
    address = f"localhost:{free_port()}"
    processes = [_start(command, f"{address},{count},{index}", folder, index) for index in range(count)]
    told: list[int] = []

    def stop(number: int, _: Any) -> None:
        told.append(number)
        for process in processes:
            process.send_signal(signal.SIGTERM)  # a terminal sends Ctrl-C to all by itself; twice would interrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while (first := _failed(processes)) is None:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return PREEMPTED if PREEMPTED in codes else 0
        time.sleep(0.2)
    code = processes[first].returncode
    _end(processes)
    if told and code in LEFT_ALONE and PREEMPTED in [process.returncode for process in processes]:
        return PREEMPTED
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    logs = "" if first == 0 else f"; its output is in {_log(folder, first)}"
    print(
        f"launch: process {first} of {count} {how}, and the others were stopped{logs}."
        + ("" if code == MISTAKE else " What was saved is kept: continue with --resume."),
        file=sys.stderr,
    )
    return code if code > 0 else 128 - code


def _failed(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """The first process that ended otherwise than well or preempted."""
    codes = [process.poll() for process in processes]
    return next((index for index, code in enumerate(codes) if code not in (None, 0, PREEMPTED)), None)


def _start(command: list[str], hosts: str, folder: Path, index: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {VARIABLE: hosts}
    arguments = [sys.executable, "-m", *command]
    if index == 0:
        return subprocess.Popen(arguments, env=environment)
    with _log(folder, index).open("wb") as log:
        return subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log(folder: Path, index: int) -> Path:
    return folder / f"process{index}.log"


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
