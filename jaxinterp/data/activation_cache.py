"""Activations on disk: harvested once, trained on many times.

    cache_activations(subject, windows, names, folder)     every window's arrays, into Array Record files
    cached_windows(folder)                                 the same windows, with the arrays in them

Element i of the second is element i of `windows` and the arrays of the sites by name, so that `fit` on either reads the
same tokens in the same order; on the second it does not run the model.

A folder holds `settings.json` (what was harvested from what), and for every shard `00007.arrayrecord` and, once that is
whole, `00007.json`. Harvesting again continues with the shards that are missing; several processes can take every
n-th shard each. A record is one window: a CRC-32 of what follows, then its arrays, one after another, as they lie in
memory. It is checked whenever it is read.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import PyTree

from jaxinterp.core.batch import GRADIENT
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.data.activations import WINDOW, Harvest, check_finite
from jaxinterp.data.windows import fingerprint, some_places
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import check_site
from jaxinterp.storage.arrays import weights_hash
from jaxinterp.storage.files import told

SETTINGS = "settings.json"
FORMAT = "jaxinterp activations, 2"
CHECKSUM = 4  # bytes
OPEN_FILES = 256
"""At most so many shards are held open: a process may have about a thousand files."""


def cache_activations(
    subject: Subject,
    windows: grain.MapDataset,
    names: tuple[str, ...],
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch: int = 8,
    windows_per_shard: int = 512,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Harvest the named arrays of every window into a folder; what is there already is kept.

    Args:
      windows: as for `fit`; a slice of them (`windows[:1000]`) where the text has more than training will read.
      names: arrays, such as a method's `needs(site).names()`.
      dtype: what they are kept in: bfloat16 takes half the space, and is what accelerators train on.
      batch: windows in a forward pass.
      part: this process takes shards part, part + parts, part + 2 parts, ...
    Raises:
      UserError: a name is not that of an array, the folder holds other activations, there is not enough space, or an
        activation is not finite.
    """
    if not 0 <= part < parts or batch < 1 or windows_per_shard < 1:
        raise UserError(
            f"part={part} must lie in 0..{parts - 1}, batch={batch} and windows_per_shard={windows_per_shard} be at "
            "least 1."
        )
    for name in names:
        check_site(subject.model, name.removesuffix(GRADIENT))
    folder, take = Path(folder), Harvest(names, dtype)
    first = _harvested(take, subject.model, windows, range(1))[0]
    settings = {
        "format": FORMAT,
        "subject": subject.name,
        "weights": weights_hash(subject.model),
        "windows": len(windows),
        "text": fingerprint(windows),
        "windows_per_shard": windows_per_shard,
        "arrays": {name: [list(array.shape), str(array.dtype)] for name, array in first.items()},
    }
    _open(folder, settings)
    missing = [shard for shard in range(part, _shards(settings), parts) if not _done(folder, shard).exists()]
    size = sum(array.nbytes for array in first.values()) + CHECKSUM
    needed, free = size * windows_per_shard * len(missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"folder={folder}: the activations that are missing take up to {needed / 1e9:.1f} GB, but {free / 1e9:.1f} "
            "GB are free: give fewer windows, dtype='bfloat16' or another folder."
        )
    for shard in missing:
        own = range(shard * windows_per_shard, min((shard + 1) * windows_per_shard, len(windows)))
        half = _file(folder, shard).with_suffix(".half")
        with told(half):
            writer = ArrayRecordWriter(str(half), "group_size:1,uncompressed")
            for start in range(own.start, own.stop, batch):
                for element in _harvested(take, subject.model, windows, range(start, min(start + batch, own.stop))):
                    writer.write(_packed(element))
            writer.close()
        half.rename(_file(folder, shard))
        _write(_done(folder, shard), {"windows": len(own), "bytes": _file(folder, shard).stat().st_size})


def cached_windows(folder: str | Path) -> grain.MapDataset:
    """The windows that a folder of activations was made from, with the arrays in them.

    Raises:
      UserError: the folder holds no activations, a shard is missing or has another size than when it was written; and,
        when a window is read, its checksum does not match.
    """
    return grain.MapDataset.source(CachedWindows(Path(folder)))


