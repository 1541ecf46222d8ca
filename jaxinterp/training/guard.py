"""What ends a run early without losing it: a preemption, a loss that is not finite, a loss that leaps."""

import signal
import statistics
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinterp.errors import UserError
from jaxinterp.objectives import Ratio

PREEMPTED = 75
"""Exit code of a run that was told to stop, has saved, and wants to be resumed (EX_TEMPFAIL of sysexits.h)."""


class Preempted(Exception):
    """The run was told to stop by SIGTERM, and everything is saved; `step` is where it continues."""

    def __init__(self, step: int, saved: bool):
        self.step, self.saved = step, saved
        kept = "everything is saved: continue with --resume" if saved else "nothing was saved: no checkpoint folder"
        super().__init__(f"stopped by SIGTERM after step {step}; {kept}.")


class Preemption:
    """While it is open, SIGTERM asks the run to stop at the end of its step; afterwards it does what it did before.

    Only the main thread of a program can listen; elsewhere nobody asks.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def asked(self, *, together: bool) -> bool:
        """Whether any process was asked; several processes find out at the same step, where `together` is true."""
        if jax.process_count() == 1:
            return self._asked
        if not together:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.asarray(self._asked))))


class Losses:
    """The loss of every step; refuses one that is not finite or that leaps.

    Args:
      spike: how many times the median of the last hundred losses is a leap; None: any finite loss is good.
      folder: where the batch of the refused step is kept; None: nowhere.
    """

    def __init__(self, spike: float | None, folder: Path | None):
        self._spike, self._folder = spike, folder
        self._steps: list[tuple[int, Ratio, Mapping[str, Any]]] = []
        self._recent: deque[float] = deque(maxlen=100)

    def add(self, step: int, loss: Ratio, windows: Mapping[str, Any]) -> None:
        """Note a step's loss, which is still on the device, and its batch."""
        self._steps.append((step, loss, windows))

    def check(self, kept: str) -> None:
        """Look at the losses noted since the last check.

        Raises:
          UserError: one is not finite or leaps; the batch is saved and `kept` says which checkpoint is left.
        """
        steps, self._steps = self._steps, []
        losses = [float(loss.value()) for loss in jax.device_get([loss for _, loss, _ in steps])]
        for (step, _, windows), loss in zip(steps, losses, strict=True):
            usual = statistics.median(self._recent) if len(self._recent) >= 10 else None
            if not np.isfinite(loss):
                why = "is not finite: lower the learning rate"
            elif self._spike is not None and usual is not None and loss > self._spike * max(usual, 1e-6):
                why = f"is {loss / max(usual, 1e-6):.0f} times the usual {usual:.3g}: lower the learning rate"
            else:
                self._recent.append(loss)
                continue
            where = "" if self._folder is None else f"; its batch is in {_keep(self._folder, step, loss, windows)}"
            raise UserError(f"loss={loss:.3g} at step {step} {why}; {kept}{where}.")


def _keep(folder: Path, step: int, loss: float, windows: Mapping[str, Any]) -> Path:
    """The text of a batch as a file: this process's rows."""
    path = folder / f"refused_batch_step{step}_process{jax.process_index()}.npz"
    rows: dict[str, Any] = {
        name: np.concatenate([np.asarray(shard.data) for shard in _distinct(array)]) for name, array in windows.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(path, step=step, loss=loss, **rows)
    return path


def _distinct(array: Any) -> list[Any]:
    """The shards that lie here, each once and in their order."""
    own = [shard for shard in array.addressable_shards if shard.replica_id == 0] or array.addressable_shards[:1]
    return sorted(own, key=lambda shard: shard.index[0].start or 0)
