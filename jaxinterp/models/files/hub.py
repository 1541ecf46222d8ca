"""The Hugging Face hub: only the files that are needed, checked, into its usual cache.

    load("org/name")                a model: config.json, tokenizer.json and what stands beside it, safetensors
    load("org/name/file.gguf")      one GGUF file, or all files of a split one
    read("org/name", "a/folder")    a dictionary (jaxinterp.interchange)

`huggingface_hub` fetches, resumes after a cut connection, and caches; `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and
`HF_TOKEN` are as there. Beyond that: a file's checksum (SHA-256 for large files, git's SHA-1 for small ones) is
compared with the one that the hub states, once, and a file that differs is deleted and refused. Pickles are never
fetched as weights of a model; names of files that lead out of the repository are refused before anything is fetched.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jaxinterp.core.errors import UserError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *("chat_template.jinja", "added_tokens.json"),
)
"""What a tokenizer is read with; each may be missing."""

CHECKED = ".jaxinterp-checked"
"""Folder in the cache: an empty file for every blob whose checksum was found right."""


@dataclass(frozen=True)
class Hub:
    """Where and how to fetch.

    Attributes:
      revision: a branch, tag or commit; None: the main branch.
      token: for gated and private repositories; None: `HF_TOKEN`, or what `hf auth login` stored.
      cache: the folder of the cache; None: `HF_HOME`'s.
      offline: use the cache alone.
    """

    revision: str | None = None
    token: str | None = None
    cache: str | Path | None = None
    offline: bool = False


def is_repository(source: str | Path) -> bool:
    """Whether a source is the name of a repository, and nothing on this disk: `org/name`, `org/name/file.gguf`."""
    text = str(source)
    parts = text.split("/")
    if isinstance(source, Path) or Path(text).exists() or len(parts) < 2:
        return False
    return REPOSITORY.fullmatch("/".join(parts[:2])) is not None and (len(parts) == 2 or text.endswith(".gguf"))


def fetch_model(source: str, hub: Hub) -> Path:
    """The folder (or the GGUF file) of a model, with everything that `load` reads.

    Raises:
      UserError: there is no such repository, it is gated, it has pickles only, the network is closed, a checksum is
        wrong, or a name leads out of the repository.
    """
    repository, file = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
    if file:
        return _fetch_gguf(repository, file, hub)
    config = fetch(repository, CONFIG, hub)
    for name in BESIDE:
        fetch_if_there(repository, name, hub)
    single = fetch_if_there(repository, WEIGHTS, hub)
    index = None if single else fetch_if_there(repository, INDEX, hub)
    if single is None and index is None:
        raise UserError(
            f"{repository}: neither {WEIGHTS} nor {INDEX} is in the repository. Pickles are not read, as they can run "
            "code; look for a repository or a revision with safetensors, or give 'org/name/file.gguf'."
        )
    for name in _shards(index, repository) if index else ():
        fetch(repository, name, hub)
    return config.parent


def _fetch_gguf(repository: str, file: str, hub: Hub) -> Path:
    from jaxinterp.models.files.gguf_file import PART

    part = PART.fullmatch(PurePosixPath(file).name)
    folder = PurePosixPath(file).parent
    count = int(part[3]) if part else 1
    names = (
        [f"{part[1]}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)] if part else [PurePosixPath(file).name]
    )
    paths = [fetch(repository, str(folder / name), hub) for name in names]
    return paths[0]


def _shards(index: Path, repository: str) -> list[str]:
    """The files that an index names.

    Raises:
      UserError: it is damaged, or a name is not a plain safetensors file of the repository.
    """
    try:
        files = sorted(set(dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"]).values()), key=str)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{repository}: {INDEX} has no readable weight_map ({error!r}).") from error
    for file in files:
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise UserError(f"{repository}: {INDEX} names {str(file)[:80]!r}, which is not a plain safetensors file.")
    return files


def fetch(repository: str, file: str, hub: Hub) -> Path:
    """One file of a repository, in the cache, its checksum compared.

    Raises:
      UserError: it is not there, the repository is gated or absent, the network is closed, or the checksum is wrong.
    """
    from huggingface_hub import errors, hf_hub_download

    _check_name(file)
    try:
        path = hf_hub_download(
            repository,
            file,
            revision=hub.revision,
            token=hub.token,
            cache_dir=hub.cache,
            local_files_only=hub.offline,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms on its page, make a token that may read it, and pass token= or "
            "set HF_TOKEN (`hf auth login` stores it)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {hub.revision!r}: give a branch, a tag or a commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no repository {repository!r} on the hub, or it is private: check the name (nothing of that name is on "
            "this disk either), or pass token=."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(_not_cached(repository, file, hub)) from error
    except errors.EntryNotFoundError as error:
        raise _Missing(f"{repository} has no file {file!r}{_at(hub)}.") from error
    except (OSError, errors.HFValidationError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{repository}: {file!r} could not be fetched ({reason}); try again, it resumes.") from error
    except Exception as error:  # the HTTP library's own, which changes from version to version
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise UserError(f"{repository}: {file!r} could not be fetched ({type(error).__name__}: {error}).") from error
    found = Path(path)
    _check_sum(found, repository, file, hub)
    return found


class _Missing(UserError):
    """The repository is there, and the file is not in it."""


def fetch_if_there(repository: str, file: str, hub: Hub) -> Path | None:
    """`fetch`, or None where the repository has no such file (offline: the cache)."""
    try:
        return fetch(repository, file, hub)
    except _Missing:
        return None
    except UserError:
        if hub.offline or os.environ.get("HF_HUB_OFFLINE"):
            return None
        raise


def listed(repository: str, hub: Hub) -> list[str]:
    """The names of a repository's files; offline those that are in the cache.

    Raises:
      UserError: there is no such repository, it is gated, or the network is closed and nothing is cached.
    """
    from huggingface_hub import HfApi, errors

    if not hub.offline and not os.environ.get("HF_HUB_OFFLINE"):
        try:
            api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=hub.token)
            return [name for name in api.list_repo_files(repository, revision=hub.revision) if _is_inside(name)]
        except errors.RevisionNotFoundError as error:
            raise UserError(f"{repository} has no revision {hub.revision!r}.") from error
        except errors.GatedRepoError as error:
            raise UserError(f"{repository} is gated: accept its terms on its page and pass token=.") from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(f"no repository {repository!r} on the hub, or it is private: pass token=.") from error
        except Exception as error:  # the network, in whatever words the HTTP library has for it
            cached = _cached(repository, hub)
            if not cached:
                raise UserError(_not_cached(repository, "its list of files", hub)) from error
            return cached
    cached = _cached(repository, hub)
    if not cached:
        raise UserError(_not_cached(repository, "its list of files", hub))
    return cached


def _cached(repository: str, hub: Hub) -> list[str]:
    from huggingface_hub import constants

    root = Path(hub.cache or constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    reference = root / "refs" / (hub.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (hub.revision or "")
    folder = root / "snapshots" / commit
    if not commit or not folder.is_dir():
        return []
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _not_cached(repository: str, file: str, hub: Hub) -> str:
    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if hub.offline or os.environ.get("HF_HUB_OFFLINE"):
        return f"{repository}: {file!r} is not in the cache, and offline is on: fetch it once with the network open."
    return (
        f"{repository}: cannot reach {where}, and {file!r} is not in the cache (nothing of this name is on this disk "
        "either): open the network, set HF_ENDPOINT to a mirror, or fetch the repository elsewhere and give its folder."
    )


def _at(hub: Hub) -> str:
    return "" if hub.revision is None else f" at revision {hub.revision!r}"


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def _check_name(file: str) -> None:
    """Raises UserError where a name leads out of the repository."""
    if not _is_inside(file):
        raise UserError(f"{file[:80]!r} leads out of the repository: give the path of a file in it.")


def _check_sum(path: Path, repository: str, file: str, hub: Hub) -> None:
    """Compare a cached file with the checksum that its blob is named by; delete it where it differs.

    Raises:
      UserError: it differs.
    """
    blob = path.resolve()
    stated = blob.name
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", stated):
        return  # not by a checksum: a copy without links, or another server's tags
    mark = blob.parent.parent / CHECKED / stated
    if mark.is_file():
        return
    if _digest(blob, "sha256" if len(stated) == 64 else "sha1") != stated:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{repository}: {file!r} does not have the checksum that the hub states ({stated[:12]}...): it was damaged "
            "on the way or tampered with, and has been deleted; fetch it again."
        )
    try:
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
    except OSError:
        pass  # a cache that others own: compared again the next time


def _digest(path: Path, kind: str) -> str:
    """SHA-256 of a file, or the SHA-1 that git gives it."""
    found = hashlib.new(kind, usedforsecurity=False)
    if kind == "sha1":
        found.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            found.update(chunk)
    return found.hexdigest()


def upload(folder: Path, repository: str, *, token: str | None, private: bool, message: str) -> str:
    """Create the repository if it is not there, and put a folder's files into it; its address.

    Raises:
      UserError: the name is invalid, the hub refuses, or the network is closed.
    """
    from huggingface_hub import HfApi

    if REPOSITORY.fullmatch(repository) is None:
        raise UserError(f"repository={repository!r} should be like 'org/name'.")
    endpoint = os.environ.get("HF_ENDPOINT")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # whatever the HTTP library calls it
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{repository} was not written ({reason}): check the name, and that token= or HF_TOKEN may write there."
        ) from error
    return f"{endpoint or 'https://huggingface.co'}/{repository}"


def names_below(names: Iterable[str], folder: str) -> list[str]:
    """The files directly in a folder of a repository."""
    parent = PurePosixPath(folder)
    return [name for name in names if PurePosixPath(name).parent == parent]
