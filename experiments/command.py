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
    "ce_replaced": "CE",
    "ce_recovered_zero": "rec/zero",
    "ce_recovered_mean": "rec/mean",
    "kl": "KL",
    "top1_agreement": "top-1",
}


def print_scoreboard(rows: list[dict[str, Any]], console: Console) -> None:
    """The scoreboard as a table on the terminal."""
    first = rows[0]
    table = Table(
        title="Scoreboard on held-out text",
        caption=f"CE: cross-entropy with the MLP replaced (clean {first['ce_clean']:.3f}, zero {first['ce_zero']:.3f}, "
        f"mean {first['ce_mean']:.3f}); rec: recovered against zero and mean ablation",
    )
    for name, title in COLUMNS.items():
        table.add_column(title, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in COLUMNS))
    console.print(table)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
