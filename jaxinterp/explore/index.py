"""The explorer's index: a folder of arrays with fixed rows, mapped from disk.

    index.json          what was read, and of which dictionary
    vocabulary.json     the text of every token id
    tokens.npy          [windows, seq] ids; document.npy [windows, seq]
    starts.npy ...      the firings in two orders (see `evaluation.features.firings`) and their sums
    read.npy, write.npy [features, d] read and write vectors of length 1
    raised.npy ...      [features, 10] the token ids that a feature raises and lowers directly, and by how much
    heads.npy           [features, heads] of a dictionary of an attention sublayer: shares of its read vector

`index.json` is written last: a folder without it was not finished. To open an index reads a few kilobytes, whatever the
number of features.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.evaluation.features.firings import Firings, Sums
from jaxinterp.storage.files import write_file, write_text
from jaxinterp.storage.json_text import json_text

MANIFEST, VOCABULARY = "index.json", "vocabulary.json"
VERSION = 1
TEXT = ("tokens", "document")
OPTIONAL = ("read", "write", "raised", "raised_by", "lowered", "lowered_by", "heads")


@dataclass(frozen=True)
class Index:
    """One dictionary, its text and its firings. Arrays are memory maps; those of `OPTIONAL` may be None.

    Attributes:
      about: model, site, dictionary and text in words and numbers, as JSON.
      folder: where it lies.
    """

    folder: Path
    about: Mapping[str, Json]
    vocabulary: Sequence[str]
    tokens: Int[np.ndarray, "windows seq"]
    document: Int[np.ndarray, "windows seq"]
    firings: Firings
    sums: Sums
    read: Float[np.ndarray, "features d_in"] | None = None
    write: Float[np.ndarray, "features d_out"] | None = None
    raised: Int[np.ndarray, "features n"] | None = None
    raised_by: Float[np.ndarray, "features n"] | None = None
    lowered: Int[np.ndarray, "features n"] | None = None
    lowered_by: Float[np.ndarray, "features n"] | None = None
    heads: Float[np.ndarray, "features heads"] | None = None

    @property
    def features(self) -> int:
        """How many."""
        return len(self.firings.starts) - 1

    @property
    def seq(self) -> int:
        """Tokens a window."""
        return self.tokens.shape[1]

    @property
    def counted(self) -> int:
        """Tokens that count (attention sinks and special tokens do not)."""
        return max(int(self.about["tokens"]), 1)

    @cached_property
    def order(self) -> dict[str, np.ndarray]:
        """Features by density and by largest activation, highest first; made when first asked for."""
        by = {"density": self.sums.fired, "largest": np.abs(self.sums.largest)}
        return {name: np.argsort(-np.asarray(key), kind="stable") for name, key in by.items()}

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """Token ids by their text in lower case, without spaces around it."""
        found: dict[str, list[int]] = {}
        for token, text in enumerate(self.vocabulary):
            found.setdefault(text.strip().lower() or text, []).append(token)
        return found

    @cached_property
    def text(self) -> tuple[str, np.ndarray]:
        """All windows as one text in lower case, and where each token of them begins in it."""
        pieces = [self.word(token).lower() for token in self.tokens.reshape(-1)]
        for last in range(self.seq - 1, len(pieces), self.seq):
            pieces[last] += "\n\0"  # what is looked for does not go from one window into the next
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return "".join(pieces), np.cumsum(lengths) - lengths

    def word(self, token: int | np.integer) -> str:
        """The text of a token id."""
        return self.vocabulary[int(token)] if 0 <= token < len(self.vocabulary) else f"[{token}]"


def write_index(
    folder: Path, about: Mapping[str, Json], vocabulary: Sequence[str], arrays: Mapping[str, np.ndarray]
) -> Index:
    """Write an index and open it.

    Args:
      arrays: by name: `TEXT`, the fields of `Firings`, those of `Sums` as `sum_fired` and so on, and any of `OPTIONAL`.
    Raises:
      UserError: an array is missing, or the disk is full.
    """
    for name in _needed():
        if name not in arrays:
            raise UserError(f"arrays has no {name!r}: an index needs {', '.join(_needed())}.")
    for name, array in arrays.items():
        _write_array(folder / f"{name}.npy", array)
    write_text(folder / VOCABULARY, json.dumps(list(vocabulary)))
    write_text(folder / MANIFEST, json_text(dict(about) | {"version": VERSION}, indent=2) + "\n")
    return open_index(folder)


def _needed() -> tuple[str, ...]:
    return (*TEXT, *Firings._fields, *(f"sum_{name}" for name in Sums._fields))


def _write_array(path: Path, array: np.ndarray) -> None:
    def save(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_file(path, save)


def read_manifest(folder: Path) -> dict[str, Json] | None:
    """What index.json says; None where there is none.

    Raises:
      UserError: it is damaged, or of another version.
    """
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = about["version"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged: pass --rebuild to make the index anew.") from error
    if version != VERSION:
        raise UserError(f"{folder} is an index of version {version!r}, not {VERSION}: pass --rebuild to make it anew.")
    return about


def open_index(folder: str | Path) -> Index:
    """Open what `write_index` wrote.

    Raises:
      UserError: there is no whole index, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    about = read_manifest(folder)
    if about is None:
        raise UserError(f"no index in {folder}: `jaxinterp explore RUN` makes one.")
    try:
        vocabulary = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        arrays = {name: _open_array(folder / f"{name}.npy") for name in _needed()}
        optional = {
            name: _open_array(folder / f"{name}.npy") for name in OPTIONAL if (folder / f"{name}.npy").is_file()
        }
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the index {folder} is damaged ({error}): pass --rebuild to make it anew.") from error
    firings = Firings(**{name: arrays[name] for name in Firings._fields})
    sums = Sums(**{name: arrays[f"sum_{name}"] for name in Sums._fields})
    if len(firings.starts) != len(sums.fired) + 1 or len(firings.token_starts) != arrays["tokens"].size + 1:
        raise UserError(f"the files of the index {folder} belong to different runs: pass --rebuild to make it anew.")
    return Index(folder, about, vocabulary, arrays["tokens"], arrays["document"], firings, sums, **optional)


def _open_array(path: Path) -> np.ndarray:
    """A memory map; an empty array has nothing to map."""
    array = np.load(path, mmap_mode=None if path.stat().st_size < 4096 else "r", allow_pickle=False)
    return np.asarray(array) if array.size == 0 else array
