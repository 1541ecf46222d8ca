"""Kill a training run at random moments, resume it each time, and compare its end with that of a run left alone.

Command: python -m benchmarks.faults --kills 25

SIGKILL at moments drawn at random: while the process starts, between steps, inside a step, while a checkpoint is being
written (one is, a good part of the time: the steps are short). Prints kills, resumes, the steps that a kill cost, and
whether the whole last state (decomposition, optimizer, buffer, step) is the same to the last bit. Exit code 1 where it
is not, or where a kill cost more steps than the run was told to lose at most (`save_every`).
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SAVE_EVERY = 20
STEPS = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop", type=int, default=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.stop)
    folder = Path(tempfile.mkdtemp(prefix="jaxinterp-faults-"))
    moments = random.Random(options.seed)
    killed, lost, reached_before = 0, [], 0
    while killed < options.kills:
        reached, resumed = life(folder / "killed", folder, moments)
        if reached is None:
            print(f"the run ended by itself after {killed} kills")
            return 1
        killed += 1
        if killed > 1:
            lost.append(reached_before - resumed)
        reached_before = max(reached, resumed)
        print(f"kill {killed:3}: resumed at step {resumed}, killed after step {reached}", flush=True)
    last = int(reached_before) // SAVE_EVERY * SAVE_EVERY + 5 * SAVE_EVERY
    for name in ("killed", "alone"):
        subprocess.run(command(folder / name, last), check=True, env=environment(folder))
    same = equal(folder / "killed", folder / "alone")
    most = max(lost, default=0)
    print(
        f"{killed} kills, {len(lost)} resumes, at most {most} steps lost to one (save_every={SAVE_EVERY}); after "
        f"{last} steps the state is {'to the last bit' if same else 'NOT'} that of a run left alone"
    )
    shutil.rmtree(folder)
    return 0 if same and most <= SAVE_EVERY else 1


def command(folder: Path, stop: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.faults", "--worker", str(folder), "--stop", str(stop)]


def environment(folder: Path) -> dict[str, str]:
    """Compiled programs are kept, so that a restart costs little."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def life(out: Path, folder: Path, moments: random.Random) -> tuple[int | None, int]:
    """One process from its start to SIGKILL: the last step that it logged (None: it ended by itself), its first."""
    log = out / "log.txt"
    before = log.read_text().count("\n") if log.exists() else 0
    process = subprocess.Popen(command(out, STEPS), env=environment(folder), stdout=subprocess.DEVNULL)
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0, 6))
    else:
        lines = before + moments.randint(1, 6 * SAVE_EVERY)  # however fast the machine is, some checkpoints are written
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
    if process.poll() is not None:
        return None, 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = log.read_text().splitlines()[before:] if log.exists() else []
    starts = [int(line.split()[1]) for line in lines if line.startswith("start")]
    resumed = starts[0] if starts else saved(out)
    return max([resumed, *(int(line.split()[1]) for line in lines)]), resumed


def saved(out: Path) -> int:
    """The newest checkpoint, for a process that was killed before it read it."""
    folder = out / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=0)


def worker(out: Path, stop: int) -> int:
    """Train, resuming where there is something to resume; write every logged step to log.txt, the end to state.npz."""
    import grain

    from jaxinterp.core.trees import named_leaves
    from jaxinterp.methods import SkipTranscoder
    from jaxinterp.models.load import load
    from jaxinterp.training.fit import fit

    out.mkdir(parents=True, exist_ok=True)
    started: list[int] = []

    def note(row: Any) -> None:
        with (out / "log.txt").open("a") as file:
            if not started:
                started.append(row["step"] - 1)
                file.write(f"start {started[0]}\n")
            file.write(f"step {row['step']}\n")

    subject = load("tiny")
    tokens = np.random.default_rng(0).integers(0, 256, (2048, 64)).astype(np.int32)
    weight = np.ones((2048, 64), np.float32)
    text = grain.MapDataset.source([{"tokens": row, "weight": w} for row, w in zip(tokens, weight, strict=True)])
    method = SkipTranscoder(features=64, k=4, learning_rate=1e-3, dead_after=1000)
    result = fit(
        method,
        subject,
        text,
        site="blocks/1/mlp",
        steps=STEPS,
        stop_after=stop,
        batch_size=512,
        log_every=1,
        save_every=SAVE_EVERY,
        checkpoint=out / "checkpoints",
        resume=True,
        track=(note,),
    )
    arrays = {name: leaf for name, leaf in named_leaves(result.state).items() if name != "key"}
    np.savez(out / "state.npz", **{name.replace("/", "."): np.asarray(leaf) for name, leaf in arrays.items()})
    return 0


def equal(one: Path, two: Path) -> bool:
    """Whether two last states are the same to the last bit."""
    first, second = np.load(one / "state.npz"), np.load(two / "state.npz")
    return set(first) == set(second) and all(np.array_equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    sys.exit(main())
