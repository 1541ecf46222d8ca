"""Checkpoints of training.

A checkpoint holds everything that changes (one pytree, by leaf name), the position in the data, and a checksum of every
leaf, so that a run can be resumed bit for bit and a damaged checkpoint is noticed. The configuration of the run stands
in every checkpoint and is compared on restore: a run is never resumed with another k or site. One run at a time writes
to a folder.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxinterp.core.errors import UserError, cause, first_line
from jaxinterp.core.json_value import Json
from jaxinterp.core.trees import fill_leaves, first_difference, named_leaves
from jaxinterp.storage.arrays import checksums, file_name, stored
from jaxinterp.storage.lock import lock, unlock

Position = dict[str, int]
"""Where the data iterator stands; the same on every host."""


class Checkpoints:
    """The checkpoints of one run in one folder; a context manager that waits for writes on leaving.

    Args:
      config: plain JSON values; written with every checkpoint, compared with those of the newest one on resume.
      keep: how many of the latest checkpoints are kept.
      on_failed_save: what a full disk does: "stop" the run, or "continue" it with a warning (in a single process).
    Raises:
      UserError: the folder cannot be written; another run writes to it; it holds checkpoints of another configuration
        (the first differing field is named); or it holds checkpoints and `resume` is False.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Json],
        *,
        resume: bool,
        keep: int = 2,
        on_failed_save: Literal["stop", "continue"] = "stop",
    ):
        logging.getLogger("absl").addFilter(_without_tracebacks_of_orbax)
        self.folder = Path(folder).absolute()
        self.on_failed_save = on_failed_save
        self._pending: tuple[int, Any] | None = None
        self._lock = lock(self.folder)
        self._keep, self._config = keep, dict(config)
        try:
            self._orbax = self._open()
        except OSError as error:
            unlock(self._lock)
            raise UserError(f"checkpoint folder {self.folder} could not be written: {cause(error)}.") from error
        try:
            self._check(config, resume)
        except UserError:
            self._orbax.close()
            unlock(self._lock)
            raise

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    def _check(self, config: Mapping[str, Json], resume: bool) -> None:
        if self.latest is None:
            return
        if not resume:
            raise UserError(
                f"checkpoint folder {self.folder} already holds step {self.latest}: pass resume=True (--resume) to "
                "continue it, or choose another folder."
            )
        made_with = self._saved_config()
        difference = None if made_with is None else first_difference(made_with, dict(config))
        if difference is not None:
            field, saved, asked = difference
            raise UserError(
                f"checkpoint in {self.folder} was made with {field}={saved!r}, not {asked!r}: resume with the saved "
                "value, or choose another folder."
            )

    def _saved_config(self) -> dict[str, Json] | None:
        """Of the newest checkpoint that still tells it; None where none does: `restore` looks into damage."""
        for checkpoint in reversed(self._orbax.checkpoints):
            with contextlib.suppress(Exception):  # whatever Orbax makes of damaged files
                return self._notes(checkpoint.step)["config"]
        return None

    def _notes(self, step: int) -> dict[str, Json]:
        """What is kept beside the arrays: "config", "checksums", "losses", "history"."""
        return self._orbax.metadata(step).custom_metadata or {}

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, also of one that is being written; None where there is none."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(
        self,
        step: int,
        state: PyTree,
        position: Position,
        losses: Sequence[float] = (),
        history: Sequence[Mapping[str, Json]] = (),
    ) -> Callable[[], int | None]:
        """Write the state and the position in the data; returns when the copy off the devices is done.

        Args:
          losses: the recent ones, by which a leap is told.
          history: the rows logged so far, plain numbers by name.
        Returns:
          `settle`, for when the files must be there.
        Raises:
          UserError: this save or the one before it failed, and `on_failed_save` is "stop".
        """
        self.settle()
        arrays = stored(named_leaves(state))
        sums = {name: int(total) for name, total in jax.device_get(checksums(arrays)).items()}
        notes = {"config": self._config, "checksums": sums, "losses": [float(loss) for loss in losses]}
        notes["history"] = [dict(row) for row in history]
        try:
            response = self._orbax.save_checkpointables_async(
                step, {"state": arrays, "data": position}, force=True, custom_metadata=notes
            )
        except (OSError, ValueError) as error:
            self._failed(step, error)
        else:
            self._pending = step, response
        return self.settle

    def losses(self, step: int) -> list[float]:
        """The recent losses that were saved with a checkpoint."""
        return self._notes(step).get("losses", [])

    def history(self, step: int) -> list[dict[str, Json]]:
        """The rows logged until a checkpoint, as they were saved with it; none in those of older versions."""
        return [dict(row) for row in self._notes(step).get("history", [])]

    def restore(self, template: PyTree) -> tuple[Any, Position]:
        """The newest state that is whole, in the shapes and shardings of `template`, and its position in the data.

        Newer checkpoints that are damaged are reported, and moved aside once an older one has been read. What one
        process cannot read is damaged for all.

        Args:
          template: the state as `jax.ShapeDtypeStruct`s (with shardings).
        Raises:
          UserError: no checkpoint can be read, or one holds other arrays than the template.
          JaxRuntimeError, MemoryError: there is no room for the state, which says nothing of the checkpoint.
        """
        shapes = stored(named_leaves(template))
        damaged: dict[int, Exception] = {}
        for checkpoint in reversed(self._orbax.checkpoints):
            loaded, error = self._load(checkpoint.step, shapes)
            if error is not None:
                damaged[checkpoint.step] = error
                continue
            for step, reason in damaged.items():
                warnings.warn(
                    f"the checkpoint of step {step} in {self.folder} is damaged ({first_line(reason)}): it is put "
                    f"aside, and the run continues from step {checkpoint.step}.",
                    stacklevel=2,
                )
            self._put_aside(damaged)
            leaves = {name: loaded["state"][file_name(name)] for name in named_leaves(template)}
            return fill_leaves(template, leaves), {name: int(value) for name, value in loaded["data"].items()}
        first = next(iter(damaged.values()))
        raise UserError(
            f"none of the checkpoints in {self.folder} (steps {', '.join(map(str, sorted(damaged)))}) can be read: "
            f"{first_line(first)}"
        ) from first

    def _load(self, step: int, shapes: Mapping[str, PyTree]) -> tuple[Any, Exception | None]:
        """What a checkpoint holds, and what is wrong with it: the same verdict in every process."""
        loaded: Any = None
        expected: dict[str, int] = {}
        failed: Exception | None = None
        try:
            held = self._orbax.checkpointables_metadata(step).metadata["state"]
            expected = self._notes(step)["checksums"]
        except Exception as error:  # whatever Orbax makes of damaged files
            failed = error
        else:
            try:
                self._check_layout(step, held, shapes)
                loaded = self._read(step, shapes)
            except Exception as error:
                failed = error
        worst = _worst(0 if failed is None else 2 if _is_no_damage(failed) else 1)
        if worst == 2:
            raise failed or UserError(f"another process could not take the checkpoint of step {step}; it says why.")
        if worst == 1:
            return None, failed or ValueError("another process cannot read it")
        for name, total in jax.device_get(checksums(dict(loaded["state"]))).items():
            if int(total) != expected.get(name):
                return None, ValueError(f"array {name.replace('.', '/')} differs from what was saved")
        return loaded, None

    def _read(self, step: int, shapes: Mapping[str, PyTree]) -> Any:
        """What the files hold for this process, which reads alone: nobody waits for one that cannot read its part."""
        own, alone = jax.process_index(), ocp.Context()
        alone.multiprocessing.primary_host = own
        alone.multiprocessing.active_processes = {own}
        alone.multiprocessing.barrier_sync_key_prefix = f"process{own}"
        with alone:
            return ocp.load_checkpointables(self.folder / str(step), {"state": shapes, "data": None})

    def _check_layout(self, step: int, held: Mapping[str, PyTree], shapes: Mapping[str, PyTree]) -> None:
        place = f"the checkpoint of step {step} in {self.folder}"
        for name in sorted(held.keys() ^ shapes.keys()):
            which = "which this run has not" if name in held else "which this run needs"
            word = "holds" if name in held else "lacks"
            raise UserError(f"{place} {word} array {name!r}, {which}: resume with the version that wrote it.")
        for name, shape in shapes.items():
            random_key = jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key)
            if not random_key and tuple(held[name].shape) != shape.shape:
                raise UserError(
                    f"{place} holds array {name!r} of shape {tuple(held[name].shape)}, and this run needs "
                    f"{shape.shape}: resume with the version that wrote it."
                )

    def _put_aside(self, steps: Mapping[int, Any]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = self.folder.with_name(f"{self.folder.name}-damaged")
            aside.mkdir(exist_ok=True)
            for step in steps:
                os.replace(self.folder / str(step), _unused(aside / str(step)))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jaxinterp: damaged checkpoints are put aside")
        self._orbax.reload()

    def settle(self) -> int | None:
        """Wait for the save that is under way; the step of the newest checkpoint that is written to its end.

        Raises:
          UserError: it failed, and `on_failed_save` is "stop".
        """
        if self._pending is not None:
            (step, response), self._pending = self._pending, None
            try:
                response.result()
            except Exception as error:  # a full disk comes as whatever the writing library raises
                self._failed(step, error)
        return self.latest

    def _failed(self, step: int, error: Exception) -> None:
        kept = "no earlier one is there" if self.latest is None else f"that of step {self.latest} is kept"
        words = f"the checkpoint of step {step} could not be written to {self.folder}: {cause(error)}; {kept}"
        if self.on_failed_save == "stop" or jax.process_count() > 1:  # the others do not know of it
            raise UserError(f"{words}: make room and resume.") from error
        warnings.warn(f"{words}: the run continues.", stacklevel=2)
        with contextlib.suppress(Exception):  # the same failure, told once more
            self._orbax.close()
        self._orbax = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            with contextlib.suppress(Exception):  # a failed save, which has been told
                self._orbax.close()
            unlock(self._lock)


def _without_tracebacks_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax's threads log a traceback each where a disk is full; the error itself comes back to us, and we tell it."""
    return not ("orbax" in record.pathname and record.exc_info)


def _worst(code: int) -> int:
    """The largest of all processes' codes."""
    if jax.process_count() == 1:
        return code
    return int(np.max(multihost_utils.process_allgather(np.asarray(code))))


def _is_no_damage(error: Exception) -> bool:
    return isinstance(error, UserError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _unused(path: Path) -> Path:
    number = 0
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")
