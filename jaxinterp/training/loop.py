"""The loop itself: step, log, check, save."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.metrics import Metrics
from jaxinterp.data.activations import Rows
from jaxinterp.training.guard import Losses, Preempted, Preemption
from jaxinterp.training.state import Given, TrainState, all_finite

Tracker = Callable[[Mapping[str, Any]], None]
"""Called with one row of plain numbers every `log_every` steps."""


@dataclass
class Run:
    """One pass of a compiled step over windows of text, or again and again over kept rows.

    next_windows: what a step gets beside the model; kept rows, or nothing, at every step the same. before: steps of the
    passes before this one, which rows of numbers count on from. ended: the method said that it has converged.
    save: called with a state that is to be kept, waits for the save before it, returns what waits until this one is
    written and gives the step of the newest checkpoint; None: none is kept. saved: the step of the newest checkpoint
    that is written to its end. `save_every` is a promise, how far that step is back at most: see `save_distance`.
    preemption: open while the run must not be ended by SIGTERM; else nobody asks it to stop.
    """

    step: Any
    model: PyTree
    next_windows: Callable[[], Given]
    last: int
    log_every: int
    save_every: int | None
    track: tuple[Tracker, ...]
    losses: Losses
    save: Callable[[TrainState], Callable[[], int | None]] | None = None
    saved: int | None = None
    settle: Callable[[], int | None] | None = None
    preemption: Preemption = field(default_factory=Preemption)
    history: list[dict[str, Json]] = field(default_factory=list)
    before: int = 0
    ended: bool = False

    def from_state(self, state: TrainState) -> TrainState:
        """Step until `last` or until the method has converged, logging, checking and saving on the way.

        Raises:
          UserError: a number is not finite or the loss leaps: the newest checkpoint is kept; the state could not be
            saved.
          Preempted: SIGTERM came; it says whether the state is saved.
        """
        window: Metrics | None = None
        distance = self.save_every and save_distance(self.save_every, self.log_every)
        clock, logged_at = time.perf_counter(), int(state.step)
        for done in range(int(state.step) + 1, self.last + 1):
            windows = self.next_windows()
            state, metrics = self.step((self.model, windows), state)
            window = metrics if window is None else jax.tree.map(jnp.add, window, metrics)
            if "loss" in metrics:
                self.losses.add(done, metrics["loss"], {} if isinstance(windows, Rows) else windows)
            logged = done % self.log_every == 0 or done == self.last
            self.ended = logged and "converged" in metrics and float(metrics["converged"].value()) >= 1
            final = done == self.last or self.ended
            preempted = not final and self.preemption.asked(together=logged)
            if not logged and not preempted:
                continue
            self._check(state, done)
            if logged:
                size = _tokens(windows)
                row = _row(self.before + done, size * (self.before + done), window)
                row["tokens_per_second"] = size * (done - logged_at) / (time.perf_counter() - clock)
                window, clock, logged_at = None, time.perf_counter(), done
                self.history.append(row)
                for tracker in self.track:
                    tracker(row)
            due = distance is not None and done % distance == 0
            if due or preempted or final:
                self._save(state, wait=preempted or final or distance == self.save_every)
            if preempted:
                raise Preempted(done, saved=self.saved == done, kept=self.saved, by=self.preemption.by)
            if final:
                break
        return state

    def _check(self, state: TrainState, done: int) -> None:
        self.losses.check(self._kept)
        if not bool(all_finite(state.method)):
            raise UserError(f"numbers are not finite by step {done}: lower the learning rate; {self._kept()}.")

    def _save(self, state: TrainState, *, wait: bool) -> None:
        """Called while SIGTERM is listened to: a second one does not end the writing."""
        if self.save is not None:
            self.settle = self.save(state)
        if wait:
            self._newest()

    def _newest(self) -> int | None:
        """The step of the newest checkpoint, once it is written."""
        if self.settle is not None:
            self.saved = self.settle()
        return self.saved

    def _kept(self) -> str:
        try:
            newest = self._newest()
        except UserError as error:  # a checkpoint that could not be written: it says which one is left
            return str(error).removesuffix(".")
        return "nothing was saved before" if newest is None else f"the checkpoint of step {newest} is kept"


def save_distance(save_every: int, log_every: int) -> int:
    """Steps between the beginnings of two saves: at most half of `save_every` where that can be logged steps.

    Training goes on while a save is written, until the next one begins: what a kill costs is at most two distances.
    Where one distance is all of `save_every`, training waits for each save.
    """
    return max(1, save_every // 2 // log_every) * log_every


def _tokens(given: Given) -> int:
    """How many tokens a step sees."""
    if isinstance(given, Rows):
        return given.weight.size
    return given["tokens"].size if "tokens" in given else 0


def _row(step: int, tokens: int, window: Metrics | None) -> dict[str, Json]:
    """Plain numbers for one logging interval; `dead_fraction` counts features that fired on none of its tokens."""
    values = {name: metric.value() for name, metric in (window or {}).items()}
    row: dict[str, Json] = {"step": step, "tokens": tokens}
    row |= {name: float(value) for name, value in values.items() if value.ndim == 0}
    if "fired" in values:
        row["dead_fraction"] = float(jnp.mean(values["fired"] == 0))
    return row
