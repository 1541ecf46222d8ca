"""Two dictionaries of one array side by side: for every feature the nearest one of the other, by write vectors.

    match_i = argmax_j cos(D_i, D'_j)

Both need write vectors of one length. A match need not be mutual: the row says whether it is.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.explore.answers import MOST_ROWS, row
from jaxinterp.explore.index import Index
from jaxinterp.storage.files import write_file

ORDERS = ("index", "most alike", "least alike")


class Pair(NamedTuple):
    """Another dictionary: its index, its nearest feature for each of ours, their cosine, if the choice is mutual."""

    theirs: Index
    nearest: Int[np.ndarray, " features"]
    cosine: Float[np.ndarray, " features"]
    mutual: np.ndarray


def nearest_rows(
    first: Float[np.ndarray, "features d"], second: Float[np.ndarray, "others d"], rows: int = 1024
) -> tuple[Int[np.ndarray, " features"], Float[np.ndarray, " features"], np.ndarray]:
    """For every row of `first` the row of `second` with the largest inner product, that product, and whether the choice
    is mutual.

    Args:
      rows: of `first` at a time.
    """
    nearest, best = np.zeros(len(first), np.int32), np.zeros(len(first), np.float32)
    back, back_best = np.zeros(len(second), np.int32), np.full(len(second), -np.inf, np.float32)
    for start in range(0, len(first), rows):
        products = np.asarray(first[start : start + rows]) @ np.asarray(second).T
        here = slice(start, start + len(products))
        nearest[here], best[here] = products.argmax(axis=1), products.max(axis=1)
        top = products.max(axis=0)
        better = top > back_best
        back[better], back_best[better] = start + products.argmax(axis=0)[better], top[better]
    return nearest, best, back[nearest] == np.arange(len(first))


def pair(index: Index, other: Index, digests: tuple[str, str]) -> Pair:
    """Match two dictionaries, or read the match that was made before (`match-*.npz` in our index).

    Args:
      digests: of both dictionaries; a match of others is not read.
    Raises:
      UserError: one has no write vectors, or they are of different lengths.
    """
    if index.write is None or other.write is None or index.write.shape[1] != other.write.shape[1]:
        shapes = [None if each.write is None else each.write.shape[1] for each in (index, other)]
        raise UserError(
            f"write vectors have {shapes[0]} and {shapes[1]} dimensions ({index.about['writes']}, "
            f"{other.about['writes']}): compare dictionaries of one array."
        )
    path = index.folder / f"match-{digests[0]}-{digests[1]}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            found = tuple(kept[name] for name in Pair._fields[1:])
        if len(found[0]) == index.features and int(found[0].max(initial=0)) < other.features:
            return Pair(other, *found)
    except (OSError, ValueError, KeyError):
        pass
    found = nearest_rows(index.write, other.write)
    write_file(path, lambda unfinished: _save(unfinished, found))
    return Pair(other, *found)


def _save(path: Path, found: tuple[np.ndarray, ...]) -> None:
    with path.open("wb") as file:
        np.savez(file, **dict(zip(Pair._fields[1:], found, strict=True)))  # type: ignore[arg-type]


def pair_rows(
    index: Index, other: Pair, labels: dict[int, str], *, first: int = 0, count: int = 50, order: str = "most alike"
) -> dict[str, Json]:
    """A page of pairs: our feature, its nearest one, their cosine.

    Raises:
      UserError: an unknown order, or numbers out of range.
    """
    if order not in ORDERS:
        raise UserError(f"order={order!r} must be one of {', '.join(ORDERS)}.")
    if not 0 <= first <= index.features or not 1 <= count <= MOST_ROWS:
        raise UserError(
            f"first={first}, count={count}: first must be below {index.features}, count at most {MOST_ROWS}."
        )
    sign = {"most alike": -1, "least alike": 1}.get(order, 0)
    places = np.argsort(sign * other.cosine, kind="stable") if sign else np.arange(index.features)
    rows: list[Json] = [
        {
            "ours": row(index, int(i), labels),
            "theirs": row(other.theirs, int(other.nearest[i]), {}),
            "cosine": float(f"{other.cosine[i]:.4g}"),
            "mutual": bool(other.mutual[i]),
        }
        for i in places[first : first + count]
    ]
    return {"total": index.features, "first": first, "rows": rows}
