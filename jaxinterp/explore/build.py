"""Make the explorer's index: one pass of the model over held-out text, then what the vectors say.

The firings of every batch are kept as they come (`parts/`), so that a build that was stopped goes on where it was. What
is asked (`asked`) and the dictionary's files are kept in the index: with the same ones nothing is done again, with
others the index is refused by name.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxinterp.core.decomposition import Revivable, Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.sites import several
from jaxinterp.core.trees import first_difference
from jaxinterp.evaluation.attention.attribution import head_shares
from jaxinterp.evaluation.features.firings import Found, find_firings, sort_firings, sums_of
from jaxinterp.evaluation.features.peaks import Window, collect
from jaxinterp.evaluation.features.vectors import direct_logits, unit
from jaxinterp.explore.index import MANIFEST, Index, open_index, read_manifest, write_index
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.transformer import Transformer
from jaxinterp.report.passages import token_text
from jaxinterp.storage.files import write_file, write_text

LOGITS = 10
MOST_FIRINGS = 60_000_000
"""Of all tokens together; some 1.5 GB on disk. A text with more is cut, and the index says so."""

Say = Callable[[int, int], None]
"""Called with (what is done, of how much), in tokens."""


@ordinary()
def build_index(
    folder: str | Path,
    decomposition: Shown,
    subject: Subject,
    dataset: Iterable[Window],
    asked: Mapping[str, Json],
    *,
    tokens: int = 50_000,
    seed: int = 0,
    most_firings: int = MOST_FIRINGS,
    say: Say = lambda done, of: None,
) -> Index:
    """Write the index of a dictionary, or open the one that is there.

    Args:
      folder: of the index.
      dataset: held-out windows, as `feature_pages` takes them.
      asked: what the index depends on, as JSON: model, text, sizes, the dictionary's digest.
      tokens: how much of the dataset to read.
      most_firings: stop reading before more firings than these are kept.
      say: shows how far it is.
    Raises:
      UserError: the folder holds the index of something else; the decomposition has no read and write vectors of one
        layer; there is no text.
    """
    folder, asked = Path(folder), dict(asked) | {"asked_tokens": tokens, "seed": seed}
    check_shown(decomposition)
    if finished(folder, asked):
        return open_index(folder)
    windows = collect(dataset, tokens, seed)
    parts = _parts(folder / "parts", asked)
    found, read, whole = _read_firings(parts, decomposition, subject.model, windows, most_firings, say)
    windows = windows[:read]
    firings = sort_firings(found, decomposition.decoder.shape[0], read * len(windows[0]["tokens"]))
    sums = sums_of(firings)
    arrays = {
        "tokens": np.stack([window["tokens"] for window in windows]).astype(np.int32),
        "document": np.stack(
            [np.asarray(window.get("document", np.zeros(len(window["tokens"])))) for window in windows]
        ).astype(np.int32),
        **firings._asdict(),
        **{f"sum_{name}": value for name, value in sums._asdict().items()},
        **of_vectors(decomposition, subject),
    }
    about = {
        "asked": asked,
        "model": subject.name,
        "source": subject.source,
        "reads": several(decomposition.sites.reads)[0],
        "writes": several(decomposition.sites.writes)[0],
        "features": int(decomposition.decoder.shape[0]),
        "kind": type(decomposition).__name__,
        "tokens": int(sum((np.asarray(window["weight"]) > 0).sum() for window in windows)),
        "windows": read,
        "whole": whole,
    }
    index = write_index(folder, about, vocabulary_of(subject), arrays)
    shutil.rmtree(folder / "parts")
    return index


def check_shown(decomposition: PyTree) -> None:
    """Raises UserError where a decomposition has no features of one layer to show."""
    if not isinstance(decomposition, Shown) or len(several(decomposition.sites.writes)) != 1:
        raise UserError(
            f"decomposition={type(decomposition).__name__} has no encoder and decoder rows of one layer: the explorer "
            "shows dictionaries (transcoder, skip_transcoder, sparse_autoencoder ...); of several layers give --layer."
        )


def finished(folder: Path, asked: Mapping[str, Json]) -> bool:
    """Whether the folder holds the whole index of what is asked.

    Raises:
      UserError: it holds another one.
    """
    about = read_manifest(folder)
    if about is None:
        return False
    difference = first_difference(about["asked"], dict(asked))
    if difference is not None:
        field, then, now = difference
        raise UserError(f"the index {folder} was made with {field}={then!r}, not {now!r}: pass --rebuild.")
    return True


def digest(folder: Path, record: Path | None = None) -> str:
    """A name for the contents of a folder's files, but for index and labels: SHA-256 over their names and bytes.

    Args:
      record: a file that keeps it with the files' sizes and times: while those stay, nothing is read.
    """
    inside = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    own = {name: path for name, path in inside.items() if not name.startswith(("explore", "labels"))}
    stamp = [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in own.items()]
    try:
        kept = json.loads(record.read_text()) if record is not None else {}
        if kept["stamp"] == stamp:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    total = hashlib.sha256()
    for name, path in own.items():
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                total.update(block)
    found = total.hexdigest()[:16]
    if record is not None:
        write_text(record, json.dumps({"stamp": stamp, "digest": found}))
    return found


def _parts(folder: Path, asked: Mapping[str, Json]) -> Path:
    """The folder of unfinished work; emptied where that belongs to another question."""
    record = folder / MANIFEST
    try:
        same = json.loads(record.read_text()) == json.loads(json.dumps(asked))
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        write_text(record, json.dumps(asked))
    return folder


def _read_firings(
    folder: Path, decomposition: Shown, model: PyTree, windows: Sequence[Window], most: int, say: Say
) -> tuple[list[Found], int, bool]:
    """(firings, windows read, whether all of them were): what is kept already, and the rest of the text."""
    seq = len(windows[0]["tokens"])
    found, done = [], 0
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as kept:
                found.append(Found(*(kept[name] for name in Found._fields)))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is damaged: delete {folder} and start again.") from error
        done = int(path.stem)
    say(done * seq, len(windows) * seq)
    count = sum(len(each.values) for each in found)
    for read, each in find_firings(decomposition, model, windows, skip=done):
        if count + len(each.values) > most and found:
            return found, done, False
        write_file(folder / f"{read:09}.npz", partial(_save, each))
        found.append(each)
        count, done = count + len(each.values), read
        say(done * seq, len(windows) * seq)
    return found, done, True


def _save(found: Found, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **found._asdict())  # type: ignore[arg-type]


def of_vectors(decomposition: Shown, subject: Subject, rows: int = 512) -> dict[str, np.ndarray]:
    """Read and write vectors of length 1; direct logits, the strongest `LOGITS` of each sign; shares of heads.

    Args:
      rows: features at a time: logits of all at once would be features times vocabulary.
    """
    encoder, decoder = (np.asarray(each, np.float32) for each in (decomposition.encoder, decomposition.decoder))
    (reads, *_), (writes, *_) = several(decomposition.sites.reads), several(decomposition.sites.writes)
    arrays = {"read": unit(encoder), "write": unit(decoder)}
    scale = float(decomposition.output_scale) if isinstance(decomposition, Revivable) else 1.0
    ends: dict[str, list[np.ndarray]] = {"raised": [], "raised_by": [], "lowered": [], "lowered_by": []}
    for first in range(0, len(decoder), rows):
        logits = direct_logits(subject.model, writes, scale * decoder[first : first + rows])
        if logits is None:
            break
        for name, sign in (("raised", 1), ("lowered", -1)):
            ids, values = _strongest(sign * logits, LOGITS)
            ends[name].append(ids)
            ends[f"{name}_by"].append(sign * values)
    arrays |= {name: np.concatenate(parts) for name, parts in ends.items() if parts}
    heads = _heads(subject.model, reads)
    return arrays | ({} if heads is None else {"heads": np.asarray(head_shares(jnp.asarray(encoder), heads))})


def _strongest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and values of the highest logits of every row, highest first."""
    count = min(count, logits.shape[1])
    ids = np.argpartition(-logits, count - 1, axis=1)[:, :count]
    values = np.take_along_axis(logits, ids, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    ids, values = (np.take_along_axis(each, order, axis=1) for each in (ids, values))
    return ids.astype(np.int32), values.astype(np.float32)


def _heads(model: PyTree, reads: str) -> int | None:
    """How many heads lie side by side in the array that is read; None where it is not an attention sublayer's z."""
    parts = reads.split("/")
    if not isinstance(model, Transformer) or parts[0] != "blocks" or parts[2:] != ["attn", "z"]:
        return None
    return int(model.config.heads)


def vocabulary_of(subject: Subject) -> list[str]:
    """The text of every token id that the model has."""
    model, tokenizer = subject.model, subject.tokenizer
    known = 0 if tokenizer is None else tokenizer.vocab_size
    size = model.config.vocab_size if isinstance(model, Transformer) else known
    return [token_text(tokenizer, token) for token in range(size)]
