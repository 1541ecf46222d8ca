"""One writer at a time: a run holds its checkpoint folder as long as it lives."""

import contextlib
import fcntl
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import jax

from jaxinterp.core.errors import UserError


def lock(folder: Path) -> Any:
    """An open file that only one process at a time can hold; the operating system lets go of it at any death.

    On file systems that know no locks (Lustre mounted without `flock`) it warns and holds nothing.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    if jax.process_index() != 0:
        return None
    path = folder.with_name(f"{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"checkpoint folder {folder} cannot be written: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _still_there(file, path):  # its holder removed it between our opening and locking
            file.close()
            return lock(folder)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"checkpoint folder {folder} is being written by {owner}: wait for it or stop it, or choose another folder."
        ) from error
    except OSError as error:
        file.close()
        warnings.warn(
            f"checkpoint folder {folder} is not locked: its file system knows no locks ({error}); see to it that no "
            "other run writes to it.",
            stacklevel=2,
        )
        return None
    with contextlib.suppress(OSError):  # on a full disk the lock holds without its owner's name
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def unlock(file: Any) -> None:
    """Remove the lock file and let go of it. After a kill the file remains, unlocked: the next run takes it over."""
    if file is not None:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
        file.close()


def _still_there(file: Any, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