def holds(
    folder: str | Path,
    subject: Subject,
    windows: grain.MapDataset,
    names: tuple[str, ...],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> bool:
    """Whether a folder has the named arrays of at least these windows of this model in this dtype."""
    folder = Path(folder)
    if not (folder / SETTINGS).exists():
        return False
    settings = _settings(folder)
    whole = all(_done(folder, shard).exists() for shard in range(_shards(settings)))
    arrays = settings["arrays"]
    same = settings["weights"] == weights_hash(subject.model) and all(
        name in arrays and arrays[name][1] == dtype for name in names
    )
    if not whole or not same or settings["windows"] < len(windows):
        return False
    cached, given = CachedWindows(folder), cast("Any", windows)
    return all(
        np.array_equal(cached[place]["tokens"], given[place]["tokens"]) for place in some_places(len(windows), 8)
    )


def harvested_once(
    subject: Subject,
    windows: grain.MapDataset,
    names: tuple[str, ...],
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> grain.MapDataset:
    """These windows with their activations: the beginning of what a folder holds, or harvested into it now.

    Raises:
      UserError: the folder holds other or fewer activations; with several processes, it does not hold them all.
    """
    if not holds(folder, subject, windows, names, dtype=dtype):
        if jax.process_count() > 1:
            raise UserError(f"cache={folder} does not hold this run's activations: harvest in one process first.")
        cache_activations(subject, windows, names, folder, dtype=dtype)
    return cached_windows(folder)[: len(windows)]


class CachedWindows:
    """Random access to cached windows: a data source for Grain."""

    def __init__(self, folder: Path):
        self.folder, self.settings = folder, _settings(folder)
        for shard in range(_shards(self.settings)):
            done, file = _done(folder, shard), _file(folder, shard)
            if not done.exists() or not file.exists():
                raise UserError(f"{folder}: shard {shard} of {_shards(self.settings)} is missing: harvest again.")
            if file.stat().st_size != _read(done).get("bytes"):
                raise UserError(f"{file} has another size than when it was written: delete {done} and harvest again.")
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.settings["windows"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        shard, place = divmod(int(index), self.settings["windows_per_shard"])
        reader = self._readers.get(shard)
        if reader is None:
            if len(self._readers) >= OPEN_FILES:
                self._readers.clear()  # a reader that another thread reads with lives until it is done
            reader = self._readers[shard] = ArrayRecordReader(str(_file(self.folder, shard)))
        try:
            return unpacked(reader.read([place])[0], self.settings["arrays"])
        except (ValueError, IndexError, RuntimeError) as error:
            file = _file(self.folder, shard)
            raise UserError(
                f"{file}, window {place}: damaged ({error}): delete {_done(self.folder, shard)} and harvest again."
            ) from error


def _harvested(take: Harvest, model: PyTree, windows: Any, places: range) -> list[dict[str, np.ndarray]]:
    """Windows and their activations; the forward pass always has the same shape but for the last one."""
    elements = [windows[place] for place in places]
    stacked = {name: np.stack([element[name] for element in elements]) for name in WINDOW}
    rows = take.jitted(model, stacked)
    check_finite(rows)
    arrays = stacked | {name: np.asarray(array) for name, array in rows.arrays.items()}
    return [{name: array[n] for name, array in arrays.items()} for n in range(len(elements))]


def _packed(element: Mapping[str, np.ndarray]) -> bytes:
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in element.values())
    return zlib.crc32(body).to_bytes(CHECKSUM, "little") + body


def unpacked(record: bytes, arrays: Mapping[str, PyTree]) -> dict[str, np.ndarray]:
    """The arrays of a record; `arrays`: name -> (shape, dtype), in their order.

    Raises:
      ValueError: its checksum or its length does not match.
    """
    body = memoryview(record)[CHECKSUM:]
    if zlib.crc32(body) != int.from_bytes(record[:CHECKSUM], "little"):
        raise ValueError("its checksum does not match")
    found, start = {}, 0
    for name, (shape, dtype) in arrays.items():
        kind, count = jnp.dtype(dtype), int(np.prod(shape, dtype=np.int64))
        found[name] = np.frombuffer(body, kind, count, start).reshape(shape)
        start += count * kind.itemsize
    if start != len(body):
        raise ValueError(f"it has {len(body)} bytes, not {start}")
    return found


def _open(folder: Path, settings: dict[str, Json]) -> None:
    """Make the folder, or see that it holds the same activations."""
    if (folder / SETTINGS).exists():
        kept = _settings(folder)
        for name, value in settings.items():
            if kept[name] != value:
                raise UserError(
                    f"{folder} holds other activations: its {name} is {kept[name]!r}, not {value!r}. Give another "
                    "folder."
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    others = [path for path in folder.iterdir() if path.suffix != ".part"]  # another process may be here already
    if any(path.name != SETTINGS for path in others):
        raise UserError(f"folder={folder} is not empty and holds no activations: give another one.")
    _write(folder / SETTINGS, settings)


def _settings(folder: Path) -> dict[str, Json]:
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder} holds no activations: there is no {SETTINGS} in it.")
    settings = _read(folder / SETTINGS)
    wanted = {"subject", "weights", "text", "windows", "windows_per_shard", "arrays"}
    if settings.get("format") != FORMAT or not wanted <= set(settings):
        raise UserError(f"{folder / SETTINGS} is not of the form {FORMAT!r}: harvest into another folder.")
    return settings


def _shards(settings: Mapping[str, Json]) -> int:
    return -(-settings["windows"] // settings["windows_per_shard"])


def _file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.arrayrecord"


def _done(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.json"


def _read(path: Path) -> dict[str, Json]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and harvest again.") from error
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Json]) -> None:
    half = path.with_suffix(f".{os.getpid()}.part")
    with told(path):
        half.write_text(json.dumps(content, indent=1) + "\n")
        half.replace(path)
