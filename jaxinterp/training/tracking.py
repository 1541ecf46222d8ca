"""Trackers: where the numbers of a run go. A tracker is a function of one row of plain numbers; no account needed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class JsonLines:
    """Appends every row to a .jsonl file.

    With `resume` the rows that are there stay, except those from the first new row's step on: what a killed run had
    logged after its last checkpoint is computed again.
    """

    def __init__(self, path: str | Path, *, resume: bool = False):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._earlier: list[dict[str, Any]] | None = read_rows(self.path) if resume else []
        if not resume:
            self.path.write_text("")

    def __call__(self, row: Mapping[str, Any]) -> None:
        if self._earlier is not None:
            kept = [earlier for earlier in self._earlier if earlier["step"] < row["step"]]
            self.path.write_text("".join(json.dumps(earlier) + "\n" for earlier in kept))
            self._earlier = None
        with self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none where the file is absent. A last line that a kill cut short is left out."""
    file = Path(path)
    rows: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class ProgressBar:
    """A bar with tokens, tokens per second, FVU, L0, dead features and the time left; a context manager."""

    def __init__(self, steps: int, description: str = "training"):
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Numbers(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task(description, total=steps)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        task = self._progress.tasks[0]
        if error is None and not task.fields.get("row"):  # a finished run was resumed
            self._progress.update(self._task, completed=task.total, row={}, description="already trained")
        self._progress.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=row["step"], row=dict(row))


class _Numbers(ProgressColumn):
    """The latest row, in words."""

    def render(self, task: Any) -> Text:
        row = task.fields.get("row")
        if not row:
            return Text("compiling" if row is None else "")
        parts = [f"{row['tokens'] / 1e3:,.0f}k tokens", f"{row['tokens_per_second']:,.0f}/s"]
        parts += [f"{label} {row[name]:.3f}" for label, name in (("FVU", "fvu"), ("loss", "loss")) if name in row][:1]
        parts += [f"L0 {row['l0']:.1f}"] if "l0" in row else []
        parts += [f"dead {row['dead_fraction']:.1%}"] if "dead_fraction" in row else []
        return Text("  ".join(parts))
