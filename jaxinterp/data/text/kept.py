"""What takes seconds to read and is the same in every process, kept in the user's cache folder between processes.

    folder    $JAXINTERP_CACHE, or else $XDG_CACHE_HOME/jaxinterp, or else ~/.cache/jaxinterp; "" keeps nothing
    file      documents-<key>.json: a hash of the rest, and a list of [text, source]; the key is a hash of all that the
              documents follow from

Where the file is damaged or the folder is read-only, the documents are read again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import Document
from jaxinterp.storage.files import write_text

MOST = 4
"""Files that are kept: one for each environment that is in use."""


def cache_folder() -> Path | None:
    """Where such files lie; None where nothing is kept."""
    asked = os.environ.get("JAXINTERP_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "jaxinterp"
    except RuntimeError:  # no home
        return None


def key_of_files(files: Iterable[Path], *also: str) -> str:
    """A hash of the files' paths, sizes and times of change, and of `also`."""
    digest = hashlib.sha256("\0".join(also).encode())
    for path in files:
        found = path.stat()
        digest.update(f"\0{path}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def kept_documents(key: str, make: Callable[[], list[Document]]) -> list[Document]:
    """The documents under this key, made and kept where there are none."""
    folder = cache_folder()
    path = None if folder is None else folder / f"documents-{key}.json"
    if path is not None:
        found = _read(path)
        if found is not None:
            return found
    documents = make()
    if path is not None:
        _write(path, documents)
    return documents


def _read(path: Path) -> list[Document] | None:
    """The documents in the file; None if it is missing or damaged."""
    try:
        first, _, text = path.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != first:
            return None
        return [Document(str(text), str(source)) for text, source in json.loads(text)]
    except (OSError, ValueError, TypeError):
        return None


def _write(path: Path, documents: list[Document]) -> None:
    text = json.dumps([[document.text, document.source] for document in documents], ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        newest_last = sorted(path.parent.glob("documents-*.json"), key=lambda file: file.stat().st_mtime)
        for old in newest_last[:-MOST]:  # of other versions of the packages
            old.unlink(missing_ok=True)
    except (OSError, ValueError, UserError):
        return
