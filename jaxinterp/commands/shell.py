"""What every experiment's command line does: parse, run, keep results, print, and tell a user's mistake in one line."""

import json
import math
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import jax
import tyro
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from rich import box
from rich.console import Console
from rich.table import Table

from jaxinterp.core.errors import UserError, cause, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.core.trees import first_difference
from jaxinterp.evaluation.columns import RECONSTRUCTION
from jaxinterp.evaluation.effects import Effect
from jaxinterp.evaluation.listed_effects import effect_of
from jaxinterp.storage.files import write_text
from jaxinterp.storage.json_text import json_text
from jaxinterp.storage.lock import lock, unlock
from jaxinterp.training.guard import PREEMPTED, Preempted
from jaxinterp.training.hosts import VARIABLE

Config = TypeVar("Config")
Columns = Mapping[str, tuple[str, str]]
"""Of a printed table: title -> (key of the rows, format); the format "{}" stands for words."""

CONFIG = "config.json"
WIDTH = 80
FREE = (
    "mesh",
    "cache",
    "pages",
    "save_every",
    "on_failed_save",
    "spike",
    "ce_tokens",
    "effect",
    "harvest_parts",
    "most_seconds",
)
"""Settings that may change when a run is resumed."""


def command(
    config: type[Config],
    main: Callable[[Config], Any],
    description: str | None,
    *,
    words: Sequence[str] | None = None,
    default: Config | None = None,
    name: str | None = None,
) -> None:
    """Run `main` on the configuration that the command line gives.

    `--out FOLDER --resume` takes the settings that are kept in the folder; what is given besides must agree with them.
    One line and exit code 2 for a user's mistake or a file that cannot be written, 75 for a run that SIGTERM or Ctrl-C
    stopped and that wants to be resumed. Of several processes, one that fails ends at once: the others wait for it in
    vain and are ended by its silence.

    Args:
      words: of the command line; default: those of this program.
      default: the values of what is not given; default: those of the class.
      name: of the program, in --help.
    """
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    words = sys.argv[1:] if words is None else list(words)
    try:
        start: Any = kept_settings(config, words) or default
        options = tyro.cli(config, args=words, description=description, default=start, prog=name)
        if not hasattr(options, "hosts") and VARIABLE in os.environ:
            raise UserError(
                f"{VARIABLE} is set, but this experiment runs in one process: start it without the launcher."
            )
        main(options)
    except Preempted as stopped:
        before = dict.fromkeys(before, signal.SIG_IGN)  # once more changes nothing
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        print(stopped, file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted at once: what was saved before is kept, continue with --resume.", file=sys.stderr)
        leave(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except BrokenPipeError:
        # The reader of a pipe went away, as `--help | head` does: nothing is left to say, and Python's own flush at the
        # end would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141)
    except OSError as error:
        if not error.filename:
            traceback.print_exc()
            leave(1)
        print(f"error: {error.filename}: {cause(error)}.", file=sys.stderr)
        leave(2)
    except Exception:
        traceback.print_exc()
        leave(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: Any) -> None:
    """Before training and after it there is nothing new to save: what was done then is done again."""
    print(f"stopped by {signal.Signals(number).name}: continue with --resume.", file=sys.stderr)
    leave(PREEMPTED)


def value_of(words: Sequence[str], option: str) -> str | None:
    """What a command line gives for `--option`; the last one counts; None where it is not there."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == f"--{option.replace('_', '-')}":
            found = value if equals else following
    return found


def kept_settings(config: type[Config], words: Sequence[str]) -> Config | None:
    """The configuration of the run in the output folder, where the command line asks to resume it; else None.

    Raises:
      UserError: what the folder keeps is not JSON.
    """
    out = value_of(words, "out")
    if out is None or "--resume" not in words or not (Path(out) / CONFIG).is_file():
        return None
    hints, values = get_type_hints(config), {"out": Path(out), "resume": True}
    for field, value in read_json(Path(out) / CONFIG).items():
        if field not in hints or field in values:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, tuple) and value_of(words, field) is not None:
            value = ()  # what is given is appended to the default
        is_path = hints[field] is Path or Path in get_args(hints[field])
        values[field] = Path(value) if is_path and isinstance(value, str) else value
    return config(**values)


def leave(code: int) -> NoReturn:
    """Exit; of several processes without the usual wait for the others, who may be waiting for this one."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def chosen(only: str, known: Iterable[str], separator: str = ",") -> list[str]:
    """The names that `only` lists; all that are known where it lists none.

    Raises:
      UserError: a name is not known, or stands there twice.
    """
    names = list(known)
    wanted = [name.strip() for name in only.split(separator) if name.strip()] or names
    for name in wanted:
        if name not in names:
            raise UserError(f"only={name!r} is not among: {f'{separator} '.join(names)}.{suggest(name, names)}")
    check_distinct("only", wanted)
    return wanted


def check_distinct(field: str, values: Sequence[Any]) -> None:
    """Raises UserError if a value stands in a list twice: its rows would have one name."""
    for value, times in Counter(values).items():
        if times > 1:
            raise UserError(f"{field}: {value} stands there {times} times; once is enough.")


def check_positive(config: Any, *names: str) -> None:
    """Raises UserError if a field is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1.")


def check_folder(folder: Path, settings: Mapping[str, Json], *, resume: bool) -> None:
    """Refuse an output folder that cannot be used; nothing is written.

    Raises:
      UserError: it is a file; it holds files and `resume` is False; what it holds is not a run of an experiment; or the
        run had other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: choose a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not resume:
        raise UserError(f"out={folder} is not empty: pass --resume to continue that run, or choose another folder.")
    if not (folder / CONFIG).exists():
        raise UserError(f"out={folder} has files but no {CONFIG}: it is not a run to resume; choose another folder.")
    before, now = (
        {k: v for k, v in each.items() if k not in FREE} for each in (read_json(folder / CONFIG), dict(settings))
    )
    difference = first_difference(before, now)
    if difference is not None:
        field, then, asked = difference
        raise UserError(f"{folder} was run with {field}={then!r}, not {asked!r}: resume with the same value.")


def open_folder(folder: Path, settings: Mapping[str, Json]) -> Path:
    """Make the output folder and keep the settings of the run in it; of several processes, the first one alone.

    All must come here: none writes before each has looked at the folder.

    Raises:
      UserError: a run is writing to it.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("every process has looked at the folder")
    if jax.process_index() == 0:
        check_unlocked(folder)
        write_json(folder / CONFIG, settings)
    return folder


def check_unlocked(folder: Path) -> None:
    """Raises UserError if a run is writing its checkpoints in this folder."""
    if (folder / "checkpoints.lock").exists():
        unlock(lock(folder / "checkpoints"))


@contextmanager
def folder_of_a_run(folder: Path, settings: Mapping[str, Json]) -> Iterator[Path]:
    """`open_folder`, undone where the run is refused before it kept anything, so that it blocks no other run."""
    fresh = not folder.exists() or not any(folder.iterdir())
    try:
        yield open_folder(folder, settings)
    except UserError:
        if fresh and jax.process_index() == 0 and not _kept_something(folder):
            shutil.rmtree(folder)
        raise


def _kept_something(folder: Path) -> bool:
    """Whether there are results in it, or a run that may still have some."""
    try:
        check_unlocked(folder)
    except UserError:
        return True
    kept = ("checkpoints/[0-9]*", "*/decomposition.json", "*/dictionary.json", "refused_batch*")
    return any(next(folder.glob(pattern), None) for pattern in kept)


def settings_of(config: Any, *without: str) -> dict[str, Json]:
    """What a run is known by: the fields of its configuration as JSON has them, without `out`, `resume`, `without`."""
    fields = {name: value for name, value in vars(config).items() if name not in ("out", "resume", *without)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def write_json(path: Path, value: object) -> None:
    """Write a file in one step, null for what is undefined: a run that is killed leaves the old one or the new one."""
    write_text(path, json_text(value, indent=2) + "\n")


def read_json(path: Path) -> PyTree:
    """What a file of an earlier run holds.

    Raises:
      UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is broken (line {error.lineno}): delete it, or choose another folder.") from error


def say(*lines: str) -> None:
    """Print lines as they are: brackets are no markup, long lines and paths are not cut."""
    for line in lines:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)


def print_table(columns: Columns, rows: Iterable[Mapping[str, Json]]) -> None:
    """A table that fits a terminal of 80 columns: words to the left, numbers to the right, nothing for None."""
    cells = [[_cell(row.get(key), form) for key, form in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(list(columns), *cells, strict=True)]
    gap = 1 if sum(widths) + 2 * len(widths) < WIDTH else 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    for title, (_, form) in columns.items():
        table.add_column(title, justify="left" if form == "{}" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    Console(markup=False).print(table)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return "nan" if isinstance(value, float) and math.isnan(value) else form.format(value)


def print_scoreboard(rows: Sequence[Mapping[str, Json]], effect: Effect | None = None) -> None:
    """The scoreboard with the columns of the effect that it was measured with; None: the listed one."""
    first, effect = rows[0], effect or effect_of(rows)
    columns = [column for column in (*RECONSTRUCTION, *effect.columns) if column.short]
    print_table({"method": ("method", "{}")} | {c.short: (c.key, c.printed) for c in columns}, rows)
    lines = [measured_on(rows, effect)]
    if effect.answer is not None:
        words = effect.answer
        numbers = ", ".join(f"{kind} {first[f'{words.key}_{kind}']:.3f}" for kind in ("clean", "zero", "mean"))
        lines.insert(
            0,
            f"{words.about} with the array replaced ({numbers}); rec: what is recovered of the loss from zero and mean "
            "ablation.",
        )
    say(*lines)


def measured_on(rows: Sequence[Mapping[str, Json]], effect: Effect | None = None) -> str:
    """How much text the numbers of a scoreboard rest on: where a text is short it is less than was asked for."""
    first, words = rows[0], (effect or effect_of(rows)).answer
    known = words is not None and words.counted_key in first
    last = f", {words.counted.format(first[words.counted_key])}" if words is not None and known else ""
    return (
        f"Measured on held-out text: FVU, L0 and dead features on {first['tokens']:,} tokens (attention sinks and "
        f"special tokens left out){last}."
    )
