"""The loop: one for every method, on one core or a mesh."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxinterp.data.activations import check_finite, harvest, harvest_jit
from jaxinterp.data.batch import GRADIENT
from jaxinterp.data.windows import batches
from jaxinterp.errors import UserError, suggest
from jaxinterp.methods.base import Method
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import LEAVES, check_site, sites
from jaxinterp.objectives import Metrics
from jaxinterp.storage import Checkpoints
from jaxinterp.training.mesh import check_spread, make_mesh, over_data, place_model, state_shardings
from jaxinterp.training.record import describe, fingerprint
from jaxinterp.training.state import Schedules, TrainState, all_finite, make_step, start_state

Tracker = Callable[[Mapping[str, Any]], None]
"""Called with one row of plain numbers every `log_every` steps."""


@dataclass(frozen=True)
class Fit:
    """What training returns: the decomposition, one row of numbers per logging interval, and the whole last state."""

    decomposition: Any
    history: list[dict[str, Any]]
    state: TrainState


def fit(
    method: Method,
    subject: Subject,
    tokens: grain.MapDataset,
    *,
    site: str,
    steps: int,
    batch_size: int = 2048,
    buffer_batches: int = 8,
    seed: int = 0,
    schedules: Schedules | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    track: Iterable[Tracker] = (),
    log_every: int = 10,
) -> Fit:
    """Train a decomposition of one MLP, or of several at once.

    Args:
      method: hyperparameters of any method.
      subject: the model, frozen.
      tokens: windows from `jaxinterp.data`: a Grain dataset of {"tokens", "weight", "document"}, each `[seq]`.
      site: the MLP leaf, `blocks/3/mlp`; for methods that take several, a glob: `blocks/*/mlp`.
      steps: training steps; each harvests and trains on `batch_size` tokens.
      batch_size: tokens a step, a multiple of the windows' length.
      buffer_batches: size of the shuffle buffer, in batches.
      seed: of the data order, the start values and everything random.
      schedules: functions of the step: "k", the number of active features (at most the method's own), and coefficients
        that terms read by name.
      mesh: from `make_mesh`; default: one device.
      checkpoint: folder for checkpoints; None: none are written.
      save_every: steps between checkpoints, a multiple of `log_every`; None: only the last step is saved.
      resume: continue from the newest checkpoint, bit for bit.
      stop_after: leave (with a checkpoint) after this step, a multiple of `log_every`, as a preempted run would.
      track: called with a row of numbers every `log_every` steps.
    Raises:
      UserError: before any training where a value cannot be; during training where a number is not finite, the last
        checkpoint before being kept.
    """
    mesh = mesh or make_mesh()
    first: Any = tokens[0]
    seq = len(first["tokens"])
    sizes = {"steps": steps, "batch_size": batch_size, "buffer_batches": buffer_batches}
    check_sizes(**sizes, seq=seq, mesh=mesh, save_every=save_every, log_every=log_every, stop_after=stop_after)
    needed = method.needs(expand(subject.model, site))
    for name in needed.names():
        check_site(subject.model, name.removesuffix(GRADIENT))

    data = iter(batches(tokens, batch_size // seq, seed=seed))
    model = place_model(subject.model, mesh)
    recipe = method.recipe(steps)
    step = eqx.filter_jit(make_step(recipe, needed, mesh, schedules), donate="all-except-first")
    start = eqx.filter_jit(lambda model, buffer: start_state(recipe, needed, mesh, model, buffer, seed))

    def next_windows() -> dict[str, Array]:
        return {name: jax.device_put(array, over_data(mesh)) for name, array in next(data).items()}

    def first_state() -> TrainState:
        filled = [harvest_jit(model, next_windows(), needed.names()) for _ in range(buffer_batches)]
        buffer = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *filled)
        check_finite(buffer)
        return start(model, buffer)

    def template() -> Any:
        """The state's shapes and shardings, without computing it."""
        shape = batch_size // seq, seq
        windows = {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "weight": jax.ShapeDtypeStruct(shape, jnp.float32),
        }
        rows = eqx.filter_eval_shape(harvest, model, windows, needed.names())

        def filled(shape: Any) -> Any:
            return jax.ShapeDtypeStruct((shape.shape[0], buffer_batches * seq, *shape.shape[2:]), jnp.float32)

        buffer = jax.tree.map(filled, rows)
        state = eqx.filter_eval_shape(start_state, recipe, needed, mesh, model, buffer, seed)
        return jax.tree.map(
            lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
            state,
            state_shardings(state, mesh),
        )

    run = _Run(step, model, next_windows, min(stop_after or steps, steps), log_every, save_every, tuple(track))
    with jax.set_mesh(mesh):
        if checkpoint is None:
            state = run.from_state(first_state(), lambda state: None, saved=None)
        else:
            config = {
                "method": describe(method),
                **sizes,
                "site": site,
                "seed": seed,
                "seq": seq,
                "schedules": describe(schedules),
                "subject": subject.name,
                "text": fingerprint(tokens),
            }
            with Checkpoints(checkpoint, config, resume=resume) as checkpoints:
                saved = checkpoints.latest
                state = first_state() if saved is None else checkpoints.restore(template(), data)
                state = run.from_state(state, lambda state: checkpoints.save(int(state.step), state, data), saved=saved)
    return Fit(recipe.finish(state.method), run.history, state)


def expand(model: Any, site: str) -> str | tuple[str, ...]:
    """The leaf that a name stands for, or all leaves that a glob matches.

    Raises:
      UserError: there is none.
    """
    if "*" not in site:
        if not check_site(model, site).endswith(LEAVES):
            raise UserError(f"site={site!r} is an array: name the leaf that it belongs to, such as blocks/0/mlp.")
        return site
    found = tuple(name for name in sites(model, site) if name.endswith(LEAVES))
    if not found:
        raise UserError(f"no leaf of the model matches {site!r}.{suggest(site, sites(model))}")
    return found


@dataclass
class _Run:
    """The loop itself."""

    step: Any
    model: Any
    next_windows: Callable[[], dict[str, Array]]
    last: int
    log_every: int
    save_every: int | None
    track: tuple[Tracker, ...]
    history: list[dict[str, Any]] = field(default_factory=list)

    def from_state(self, state: TrainState, save: Callable[[TrainState], None], saved: int | None) -> TrainState:
        """Step until `last`, logging and saving on the way; `saved` is the step of the newest checkpoint."""
        window: Metrics | None = None
        clock = time.perf_counter()
        for done in range(int(state.step) + 1, self.last + 1):
            windows = self.next_windows()
            state, metrics = self.step((self.model, windows), state)
            window = metrics if window is None else jax.tree.map(jnp.add, window, metrics)
            if done % self.log_every and done != self.last:
                continue
            row = _row(done, windows["tokens"].size * done, window)
            if not (np.isfinite(row["loss"]) and bool(all_finite(state.method))):
                kept = "nothing was saved before" if saved is None else f"the checkpoint of step {saved} is kept"
                raise UserError(
                    f"loss={row['loss']:.3g}, numbers are not finite by step {done}: lower the learning rate; {kept}."
                )
            tokens = windows["tokens"].size * ((done - 1) % self.log_every + 1)
            row["tokens_per_second"] = tokens / (time.perf_counter() - clock)
            window, clock = None, time.perf_counter()
            self.history.append(row)
            for tracker in self.track:
                tracker(row)
            if done == self.last or (self.save_every and done % self.save_every == 0):
                save(state)
                saved = done
        return state


def _row(step: int, tokens: int, window: Metrics) -> dict[str, Any]:
    """Plain numbers for one logging interval; `dead_fraction` counts features that fired on none of its tokens."""
    values = {name: metric.value() for name, metric in window.items()}
    row: dict[str, Any] = {"step": step, "tokens": tokens}
    row |= {name: float(value) for name, value in values.items() if value.ndim == 0}
    if "fired" in values:
        row["dead_fraction"] = float(jnp.mean(values["fired"] == 0))
    return row


def check_sizes(
    *,
    steps: int,
    batch_size: int,
    seq: int,
    mesh: Mesh,
    buffer_batches: int = 8,
    save_every: int | None = None,
    log_every: int = 10,
    stop_after: int | None = None,
) -> None:
    """Raises UserError where `fit` could not run with these sizes; `seq` is the windows' length."""
    for name, value in (("steps", steps), ("buffer_batches", buffer_batches), ("log_every", log_every)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if batch_size < seq or batch_size % seq:
        raise UserError(f"batch_size={batch_size} must be a multiple of the windows' length {seq}.")
    check_spread("batch_size", batch_size, batch_size // seq, mesh, "data")
    if save_every is not None and (save_every < 1 or save_every % log_every):
        raise UserError(f"save_every={save_every} must be a multiple of log_every={log_every}.")
    if stop_after is not None and (stop_after < 1 or stop_after % log_every):
        raise UserError(f"stop_after={stop_after} must be a multiple of log_every={log_every}.")
