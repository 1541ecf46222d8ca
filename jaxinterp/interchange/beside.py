"""`jaxinterp_sites.json`, beside the files that we write: what the other library's configuration has no place for.

    {"reads": "blocks/5/mlp/in", "writes": "blocks/5/mlp/out", "target_mean": [...], "target_variance": 1.5}

The target's moments are there where they are known. Without the file, sites are what the other library's names say.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.interchange.contents import Contents, Target
from jaxinterp.interchange.fields import shown
from jaxinterp.interchange.names import Hooks
from jaxinterp.models.files.tokenizer import read_json
from jaxinterp.storage.files import write_text

NAME = "jaxinterp_sites.json"

LARGEST = float(np.finfo(np.float32).max)


def write_beside(folder: Path, contents: Contents, sites: Sites) -> None:
    """Write the file."""
    entry: dict[str, Json] = {"reads": sites.reads, "writes": sites.writes}
    if contents.target is not None:
        entry |= {"target_mean": contents.target.mean.tolist(), "target_variance": contents.target.variance}
    write_text(folder / NAME, json.dumps(entry, indent=2) + "\n")


def read_beside(folder: Path, theirs: Hooks | None, width: int) -> tuple[Hooks | None, Target | None]:
    """(sites by our names, the target) of the file; `theirs` and None where there is none.

    Args:
      width: the size of the target.
    Raises:
      UserError: the file is malformed, or contradicts the other library's names.
    """
    if not (folder / NAME).is_file():
        return theirs, None
    entry = read_json(folder / NAME)
    match entry:
        case {"reads": str(reads), "writes": str(writes)}:
            target = _target(entry, folder / NAME, width)
        case _:
            raise UserError(f"{folder / NAME} should name the arrays 'reads' and 'writes'.")
    ours = Hooks(reads, writes, f"reads={reads!r}, writes={writes!r}")
    if theirs is None or (not theirs.before_gain and theirs.may_be(ours.sites(False))):
        return ours, target
    raise UserError(
        f"{folder}: {ours.said} in {NAME} and {theirs.said} contradict each other: files were edited or renamed; mend "
        "one of them."
    )


def _target(entry: Mapping[str, Json], where: Path, width: int) -> Target | None:
    """The target's moments: both, or none."""
    if not {"target_mean", "target_variance"} & set(entry):
        return None
    mean: Any = entry.get("target_mean")
    variance: Any = entry.get("target_variance")
    if not (isinstance(mean, list) and len(mean) == width and all(map(_is_number, mean))):
        raise UserError(f"{where}: target_mean should be {width} numbers, beside target_variance.")
    if not (_is_number(variance) and variance >= 0):
        raise UserError(f"{where}: target_variance={shown(variance)} should be a number of at least 0.")
    return Target(np.asarray(mean, np.float32), float(variance))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST
