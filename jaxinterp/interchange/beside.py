"""`jaxinterp_sites.json`, beside the files that we write: what the other library's configuration has no place for.

    {"reads": "blocks/5/mlp/in", "writes": "blocks/5/mlp/out", "target_mean": [...], "target_variance": 1.5}

The target's moments are there where they are known. Without the file, sites are what the other library's names say.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxinterp.data.batch import Sites
from jaxinterp.errors import UserError
from jaxinterp.interchange.contents import Contents, Target
from jaxinterp.interchange.names import Hooks
from jaxinterp.models.tokenizer import read_json

NAME = "jaxinterp_sites.json"


def write_beside(folder: Path, contents: Contents, sites: Sites) -> None:
    """Write the file."""
    entry: dict[str, Any] = {"reads": sites.reads, "writes": sites.writes}
    if contents.target is not None:
        entry |= {"target_mean": contents.target.mean.tolist(), "target_variance": contents.target.variance}
    (folder / NAME).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def read_beside(folder: Path, theirs: Hooks | None, width: int) -> tuple[Hooks | None, Target | None]:
    """(sites by our names, the target) of the file; `theirs` and None where there is none.

    Args:
      width: the size of the target.
    Raises:
      UserError: the file is malformed, or contradicts the other library's names.
    """
    if not (folder / NAME).is_file():
        return theirs, None
    target = None
    match read_json(folder / NAME):
        case {"reads": str(reads), "writes": str(writes), "target_mean": [*mean], "target_variance": float(variance)}:
            if len(mean) != width or not all(type(number) is float for number in mean):
                raise UserError(f"{folder / NAME}: target_mean should be {width} numbers.")
            target = Target(np.asarray(mean, np.float32), variance)
        case {"reads": str(reads), "writes": str(writes)}:
            pass
        case _:
            raise UserError(f"{folder / NAME} should name the arrays 'reads' and 'writes'.")
    ours = Hooks(reads, writes, f"reads={reads!r}, writes={writes!r}")
    if theirs is None or (not theirs.before_gain and ours.sites(False) in (theirs.sites(True), theirs.sites(False))):
        return ours, target
    raise UserError(
        f"{folder}: {ours.said} in {NAME} and {theirs.said} contradict each other: files were edited or renamed; mend "
        "one of them."
    )
