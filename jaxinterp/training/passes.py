"""The passes of one run: each starts from what the one before it returned, and has checkpoints of its own."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import grain
import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.protocols import Recipe
from jaxinterp.data.activations import Rows
from jaxinterp.data.windows import batches
from jaxinterp.models.ids import check_rows
from jaxinterp.storage.arrays import weights_hash
from jaxinterp.storage.checkpoints import Checkpoints
from jaxinterp.training.guard import Losses, Preemption
from jaxinterp.training.loop import Run, Tracker
from jaxinterp.training.mesh import data_places, spread_over_data
from jaxinterp.training.program import Program
from jaxinterp.training.state import TrainState


@dataclass
class Text:
    """Batches of windows for every pass, each from the beginning, or none at all."""

    windows: grain.MapDataset | None
    ids: int | None
    batch_size: int
    seq: int
    order: dict[str, Json]
    mesh: Mesh

    def read(self) -> tuple[grain.DatasetIterator | None, Callable[[], dict[str, Array]]]:
        """An iterator, whose position can be saved, and the function that gives the next batch on the mesh."""
        if self.windows is None:
            return None, dict
        places, count = data_places(self.mesh, jax.process_index()), self.batch_size // self.seq
        data = iter(batches(self.windows, count, **self.order, host_index=places, host_count=self.mesh.shape["data"]))

        def next_windows() -> dict[str, Array]:
            batch = next(data)
            check_rows(self.ids, batch["tokens"], "text")
            return spread_over_data(batch, places, count, self.mesh)

        return data, next_windows


def _one_pass(
    run: Run,
    program: Program,
    text: Text,
    previous: PyTree,
    folder: Path | None,
    config: dict[str, Json],
    *,
    resume: bool,
    on_failed_save: Literal["stop", "continue"],
) -> TrainState:
    """Start or resume one pass, and step to its end."""
    data, next_windows = text.read()
    kept: Rows | None = None
    hashed: dict[str, int] = {}
    run.next_windows = next_windows
    if program.rows == "kept":
        noted, sums = _noting(next_windows)
        kept = program.harvested(run.model, noted)
        hashed = {"kept": zlib.crc32("".join(sums).encode())}
        data, run.next_windows = None, lambda: kept

    def first_state() -> TrainState:
        if kept is not None:
            return program.start(run.model, kept, previous)
        return program.first_state(run.model, iter(next_windows, None), *(() if previous is None else (previous,)))

    if folder is None:
        return run.from_state(first_state())
    described = config | {"weights": weights_hash(run.model)}
    with Checkpoints(folder, described, resume=resume, on_failed_save=on_failed_save) as checkpoints:

        def save(state: TrainState) -> Callable[[], int | None]:
            position = {} if data is None else data.get_state()
            notes = {"ended": int(run.ended)} | hashed
            return checkpoints.save(int(state.step), state, position | notes, run.losses.recent, run.history)

        run.save = save
        if checkpoints.latest is None:
            return run.from_state(first_state())
        state, position = checkpoints.restore(program.abstract_state(run.model, previous))
        ended, saved_rows = position.pop("ended", 0), position.pop("kept", None)
        if saved_rows is not None and hashed != {"kept": saved_rows}:
            raise UserError(
                f"the rows kept for the checkpoint in {folder} came from other text: resume with the "
                "text, seed and rows that it was made with."
            )
        if data is not None:
            data.set_state(position)
        run.saved, run.ended = int(state.step), bool(ended)
        run.losses.recent.extend(checkpoints.losses(run.saved))
        run.history[:] = checkpoints.history(run.saved)
        return state if ended else run.from_state(state)


def _noting(next_windows: Callable[[], dict[str, Array]]) -> tuple[Iterator[dict[str, Array]], list[str]]:
    """The windows, and a list that fills with a hash of each batch while they are read."""
    sums: list[str] = []

    def read() -> Iterator[dict[str, Array]]:
        while True:
            windows = next_windows()
            sums.append(weights_hash({"tokens": windows["tokens"]}))
            yield windows

    return read(), sums


@dataclass
class Passes:
    """What all passes of a run share, and what they leave behind.

    Attributes:
      program: sizes and shapes; its recipe is that of each pass in turn.
      model: the frozen subject model, on the mesh.
      text: batches of windows, from the beginning in each pass.
      folder: of checkpoints; each of several passes has a folder in it. None: none are written.
      config: what a run is known by when it is resumed.
      checked_first: trace a step from shapes alone before anything is compiled: a method of the user's own may have
        mistakes in it.
      log_every, save_every, stop_after, resume, spike, on_failed_save, track: as for `fit`.
      history: rows of numbers, of all passes.
    """

    program: Program
    model: PyTree
    text: Text
    folder: Path | None
    config: dict[str, Json]
    checked_first: bool
    log_every: int
    save_every: int | None
    stop_after: int | None
    resume: bool
    spike: float | None
    on_failed_save: Literal["stop", "continue"]
    track: Sequence[Tracker]
    preemption: Preemption = field(default_factory=Preemption)
    history: list[dict[str, Json]] = field(default_factory=list)

    def run(self, recipes: Sequence[Recipe], lasts: Sequence[int]) -> tuple[PyTree, TrainState]:
        """Run them one after another, or up to `stop_after`: (what the last one returned, its last state)."""
        answer: PyTree = None
        before = 0
        for number, (recipe, last) in enumerate(zip(recipes, lasts, strict=True)):
            left = last if self.stop_after is None else min(last, max(0, self.stop_after - before))
            program = replace(self.program, recipe=recipe)
            if self.checked_first and recipe.step is not None and recipe.init_on == "device":
                program.check(self.model, answer)
            loop = self._loop(program, left, before)
            folder = self.folder if self.folder is None or len(recipes) == 1 else self.folder / f"pass{number}"
            state = _one_pass(
                loop,
                program,
                self.text,
                answer,
                None if recipe.step is None else folder,
                self.config,
                resume=self.resume,
                on_failed_save=self.on_failed_save,
            )
            before += int(state.step)
            answer = recipe.finish(state.method)
            if left < last and not loop.ended:
                break
        return answer, state

    def _loop(self, program: Program, steps: int, before: int) -> Run:
        """The loop of one pass; its windows and its saving are set when it starts."""
        return Run(
            None if program.recipe.step is None else program.jit_step(),
            self.model,
            dict,
            steps,
            self.log_every,
            self.save_every,
            tuple(self.track),
            Losses(self.spike, None if self.folder is None else self.folder.parent, program.buffer_batches),
            preemption=self.preemption,
            history=self.history,
            before=before,
        )
