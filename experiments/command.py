"""What every experiment's command line does: parse, run, and tell a user's mistake in one line."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from jaxinterp.errors import UserError
from jaxinterp.storage import first_difference

Config = TypeVar("Config")


def command(config: type[Config], main: Callable[[Config], Any], description: str | None) -> None:
    """Run `main` on the configuration that the command line gives; exit code 2 and one line for a user's mistake."""
    try:
        main(tyro.cli(config, description=description))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_folder(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse an output folder that cannot be used; nothing is written.

    Raises:
      UserError: it is a file; it holds files and `resume` is False; or it was run with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: choose a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise UserError(f"out={folder} is not empty: pass --resume to continue that run, or choose another folder.")
    saved = folder / CONFIG
    if saved.exists():
        before, now = (
            {k: v for k, v in each.items() if k not in FREE} for each in (json.loads(saved.read_text()), settings)
        )
        difference = first_difference(before, now)
        if difference is not None:
            field, then, asked = difference
            raise UserError(f"{folder} was run with {field}={then!r}, not {asked!r}: resume with the same value.")


def open_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Make the output folder and keep the settings of the run in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dict(settings), indent=2) + "\n")
    return folder


CONFIG = "config.json"
FREE = ("mesh", "pages", "save_every", "heldout_tokens", "ce_tokens")  # may change when a run is resumed
COLUMNS = {
    "method": ("method", "{}"),
    "fvu": ("FVU", "{:.3f}"),
    "l0": ("L0", "{:.0f}"),
    "dead_fraction": ("dead", "{:.1%}"),
    "ce_replaced": ("CE", "{:.3f}"),
    "ce_recovered_zero": ("rec zero", "{:.3f}"),
    "ce_recovered_mean": ("rec mean", "{:.3f}"),
    "kl": ("KL", "{:.3f}"),
    "top1_agreement": ("top-1", "{:.3f}"),
}


def print_scoreboard(rows: list[dict[str, Any]], console: Console) -> None:
    """The scoreboard as a table that fits a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, (title, _) in COLUMNS.items():
        table.add_column(title, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, (_, form) in COLUMNS.items()))
    console.print(table)
    first = rows[0]
    console.print(
        f"CE: cross-entropy of the next token with the MLP replaced (clean {first['ce_clean']:.3f}, "
        f"zero {first['ce_zero']:.3f}, mean {first['ce_mean']:.3f}); rec: what is recovered of the loss from "
        "zero and mean ablation."
    )
