"""The loop: one for every method, on one core or a mesh."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxinterp.data.activations import check_finite, harvest
from jaxinterp.data.windows import batches
from jaxinterp.errors import UserError
from jaxinterp.methods.base import Method
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import check_site
from jaxinterp.objectives import Metrics
from jaxinterp.storage import Checkpoints
from jaxinterp.training.mesh import check_spread, make_mesh, over_data, replicated, state_shardings
from jaxinterp.training.state import TrainState, make_step, start_state

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
    k: Callable[[Array], Array] | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    track: Iterable[Tracker] = (),
    log_every: int = 10,
) -> Fit:
    """Train a decomposition of one MLP.

    Args:
      method: hyperparameters of any method.
      subject: the model, frozen.
      tokens: windows from `jaxinterp.data`: a Grain dataset of {"tokens", "weight"}, each `[seq]`.
      site: the MLP leaf, `blocks/3/mlp`.
      steps: training steps; each harvests and trains on `batch_size` tokens.
      batch_size: tokens a step, a multiple of the windows' length.
      buffer_batches: size of the shuffle buffer, in batches.
      seed: of the data order, the start values and everything random.
      k: a schedule for the number of active features, at most the method's own k.
      mesh: from `make_mesh`; default: one device.
      checkpoint: folder for checkpoints; None: none are written.
      save_every: steps between checkpoints, a multiple of `log_every`; None: only the last step is saved.
      resume: continue from the newest checkpoint, bit for bit.
      stop_after: leave (with a checkpoint) after this step, as a preempted run would.
      track: called with a row of numbers every `log_every` steps.
    Raises:
      UserError: before any training where a value cannot be; during training where a loss is not finite.
    """
    mesh = mesh or make_mesh()
    sites = method.needs(site)
    for name in (site, *sites.names()):
        check_site(subject.model, name)
    seq = len(tokens[0]["tokens"])
    check_sizes(
        steps=steps,
        batch_size=batch_size,
        seq=seq,
        mesh=mesh,
        buffer_batches=buffer_batches,
        save_every=save_every,
        log_every=log_every,
    )

    data = iter(batches(tokens, batch_size // seq, seed=seed))
    model = jax.device_put(subject.model, replicated(mesh))
    recipe = method.recipe(steps)
    step = eqx.filter_jit(make_step(recipe, sites, mesh, k), donate="all-except-first")

    def next_windows() -> dict[str, Array]:
        windows = next(data)
        return {name: jax.device_put(windows[name], over_data(mesh)) for name in ("tokens", "weight")}

    def first_state() -> TrainState:
        collect = eqx.filter_jit(lambda model, windows: harvest(model, windows, sites.names()))
        filled = [collect(model, next_windows()) for _ in range(buffer_batches)]
        buffer = jax.tree.map(lambda *parts: jnp.concatenate(parts), *filled)
        check_finite(buffer)
        state = eqx.filter_jit(start_state)(recipe, sites, buffer, seed)
        return jax.device_put(state, state_shardings(state, mesh))

    config = {
        "method": type(method).__name__,
        **_plain(method),
        "site": site,
        "steps": steps,
        "batch_size": batch_size,
        "buffer_batches": buffer_batches,
        "seed": seed,
        "seq": seq,
        "windows": len(tokens),
        "subject": subject.name,
    }
    history: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        if checkpoint is None:
            state = first_state()
            state = _loop(step, model, state, next_windows, stop_after or steps, log_every, None, None, track, history)
        else:
            with Checkpoints(checkpoint, config, resume=resume) as checkpoints:
                if checkpoints.latest is None:
                    state = first_state()
                else:
                    state = checkpoints.restore(
                        _template(recipe, sites, model, mesh, buffer_batches, batch_size, seed, seq), data
                    )

                def save(state: TrainState) -> None:
                    checkpoints.save(int(state.step), state, data)

                state = _loop(
                    step, model, state, next_windows, stop_after or steps, log_every, save_every, save, track, history
                )
    return Fit(recipe.finish(state.method), history, state)


def _template(
    recipe: Any, sites: Any, model: Any, mesh: Mesh, buffer_batches: int, batch_size: int, seed: int, seq: int
) -> Any:
    """The state's shapes and shardings, without computing it."""

    def build(model: Any) -> TrainState:
        rows = buffer_batches * batch_size
        windows = {"tokens": jnp.zeros((rows // seq, seq), jnp.int32), "weight": jnp.zeros((rows // seq, seq))}
        return start_state(recipe, sites, harvest(model, windows, sites.names()), seed)

    shapes = eqx.filter_eval_shape(build, model)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def _loop(
    step: Any,
    model: Any,
    state: TrainState,
    next_windows: Callable[[], dict[str, Array]],
    last: int,
    log_every: int,
    save_every: int | None,
    save: Callable[[TrainState], None] | None,
    track: Iterable[Tracker],
    history: list[dict[str, Any]],
) -> TrainState:
    """Step until `last`; log and save on the way."""
    window: Metrics | None = None
    clock, first, since = time.perf_counter(), int(state.step), int(state.step)
    for index in range(first, last):
        windows = next_windows()
        state, metrics = step((model, windows), state)
        window = metrics if window is None else jax.tree.map(jnp.add, window, metrics)
        done = index + 1
        if done % log_every == 0 or done == last:
            row = _row(done, windows["tokens"].size * done, window)
            elapsed, clock = time.perf_counter() - clock, time.perf_counter()
            row["tokens_per_second"] = windows["tokens"].size * (done - since) / elapsed
            window, since = None, done
            if not np.isfinite(row["loss"]):
                raise UserError(
                    f"loss={row['loss']} at step {done}: lower the learning rate; the last checkpoint is kept."
                )
            history.append(row)
            for tracker in track:
                tracker(row)
        if save is not None and (done == last or (save_every and done % save_every == 0)):
            save(state)
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


def _plain(method: Any) -> dict[str, Any]:
    """A method's hyperparameters as JSON values; a function by its name."""
    fields = asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    return {name: getattr(value, "__qualname__", value) for name, value in fields.items()}
