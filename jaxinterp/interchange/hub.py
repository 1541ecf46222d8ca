"""Dictionaries on the hub: which files of a repository one needs, and what is written there.

`read("org/name", "a/folder")` fetches the files of the folder that a reader knows and what stands beside them, and
nothing else; `push(decomposition, "org/name")` writes a folder with the decomposition's own files and a card.
"""

import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.saved import save
from jaxinterp.interchange import circuit_tracer, llama_scope
from jaxinterp.interchange.readers import READERS
from jaxinterp.models.files.hub import Hub, fetch, listed, names_below, upload
from jaxinterp.storage.files import write_text

BESIDE = (
    *("cfg.json", "config.json", "config.yaml", "hyperparams.json", "activation_scaler.json"),
    *("jaxinterp_sites.json", "conf.yaml"),
)
"""What may stand beside a dictionary's arrays."""


def fetch_dictionary(repository: str, path: str, hub: Hub) -> Path:
    """Where the files of a dictionary are, once they have been fetched: the file or the folder that `path` names.

    Raises:
      UserError: the repository has no such file or folder, or nothing in it is known; and as `fetch`.
    """
    names = listed(repository, hub)
    clean = path.strip("/")
    if clean in names:
        found = fetch(repository, clean, hub)
        for name in _companions(clean, names):
            fetch(repository, name, hub)
        return found
    inside = names_below(names, clean or ".")
    wanted = [name for name in inside if any(reader.names(Path(name)) for reader in READERS.values())]
    checkpoint = str(PurePosixPath(clean) / llama_scope.CHECKPOINT)
    wanted += [checkpoint] if checkpoint in names else []
    if not wanted:
        folders = sorted({str(PurePosixPath(name).parent) for name in names if name.endswith((".safetensors", ".npz"))})
        raise UserError(
            f"{repository}: nothing that is known is at {path!r}; there is something in {', '.join(folders[:5])}"
            f"{' ...' if len(folders) > 5 else ''}."
        )
    for name in [*wanted, *(name for name in inside if PurePosixPath(name).name in BESIDE)]:
        if PurePosixPath(name).name.startswith("W_enc_"):
            fetch(repository, name.replace("W_enc_", "W_dec_"), hub)
        fetch(repository, name, hub)
    first = fetch(repository, wanted[0], hub)
    return first.parents[1] if wanted[0] == checkpoint else first.parent


def _companions(file: str, names: list[str]) -> list[str]:
    """What a file's reader wants beside it, of what is there."""
    path = PurePosixPath(file)
    beside = [path.parent / name for name in BESIDE]
    beside.append(path.with_name(f"{path.name.removesuffix('.pt')}_cfg.json"))
    if circuit_tracer.ENCODER.fullmatch(path.name):
        beside.append(path.with_name(path.name.replace("W_enc_", "W_dec_")))
    known = set(names)
    return [str(name) for name in beside if str(name) in known]


def card(
    decomposition: Any, *, row: Mapping[str, Json] | None, config: Mapping[str, Json] | None, command: str | None
) -> str:
    """The README.md of a repository: what it is, how it scored, how it was made, how to load it."""
    kind = type(decomposition).__name__
    sites = decomposition.sites
    lines = ["---", "library_name: jaxinterp", "tags:", "- jaxinterp", f"- {kind}", "---", "", f"# {kind}", ""]
    lines += [f"Reads `{sites.reads}`, writes `{sites.writes}`.", ""]
    lines += ["```python", "from jaxinterp import load_decomposition", "", 'it = load_decomposition("the/folder")']
    lines += ["```", ""]
    if row:
        lines += ["## Scoreboard", "", "| column | value |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in row.items()]
        lines.append("")
    if config:
        lines += ["## Configuration", "", "```json", json.dumps(dict(config), indent=2, default=str), "```", ""]
    if command:
        lines += ["## Made by", "", "```", command, "```", ""]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")[:200]


def push(
    decomposition: Any,
    repository: str,
    *,
    row: Mapping[str, Json] | None = None,
    config: Mapping[str, Json] | None = None,
    command: str | None = None,
    token: str | None = None,
    private: bool = False,
) -> str:
    """Put a decomposition on the hub, with a card; returns its address.

    Args:
      decomposition: any that `save` writes.
      repository: "org/name"; it is made if it is not there.
      row: its row of the scoreboard, as `score` returns it.
      config: how it was trained: names and values.
      command: what made it; None: the command line of this process.
      token: one that may write; None: `HF_TOKEN`, or the stored one.
    Raises:
      UserError: the name is invalid, the hub refuses, or the network is closed.
    """
    command = shlex.join(["python", *sys.argv]) if command is None else command
    with tempfile.TemporaryDirectory() as place:
        folder = save(decomposition, Path(place) / "it")
        write_text(folder / "README.md", card(decomposition, row=row, config=config, command=command))
        return upload(folder, repository, token=token, private=private, message="A decomposition by jaxinterp")
