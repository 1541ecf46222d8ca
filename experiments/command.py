"""What every experiment's command line does: parse, run, and tell a user's mistake in one line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from jaxinterp.errors import UserError

Config = TypeVar("Config")


def command(config: type[Config], main: Callable[[Config], Any], description: str | None) -> None:
    """Run `main` on the configuration that the command line gives; exit code 2 and one line for a user's mistake."""
    try:
        main(tyro.cli(config, description=description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def claim_folder(folder: Path, *, resume: bool) -> Path:
    """Make the output folder.

    Raises:
      UserError: it holds files and `resume` is False, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: choose a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise UserError(f"out={folder} is not empty: pass --resume to continue that run, or choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


COLUMNS = {
    "method": "method",
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "ce_clean": "CE clean",
    "ce_replaced": "CE replaced",
    "ce_zero": "CE zero",
    "ce_mean": "CE mean",
    "ce_recovered_zero": "recovered/zero",
    "ce_recovered_mean": "recovered/mean",
    "kl": "KL",
    "top1_agreement": "top-1",
}


def print_scoreboard(rows: list[dict[str, Any]], console: Console) -> None:
    """The scoreboard as a table on the terminal."""
    table = Table(title="scoreboard (held-out text)")
    for column in COLUMNS.values():
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in COLUMNS))
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
