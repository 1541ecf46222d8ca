"""Trackers: where the numbers of a run go. A tracker is a function of one row of plain numbers; no account needed.

    tracker("runs/a/log.jsonl")          a file of JSON lines
    tracker("tensorboard:runs/a/tb")     TensorBoard's event files        (pip install 'jaxinterp[tensorboard]')
    tracker("wandb:project/run")         Weights & Biases                 (pip install 'jaxinterp[wandb]')

What a service needs is imported when its tracker is made.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, cause, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.storage.files import told
from jaxinterp.storage.json_text import json_text


class JsonLines:
    """Appends every row to a .jsonl file.

    With `resume` the rows that are there stay, except those from the first new row's step on: what a killed run had
    logged after its last checkpoint is computed again. A row that cannot be written, as on a full disk, is told
    once and left out: the run goes on.

    Raises:
      UserError: a row that is there has no step: the file is not a run's.
    """

    def __init__(self, path: str | Path, *, resume: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._earlier: list[dict[str, Json]] | None = read_rows(self.path) if resume else None
        self._told = False
        for number, row in enumerate(self._earlier or [], 1):
            if not isinstance(row.get("step"), int):
                raise _foreign(self.path, number)
        if not resume:
            with told(self.path):
                self.path.write_text("")

    def __call__(self, row: Mapping[str, Json]) -> None:
        try:
            if self._earlier is not None:
                self._keep_before(row["step"], self._earlier)
                self._earlier = None
            self._append((json_text(dict(row)) + "\n").encode())
        except OSError as error:
            if not self._told:
                warnings.warn(f"{self.path} could not be written ({cause(error)}): rows are missing.", stacklevel=2)
            self._told = True

    def _keep_before(self, step: int, rows: list[dict[str, Json]]) -> None:
        """Replace the file in one step by its rows before `step`."""
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        unfinished.write_text("".join(json_text(row) + "\n" for row in rows if row["step"] < step))
        os.replace(unfinished, self.path)

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it: half a line would hide all rows after it."""
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):
                file.truncate(end)
                raise OSError("there is no room for a whole row")


def read_rows(path: str | Path) -> list[dict[str, Json]]:
    """The rows of a .jsonl file; none where the file is absent. A last line that a kill cut short is left out.

    Raises:
      UserError: a line holds something else than a JSON object.
    """
    file = Path(path)
    rows: list[dict[str, Json]] = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            raise _foreign(file, number)
        rows.append(row)
    return rows


def training_seconds(rows: Iterable[Mapping[str, Json]]) -> float:
    """How long the logged steps took, over all parts of a resumed run."""
    seconds, before = 0.0, 0
    for row in rows:
        seconds, before = seconds + (row["tokens"] - before) / row["tokens_per_second"], row["tokens"]
    return seconds


def _foreign(file: Path, number: int) -> UserError:
    return UserError(f"{file}, line {number}: no row of a run, which has a step: choose another file.")


class TensorBoard:
    """Writes every number of a row as a scalar into event files, which `tensorboard --logdir` shows.

    With `resume`, TensorBoard hides what an earlier part of the run had logged from the first new row's step on.

    Raises:
      UserError: tensorboardX is not installed, or the folder holds event files and `resume` is False.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False, config: Mapping[str, Json] | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboardX") from error
        self.folder = Path(folder)
        if not resume and any(self.folder.glob("events.out.tfevents.*")):
            raise UserError(f"tensorboard:{folder} holds a run: resume it, or choose another folder.")
        self._resume, self._config = resume, config
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def __call__(self, row: Mapping[str, Json]) -> None:
        step = int(row["step"])
        if self._writer is None:
            self._writer = self._make(str(self.folder), purge_step=step if self._resume else None)
            if self._config and not self._resume:
                self._writer.add_text("config", f"```\n{json.dumps(self._config, indent=2, default=str)}\n```", 0)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Logs every row to a run of Weights & Biases: `project/run`. Without an account: WANDB_MODE=offline.

    Raises:
      UserError: wandb is not installed, or `where` is not of this form.
    """

    def __init__(self, where: str, *, resume: bool = False, config: Mapping[str, Json] | None = None):
        project, _, run = where.rpartition("/")
        if not project or not run or "/" in project:
            raise UserError(f"wandb:{where}: write it as wandb:project/run.")
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        self._run = wandb.init(
            project=project, name=run, id=run, config=dict(config or {}), resume="must" if resume else "never"
        )

    def __call__(self, row: Mapping[str, Json]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """End the run; what was logged is sent."""
        self._run.finish()


SERVICES: Mapping[str, Callable[..., Any]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def tracker(where: str, *, resume: bool = False, config: Mapping[str, Json] | None = None) -> PyTree:
    """The tracker that a short text names: `tensorboard:FOLDER`, `wandb:PROJECT/RUN`, or a .jsonl file.

    Args:
      resume: go on with the run that is there.
      config: plain values that the run is known by, where the service shows them.
    Returns:
      What `fit(..., track=[...])` takes; `close()` ends it where it has something to end.
    Raises:
      UserError: no such service, or its package is not installed.
    """
    check_tracker(where)
    service, _, rest = where.partition(":")
    if service in SERVICES:
        return SERVICES[service](rest, resume=resume, config=config)
    return JsonLines(where, resume=resume)


def check_tracker(where: str) -> None:
    """Raises UserError if a text names no tracker; nothing is made or written."""
    service, colon, rest = where.partition(":")
    if not (colon and service in SERVICES and rest) and not (where.endswith(".jsonl") and not colon):
        raise UserError(
            f"track={where!r}: give tensorboard:FOLDER, wandb:PROJECT/RUN, or a file ending in .jsonl."
            f"{suggest(service, SERVICES)}"
        )


def _missing(extra: str, package: str) -> UserError:
    return UserError(f"tracking with {extra} needs {package}: python -m pip install 'jaxinterp[{extra}]'.")
