"""What ends a run early without losing it: a preemption, a loss that is not finite, a loss that leaps."""

import signal
import statistics
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import WINDOW
from jaxinterp.objectives import Ratio

PREEMPTED = 75
"""Exit code of a run that was told to stop, has saved, and wants to be resumed (EX_TEMPFAIL of sysexits.h)."""


class Preempted(Exception):
    """The run was asked to stop after `step`: by SIGTERM, or by SIGINT (Ctrl-C).

    saved: whether the files of that step's checkpoint are written; kept: the step of the newest checkpoint, None where
    there is none; by: what asked.
    """

    def __init__(self, step: int, saved: bool, kept: int | None = None, by: str = "SIGTERM"):
        self.step, self.saved, self.kept = step, saved, step if saved else kept
        if saved:
            words = "everything is saved: continue with --resume"
        elif kept is not None:
            words = f"that step could not be saved: continue from step {kept} with --resume"
        else:
            words = "nothing is saved: there is no checkpoint"
        super().__init__(f"stopped by {by} after step {step}; {words}.")


class Preemption:
    """While it is open, SIGTERM or Ctrl-C asks the run to stop at the end of its step; afterwards as before.

    A second Ctrl-C is for a user who does not want to wait: it interrupts at once. Only the main thread of a program
    can listen; elsewhere nobody asks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, before in self._before.items():
            if before is not None:  # None: what listened was not set from Python
                signal.signal(number, before)
        if self._asked is not None and self._before and kind is None:  # at the very end: no step was left to stop at
            signal.raise_signal(self._asked)

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self._asked == signal.SIGINT:
                raise KeyboardInterrupt
            print("stopping after this step; Ctrl-C again stops at once.", file=sys.stderr, flush=True)
        self._asked = number

    @property
    def by(self) -> str:
        """What asked."""
        return "SIGTERM" if self._asked is None else signal.Signals(self._asked).name

    def asked(self, *, together: bool) -> bool:
        """Whether any process was asked; several processes find out at the same step, where `together` is true."""
        if jax.process_count() == 1:
            return self._asked is not None
        if not together:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self._asked is not None))))


class Losses:
    """The loss of every step; refuses one that is not finite or that leaps.

    Args:
      spike: a loss leaps where loss - median > spike * |median|, with the median of the last hundred losses; None: any
        finite loss is good.
      folder: where the text before the refused step is kept; None: nowhere.
      buffer_batches: of how many steps before the refused one the text is kept. Training draws its rows at random from
        the shuffle buffer, where most wait about so many steps: the text read at one step is not what it trained on.
      recent: losses of the run so far, where it is resumed.
    """

    def __init__(self, spike: float | None, folder: Path | None, buffer_batches: int = 8, recent: Iterable[float] = ()):
        self._spike, self._folder = spike, folder
        self._steps: list[tuple[int, Ratio, Mapping[str, PyTree]]] = []
        self._read: deque[tuple[int, Mapping[str, PyTree]]] = deque(maxlen=buffer_batches + 1)
        self.recent: deque[float] = deque(recent, maxlen=100)

    def add(self, step: int, loss: Ratio, windows: Mapping[str, Array | np.ndarray]) -> None:
        """Note a step's loss, which is still on the device, and the text that was read at it."""
        self._steps.append((step, loss, {name: windows[name] for name in WINDOW if name in windows}))

    def check(self, kept: Callable[[], str]) -> None:
        """Look at the losses noted since the last check.

        Raises:
          UserError: one is not finite or leaps; the text is saved and `kept()` says which checkpoint is left.
        """
        steps, self._steps = self._steps, []
        losses = [float(loss.value()) for loss in jax.device_get([loss for _, loss, _ in steps])]
        for (step, _, windows), loss in zip(steps, losses, strict=True):
            self._read.append((step, windows))
            usual = statistics.median(self.recent) if len(self.recent) >= 10 else None
            if not np.isfinite(loss):
                why = "is not finite: lower the learning rate"
            elif self._spike is not None and usual is not None and loss - usual > self._spike * max(abs(usual), 1e-6):
                times = (loss - usual) / max(abs(usual), 1e-6)
                why = f"is {times:.0f} times the size of the usual {usual:.3g} above it: lower the learning rate"
            else:
                self.recent.append(loss)
                continue
            where = ""
            if self._folder is not None:
                where = f"; the text read at steps {self._read[0][0]} to {step}, most of what it trained on, "
                try:
                    where += f"is in {_keep(self._folder, step, loss, self._read)}"
                except OSError as error:
                    where += f"could not be kept ({error})"
            raise UserError(f"loss={loss:.3g} at step {step} {why}; {kept()}{where}.")


def _keep(folder: Path, step: int, loss: float, read: Iterable[tuple[int, Mapping[str, PyTree]]]) -> Path:
    """The text of the last steps as a file, `[steps, batch, seq]`: this process's rows."""
    path = folder / f"refused_batch_step{step}_process{jax.process_index()}.npz"
    texts = [{name: _here(array) for name, array in windows.items()} for _, windows in read]
    arrays: dict[str, PyTree] = {name: np.stack([text[name] for text in texts]) for name in texts[0]}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, step=step, loss=loss, steps=np.array([read_at for read_at, _ in read]), **arrays)
    return path


def _here(array: Any) -> np.ndarray:
    return np.concatenate([np.asarray(shard.data) for shard in _distinct(array)])


def _distinct(array: Any) -> list[Any]:
    """The shards that lie here, each once and in their order."""
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0] or array.addressable_shards[:1]
    return sorted(own, key=lambda shard: shard.index[0].start or 0)
