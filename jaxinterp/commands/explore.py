"""Look at a run's features in a browser: lists, search, your own text, steering, labels; another run beside it.

Command: jaxinterp explore runs/demo                            (serves on http://127.0.0.1:8017 until Ctrl-C)
         jaxinterp explore runs/demo --compare runs/other       (the nearest feature of another dictionary beside each)
         jaxinterp explore runs/demo --export site              (files that any server, or no server, can show)
         jaxinterp explore DICTIONARY --model tiny --text docs  (a folder that `save` wrote)

The first start reads held-out text once and keeps an index in runs/demo/explore; a start that was stopped goes on where
it was, and later ones read nothing. Needs starlette and uvicorn: pip install "jaxinterp[explore]"; --export does not.
"""

import shutil
import signal
import sys
import time
import webbrowser
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tyro
from jaxtyping import PyTree

from jaxinterp.commands.shell import read_json, say
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.data.text.load_text import load_text
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.decompositions.saved import load_decomposition
from jaxinterp.explore.build import build_index, digest, finished
from jaxinterp.explore.compare import pair
from jaxinterp.explore.export import export
from jaxinterp.explore.index import Index, open_index
from jaxinterp.explore.labels import Labels
from jaxinterp.explore.state import Explorer
from jaxinterp.models.load import Subject, load
from jaxinterp.training.progress import progress_of, waiting

INDEX = "explore"


@dataclass(frozen=True)
class Config:
    """What to look at, and where."""

    run: tyro.conf.Positional[Path]
    """Folder of a run (with config.json and dictionary/), or of a decomposition."""
    compare: Path | None = None
    """Another run of the same array, to see side by side."""
    export: Path | None = None
    """Write the pages as files into this folder, and serve nothing."""
    port: int = 8017
    """On 127.0.0.1; 0 takes a free one."""
    tokens: int = 50_000
    """Held-out tokens that the index reads."""
    layer: int | None = None
    """Of a decomposition with a part for each layer: which one, from 0."""
    model: str | None = None
    """Default: the run's."""
    text: str | None = None
    """Default: the run's; held-out documents of it."""
    seq: int | None = None
    """Tokens a window. Default: the run's, else 256."""
    open: bool = True
    """Open a browser."""
    rebuild: bool = False
    """Make the index anew."""


@dataclass(frozen=True)
class Run:
    """A run on disk: its decomposition, what it was trained on, and its index."""

    folder: Path
    config: Config

    @cached_property
    def settings(self) -> dict[str, Json]:
        """The run's settings where it kept some, with what the command line gives in their place."""
        kept = read_json(self.folder / "config.json") if (self.folder / "config.json").is_file() else {}
        given = {name: value for name, value in vars(self.config).items() if name in ("model", "text", "seq")}
        found = (
            {"text": "docs", "seq": 256} | kept | {name: value for name, value in given.items() if value is not None}
        )
        if "model" not in found:
            raise UserError(f"{self.folder} has no config.json that names a model: give --model.")
        return found

    @property
    def dictionary(self) -> Path:
        """The folder that `save` wrote."""
        inside = self.folder / "dictionary"
        return inside if inside.is_dir() else self.folder

    @property
    def index_folder(self) -> Path:
        """Where the index lies."""
        return self.folder / (INDEX if self.config.layer is None else f"{INDEX}-{self.config.layer}")

    @property
    def labels(self) -> Path:
        """Where labels are kept."""
        return self.folder / ("labels.json" if self.config.layer is None else f"labels-{self.config.layer}.json")

    @cached_property
    def digest(self) -> str:
        """Of the dictionary's files."""
        return digest(self.dictionary, self.index_folder / "digest.json")

    @cached_property
    def subject(self) -> Subject:
        """The model."""
        return load(str(self.settings["model"]))

    @cached_property
    def decomposition(self) -> PyTree:
        """The dictionary; of several layers, the one that was asked for."""
        found, layer = load_decomposition(self.dictionary), self.config.layer
        if isinstance(found, PerLayer) and layer is not None:
            if not 0 <= layer < len(found.parts):
                raise UserError(f"layer={layer} must be from 0 to {len(found.parts) - 1}.")
            return found.parts[layer]
        return found

    def asked(self) -> dict[str, Json]:
        """What the index depends on."""
        names = ("model", "text", "seq")
        return {name: self.settings[name] for name in names} | {"dictionary": self.digest, "layer": self.config.layer}

    def index(self) -> Index:
        """The index; made where it is not there."""
        if self.config.rebuild:
            shutil.rmtree(self.index_folder, ignore_errors=True)
        asked = self.asked() | {"asked_tokens": self.config.tokens, "seed": 0}
        if finished(self.index_folder, asked):
            return open_index(self.index_folder)
        with waiting(f"loading {self.settings['model']}"):
            subject = self.subject
        with waiting(f"reading {self.settings['text']}"):
            enough = 12 * self.config.tokens  # a tenth is held out, by document
            seq: Any = self.settings["seq"]
            _, heldout = load_text(str(self.settings["text"]), subject.tokenizer, seq=seq, max_tokens=enough)
        clock = time.perf_counter()
        with progress_of(self.config.tokens, "reading what fires") as shown:

            def told(done: int, of: int) -> None:
                rate = done / max(time.perf_counter() - clock, 1e-9)
                shown({"step": round(done * self.config.tokens / of), "tokens": done, "tokens_per_second": rate})

            return build_index(
                self.index_folder,
                self.decomposition,
                subject,
                heldout,
                self.asked(),
                tokens=self.config.tokens,
                say=told,
            )

    def load(self) -> tuple[Any, Subject]:
        """What needs the model."""
        return self.decomposition, self.subject


def explorer_of(config: Config) -> Explorer:
    """The indices of a run, and of the one to compare it with, made where they are not there."""
    for folder in (config.run, *([] if config.compare is None else [config.compare])):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give that of a run, as `jaxinterp transcoder --out runs/demo` makes.")
    run = Run(config.run, config)
    index = run.index()
    other = None
    if config.compare is not None:
        second = Run(config.compare, config)
        other = pair(index, second.index(), (run.digest, second.digest))
    return Explorer(index, Labels(run.labels, index.features), run.load, other)


def _stop(number: int, _: Any) -> None:
    """While the index is made."""
    print("stopped: start again to go on; what was read is kept.", file=sys.stderr)
    sys.exit(130)


def main(config: Config) -> None:
    """Index, then serve or export."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if config.export is None:
        try:
            from jaxinterp.explore.server import listener, server_of
        except ImportError as error:
            raise UserError(
                f'the server needs {error.name}: pip install "jaxinterp[explore]", or write files with --export FOLDER.'
            ) from error
        sock = listener(config.port)
    explorer = explorer_of(config)
    if config.export is not None:
        say(f"{export(explorer, config.export)}: open it in a browser, or put the folder on any web server.")
        return
    address = f"http://127.0.0.1:{sock.getsockname()[1]}/"
    server = server_of(explorer, sock)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))  # also before it has started
    say(f"{explorer.index.features:,} features at {address} (this machine only); stop with Ctrl-C.")
    if config.open:
        webbrowser.open(address)
    server.run(sockets=[sock])
