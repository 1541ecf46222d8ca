"""Processes that run one thing when told to, and say how long it took: a library, a shape and a memory peak each.

A worker reads one JSON object a line and answers with one JSON object a line:

    {"do": "start", "tokens": 4096, "width": 768, "features": 12288, "k": 32}   ->  what `start` returns, and "idle_mb"
    {"do": "run", "part": "step"}                  ->  {"wall": s, "cpu": s, "peak_mb": MB, ...}: one run of that part
    {"do": "end"}                                  ->  no answer; so does a closed input

"peak_mb" is the greatest resident size of the process so far, "idle_mb" the same when its libraries were imported.
An error is answered as {"error": text}. What libraries print goes to the standard error. No jax, no torch here: this
module is imported under the peers' interpreter as well.
"""

import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Sample, timed

ROOT = Path(__file__).parent.parent
BATCHES = 4


@dataclass(frozen=True)
class Shape:
    """Tokens of a batch, width of the activations, size of the dictionary, active features a token."""

    tokens: int = 4096
    width: int = 768
    features: int = 12288
    k: int = 32

    @staticmethod
    def parse(text: str) -> "Shape":
        """A shape from `tokens,width,features,k`.

        Raises:
          ValueError: these are not four positive whole numbers, or k exceeds the features.
        """
        parts = text.split(",")
        if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
            raise ValueError(f"shape {text!r}: write it as tokens,width,features,k, for instance 4096,768,12288,32.")
        shape = Shape(*map(int, parts))
        if shape.k > shape.features:
            raise ValueError(f"shape {text!r}: k={shape.k} exceeds features={shape.features}.")
        return shape

    def __str__(self) -> str:
        return f"N {self.tokens}, d {self.width}, M {self.features}, k {self.k}"


def activations(shape: Shape, seed: int = 0) -> list[np.ndarray]:
    """Batches [tokens, width] of Gaussian activations, float32, the same in every process.

    Dimension i has a variance in proportion to 1 / i (1 on average) and a mean of its own (0.5 in size), as activations
    have a few strong directions. Directions of a dictionary that lie along them are chosen often, most others rarely.
    """
    random = np.random.default_rng(seed)
    deviation = np.arange(1, shape.width + 1, dtype=np.float32) ** -0.5
    deviation /= np.sqrt(np.mean(deviation**2))
    mean = 0.5 * random.standard_normal(shape.width, np.float32)
    size = (shape.tokens, shape.width)
    return [mean + deviation * random.standard_normal(size, np.float32) for _ in range(BATCHES)]


def peak_mb() -> float:
    """The greatest resident size of this process so far, in MB.

    On Linux from the process's own record: `ru_maxrss` of a new process starts at the size of the one that made it.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (size if sys.platform == "darwin" else size * 1024) / 1e6


Part = Callable[[], dict[str, Any]]
"""Something to be timed: runs to the end, and returns what to say beside the time."""


Start = Callable[[Shape], tuple[dict[str, Any], Mapping[str, Part]]]
"""Makes a shape ready: what to say about it, and its parts by name."""


def serve(load: Callable[[], Start]) -> None:
    """Imports what there is to import, by load(), then answers requests until told to end."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not answer in our place
    start: Start | None = None
    parts: Mapping[str, Part] = {}
    idle = 0.0

    def answer(do: str, **said: Any) -> dict[str, Any]:
        nonlocal start, parts, idle
        if start is None:
            start = load()
            idle = peak_mb()
        if do == "start":
            about, parts = start(Shape(**said))
            return {**about, "idle_mb": idle}
        sample, more = timed(parts[said["part"]])
        return {**sample._asdict(), "peak_mb": peak_mb(), **more}

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "end":
            return
        try:
            print(json.dumps(answer(**request)), file=answers)
        except Exception as error:  # the parent decides what a failure means
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


class WorkerError(RuntimeError):
    """A worker could not do what it was told; one line that says why."""


class Worker:
    """A process that serves one library at one shape; a context manager."""

    def __init__(self, name: str, command: Sequence[str], shape: Shape, environment: Mapping[str, str] | None = None):
        """Starts the process and the library in it.

        Raises:
          WorkerError: it does not start; its standard error has been passed on.
        """
        self.name = name
        self.last: dict[str, Any] = {}
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            self.about = self.ask({"do": "start", **asdict(shape)})
        except WorkerError:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request and its answer.

        Raises:
          WorkerError: the worker failed or is gone.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name}: the process ended with code {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def run(self, part: str) -> Sample:
        """One run of a part; the whole answer is kept in `last`."""
        self.last = self.ask({"do": "run", "part": part})
        return Sample(self.last["wall"], self.last["cpu"])

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
