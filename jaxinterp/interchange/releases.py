"""SAELens's directory of public dictionaries: releases, and the names of what is in them.

    directory()["gemma-scope-2b-pt-mlp"].entries["layer_12/width_16k/average_l0_60"]
    read("gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0_60")       fetched from the hub, and read

The names come from SAELens's own file where SAELens is installed (nothing of it is imported), else from a copy of the
one of 6.54.12 that lies here. An entry says where its files are and what they do not say themselves: a scale, whether
streams were centred, how activations were normalised, the site. What they do say is never overruled.
"""

import importlib.util
import json
import lzma
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.interchange.readers import Format
from jaxinterp.interchange.saelens_fields import REFUSED

SNAPSHOT = Path(__file__).with_name("releases.json.xz")
VERSION = "6.54.12"
"""Of the SAELens whose names the snapshot has."""

FORMATS: dict[str, Format] = {
    "saelens": "saelens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "dictionary_learning_1": "dictionary_learning",
    "deepseek_r1": "dictionary_learning",
    "qwen_scope": "qwen_scope",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope",
    "mwhanna_transcoder": "circuit_tracer",
    "mntss_clt_layer_transcoder": "circuit_tracer_clt",
    "connor_rob_hook_z": "hook_z",
    "goodfire": "goodfire",
}
"""Ours by SAELens's name of a loader."""


@dataclass(frozen=True)
class Entry:
    """One dictionary: its name in the release, its path in the repository, and the scale that its files leave out."""

    name: str
    path: str
    scale: float | None = None


@dataclass(frozen=True)
class Release:
    """One release.

    Attributes:
      name: as SAELens has it.
      repository: on the hub.
      model: that it was trained on, as SAELens names it.
      loader: SAELens's name of what reads it.
      overrides: what the files do not say.
      entries: by name.
    """

    name: str
    repository: str
    model: str
    loader: str
    overrides: Mapping[str, Json] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where an entry's files are, and what they do not say.

    Attributes:
      repository, path: on the hub.
      format: ours.
      site: where it belongs, where the files have no place to say it.
      scaling_factor: for files that say that there is one and not which.
      centred: whether streams were centred; None: as the file says.
      overrides: of fields of a configuration.
    """

    repository: str
    path: str
    format: Format
    site: str | None
    scaling_factor: float | None
    centred: bool | None
    overrides: Mapping[str, Json]


@cache
def directory() -> Mapping[str, Release]:
    """Every release by name."""
    installed = _installed()
    if installed is not None:
        return _from_yaml(installed)
    return _from_snapshot(json.loads(lzma.decompress(SNAPSHOT.read_bytes())))


def _installed() -> Path | None:
    """SAELens's file, where it is installed."""
    spec = importlib.util.find_spec("sae_lens")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "pretrained_saes.yaml"
        if path.is_file():
            return path
    return None


def _from_yaml(path: Path) -> dict[str, Release]:
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = yaml.load(path.read_text(encoding="utf-8"), loader)
    return {name: release_of(name, fields) for name, fields in found.items()}


def release_of(name: str, fields: Mapping[str, Json]) -> Release:
    """A release of SAELens's YAML."""
    entries = {
        str(each["id"]): Entry(str(each["id"]), str(each["path"]), each.get("norm_scaling_factor"))
        for each in fields["saes"]
    }
    loader = fields.get("conversion_func") or "saelens"
    overrides = fields.get("config_overrides") or {}
    return Release(name, fields["repo_id"], fields["model"], loader, overrides, entries)


def _from_snapshot(found: Mapping[str, Json]) -> dict[str, Release]:
    releases = {}
    for name, fields in found.items():
        entries = {row[0]: Entry(row[0], row[1] or row[0], *row[2:]) for row in fields["entries"]}
        overrides = fields.get("overrides", {})
        releases[name] = Release(name, fields["repository"], fields["model"], fields["format"], overrides, entries)
    return releases


def snapshot_of(releases: Mapping[str, Release]) -> bytes:
    """What `directory` reads where SAELens is not installed."""
    found = {}
    for release in releases.values():
        rows = [
            [
                entry.name,
                None if entry.path == entry.name else entry.path,
                *([] if entry.scale is None else [entry.scale]),
            ]
            for entry in release.entries.values()
        ]
        said = {"repository": release.repository, "model": release.model, "format": release.loader, "entries": rows}
        found[release.name] = said | ({"overrides": dict(release.overrides)} if release.overrides else {})
    return lzma.compress(json.dumps(found, separators=(",", ":"), sort_keys=True).encode(), preset=9)


def lookup(name: str) -> tuple[Release, Entry] | None:
    """The release and the entry that `release/entry` names; None where no release has such a name.

    The entry may be cut short where one entry alone begins so.

    Raises:
      UserError: the release has no such entry, or several.
    """
    releases = directory()
    parts = name.strip("/").split("/")
    if parts[0] not in releases:
        return None
    release, wanted = releases[parts[0]], "/".join(parts[1:])
    if wanted in release.entries:
        return release, release.entries[wanted]
    near = [each for each in release.entries if wanted and (each + "/").startswith(wanted + "/")]
    if len(near) == 1:
        return release, release.entries[near[0]]
    some = ", ".join((near or list(release.entries))[:5])
    raise UserError(
        f"release {release.name!r} has {len(near)} entries {wanted!r} of {len(release.entries)}; it has {some}, ..."
        f"{suggest(wanted, release.entries)}"
    )


def place(release: Release, entry: Entry) -> Place:
    """Where an entry's files are, and what they do not say.

    Raises:
      UserError: nothing here is such a dictionary.
    """
    if release.loader not in FORMATS:
        reason = REFUSED.get(release.loader, "its format is not known here")
        raise UserError(f"{release.name}/{entry.name} is not supported: {reason}.")
    path = entry.path
    if release.loader == "mntss_clt_layer_transcoder":
        path = f"W_enc_{path}.safetensors"
    options = release.overrides.get("model_from_pretrained_kwargs") or {}
    centred = options.get("center_writing_weights")
    return Place(
        repository=release.repository,
        path=path,
        format=FORMATS[release.loader],
        site=_site(release, entry),
        scaling_factor=entry.scale,
        centred=centred if isinstance(centred, bool) else None,
        overrides={name: release.overrides[name] for name in ("normalize_activations",) if name in release.overrides},
    )


def _site(release: Release, entry: Entry) -> str | None:
    """Of files that cannot say it: by the entry's name."""
    numbers = re.findall(r"(?:layer_|blocks\.)(\d{1,4})", entry.name) or re.findall(r"layer_(\d{1,4})", entry.path)
    if not numbers:
        return None
    if release.loader in ("goodfire", "deepseek_r1", "dictionary_learning_1"):
        return f"blocks/{int(numbers[0])}/resid/post"
    if release.loader == "mwhanna_transcoder":
        return f"blocks/{int(numbers[0])}/mlp"
    return None
