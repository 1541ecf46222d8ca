"""Files written in one step: the old content or the new one, with the user's umask; a full disk is one line.

    write_text("runs/a/page.html", text)
    write_arrays("runs/a/dictionary.safetensors", {"encoder": array})

A file gets the permissions that the user's umask gives to any new file, also where a library makes private ones
(safetensors: 0600).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxinterp.core.errors import UserError, cause, is_of_the_system


def write_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8 and return its path; folders on the way are made.

    Raises:
      UserError: it could not be written: the disk is full, or the folder is not the user's.
    """
    return write_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write arrays by name into a .safetensors file and return its path.

    Raises:
      UserError: it could not be written.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # keeps scalars scalars
    return write_file(path, lambda unfinished: save_file(contiguous, unfinished))


def write_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file beside `path`, and move that one there when it is whole.

    Raises:
      UserError: the system refused; what was there before is kept, and nothing half-written is left.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.touch()
            permissions = unfinished.stat().st_mode & 0o777
            write(unfinished)
            unfinished.chmod(permissions)
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Within it, a file that the system does not let us write is reported in one line, with the cause.

    Raises:
      UserError: as said.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError) or not is_of_the_system(error):
            raise
        raise UserError(f"{path} could not be written: {cause(error)}. Make room there, or choose another.") from error


def check_empty(folder: str | Path, *, overwrite: bool) -> Path:
    """The folder, if something may be saved in it.

    Raises:
      UserError: it is a file, or it holds files and `overwrite` is False.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder={folder} is a file: choose a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"folder={folder} is not empty: pass overwrite=True, or choose another folder.")
    return folder
