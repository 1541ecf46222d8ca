"""`fit`: one for every method, on one core or a mesh."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.protocols import Method, Recipe
from jaxinterp.core.sites import GRADIENT, Needs, as_needs
from jaxinterp.data.activations import WINDOW
from jaxinterp.data.windows import fingerprint, some_places
from jaxinterp.models.dialects import understood
from jaxinterp.models.ids import check_rows, token_rows
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import LEAVES, PROJECTIONS, check_site, sites
from jaxinterp.training.hosts import check_agreement
from jaxinterp.training.loop import Tracker
from jaxinterp.training.memory import memory_needed, said
from jaxinterp.training.mesh import check_spread, make_mesh, place_model
from jaxinterp.training.passes import Passes, Text
from jaxinterp.training.program import Activations, Program, kept_in
from jaxinterp.training.progress import progress_of
from jaxinterp.training.record import brings_code, describe
from jaxinterp.training.state import Schedules, TrainState


@dataclass(frozen=True, repr=False)
class Fit:
    """What training returns: the decomposition, one row of numbers per logging interval, and the whole last state.

    A resumed run has the rows of its earlier parts too, also where it was finished already.

    Example:
      >>> method, steps = Transcoder(features=64, k=4), {"steps": 4, "batch_size": 256, "progress": False}
      >>> result = fit(method, subject, train, site="blocks/1/mlp", **steps)
      >>> result.decomposition.features, "fvu" in result.history[-1]
      (64, True)
    """

    decomposition: PyTree
    history: list[dict[str, Json]]
    state: TrainState

    def __repr__(self) -> str:
        """One line: `Fit(Dictionary, 44 rows, step 440: fvu 0.173)`."""
        last = self.history[-1] if self.history else {}
        numbers = ", ".join(f"{name} {last[name]:.3g}" for name in ("fvu", "loss", "l0") if name in last)
        step = f", step {last['step']}: {numbers}" if last else ""
        return f"Fit({type(self.decomposition).__name__}, {len(self.history)} rows{step})"


@ordinary()
def fit(
    method: Method,
    subject: Subject,
    tokens: grain.MapDataset | None = None,
    *,
    site: str | None = None,
    steps: int | None = None,
    rows: int | None = None,
    batch_size: int = 2048,
    buffer_batches: int = 8,
    seed: int = 0,
    shuffle_within: int | None = None,
    schedules: Schedules | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    track: Iterable[Tracker] = (),
    progress: bool = True,
    log_every: int = 10,
    spike: float | None = 100.0,
    on_failed_save: Literal["stop", "continue"] = "stop",
    activations: Activations = "auto",
    harvest_parts: int = 1,
) -> Fit:
    """Train a decomposition of one MLP, or of several at once.

    Args:
      method: hyperparameters of any method.
      subject: the model, frozen.
      tokens: windows from `jaxinterp.data`: a Grain dataset of {"tokens", "weight", "document"}, each `[seq]`; with
        activations in them (`cached_windows`) the subject is not run. None: for methods that read the weights alone.
      site: the leaf, `blocks/3/mlp`; for autoencoders also any array, `blocks/3/resid/post`; for methods that take
        several, a glob: `blocks/*/mlp`; None for methods that read no array of the subject.
      steps: training steps; each harvests and trains on `batch_size` tokens, or is one sweep over all kept rows. A
        method of several passes takes so many in each. None: for methods that compute their answer at once.
      rows: how many tokens are kept, for methods that sweep over the same rows again and again (`Needs(rows="kept")`);
        rounded up to whole batches. They are harvested once; no text is read afterwards.
      batch_size: tokens a step, a multiple of the windows' length.
      buffer_batches: size of the shuffle buffer, in batches.
      seed: of the data order, the start values and everything random.
      shuffle_within: shuffle windows within stretches of so many only, for text that lies on a slow disk.
      schedules: functions of the step: "k", the number of active features (at most the method's own), and coefficients
        that terms read by name.
      mesh: from `make_mesh`; default: one device.
      checkpoint: folder for checkpoints; None: none are written. Each of several passes has a folder in it.
      save_every: the newest written checkpoint is never more steps old than this (unless a save fails and the run
        continues), a multiple of `log_every`; None: only the last step is saved.
      resume: continue from the newest checkpoint that is whole: bit for bit on the same mesh; on another mesh or number
        of processes with the same data order, and sums that round otherwise.
      stop_after: leave (with a checkpoint) after this step, a multiple of `log_every`, as a preempted run would.
      track: called with a row of numbers every `log_every` steps, in the first process.
      progress: say how much memory the run needs at least, and show how far it is: a bar on a terminal, elsewhere a
        line every ten seconds.
      spike: a loss so many times the size of the usual one above it ends the run; None: any finite loss is good.
      on_failed_save: what a full disk does: "stop" the run, or "continue" it with a warning; several processes stop
        where one of them cannot save.
      activations: what activations are kept and multiplied in, with float32 sums; "auto": bfloat16 on accelerators,
        float32 on a CPU.
      harvest_parts: forward passes that a batch is cut into, one after another, to save memory.
    Raises:
      UserError: before any training if a value is invalid, or if the processes of one run were given different
        ones; during training where a number is not finite or the loss leaps: the last checkpoint before is kept, and
        the text of the last steps lies beside the checkpoints.
      Preempted: SIGTERM came; it says whether the state is saved. Resumed between two logged steps, the next row of
        numbers is about the steps after that; the state is exact.

    Example:
      >>> method, steps = Transcoder(features=64, k=4), {"steps": 4, "batch_size": 256, "progress": False}
      >>> result = fit(method, subject, train, site="blocks/1/mlp", **steps)
    """
    mesh = mesh or make_mesh()
    needed = as_needs(method.needs(None if site is None else expand(subject.model, site)))
    for name in needed.names():
        check_site(subject.model, name.removesuffix(GRADIENT))
    recipes = _passes(method, steps)
    check_kept(needed, rows, tokens is not None)
    first: dict[str, np.ndarray] = {} if tokens is None else tokens[0]  # type: ignore[assignment]
    seq = len(first["tokens"]) if first else 1
    sizes = {
        "steps": steps or 0,
        "batch_size": seq * mesh.shape["data"] if tokens is None else batch_size,
        "buffer_batches": buffer_batches if rows is None else -(-rows // batch_size),
    }
    rhythm: dict[str, PyTree] = {"log_every": log_every, "save_every": save_every, "stop_after": stop_after}
    check_sizes(
        **sizes | {"steps": 1 if steps is None else steps},
        **rhythm,
        seq=seq,
        mesh=mesh,
        harvest_parts=harvest_parts,
        spike=spike,
    )
    check_word("on_failed_save", on_failed_save, ("stop", "continue"))
    check_word("activations", activations, get_args(Activations))
    if resume and checkpoint is None:
        raise UserError("resume=True needs the folder of the checkpoints: give checkpoint=.")

    order: dict[str, Json] = {"seed": seed, "shuffle_within": shuffle_within}
    config = {
        "method": describe(method),
        **sizes,
        "site": site,
        **order,
        "seq": seq,
        "schedules": describe(schedules),
        "subject": subject.name,
        "text": None if tokens is None else fingerprint(tokens),
        "activations": kept_in(activations, mesh.devices.flat[0].platform),
    } | ({} if rows is None else {"rows": rows})
    if jax.process_count() > 1:
        others = {"resume": resume, "mesh": dict(mesh.shape), "harvest_parts": harvest_parts, "spike": spike}
        check_agreement(config | rhythm | others)
    ids = token_rows(subject.model)
    if tokens is not None:
        _check_tokens(tokens, ids, sizes["batch_size"], seq)

    lasts = [0 if recipe.step is None else recipe.steps or steps or 0 for recipe in recipes]
    shown = progress_of(sum(lasts), shown=progress and jax.process_index() == 0)
    program = Program(
        recipes[0],
        needed,
        mesh,
        sizes["batch_size"],
        seq,
        sizes["buffer_batches"],
        seed,
        schedules,
        activations,
        harvest_parts,
        {name: (array.shape, array.dtype) for name, array in first.items() if name not in WINDOW},
    )
    model = place_model(subject.model, mesh)
    if progress and jax.process_index() == 0 and recipes[0].step is not None and recipes[0].init_on == "device":
        print(said(memory_needed(program, model)), flush=True)
    passes = Passes(
        program,
        model,
        Text(tokens, ids, sizes["batch_size"], seq, order, mesh),
        None if checkpoint is None else Path(checkpoint),
        config,
        checked_first=brings_code(method),
        **rhythm,
        resume=resume,
        spike=spike,
        on_failed_save=on_failed_save,
        track=(*track, shown) if jax.process_index() == 0 else (),
    )
    with jax.set_mesh(mesh), shown, passes.preemption:  # from here on SIGTERM saves, also before the first step
        answer, state = passes.run(recipes, lasts)
    return Fit(answer, passes.history, state)


def _check_tokens(tokens: grain.MapDataset, ids: int | None, batch_size: int, seq: int) -> None:
    """Raises UserError if a token is not one of the model's, at some places of the text, or the text is too short."""
    for place in some_places(len(tokens)):
        window: dict[str, np.ndarray] = tokens[place]  # type: ignore[assignment]
        check_rows(ids, window["tokens"], f"text, window {place}")
    check_text(len(tokens), batch_size, seq)


def _passes(method: Method, steps: int | None) -> tuple[Recipe, ...]:
    """The method's recipes.

    Raises:
      UserError: `steps` is missing, and there is something to step.
    """
    recipes = method.recipe(1 if steps is None else steps)
    recipes = (recipes,) if isinstance(recipes, Recipe) else recipes
    for recipe in recipes:
        if recipe.step is not None and recipe.steps is None and steps is None:
            raise UserError(f"steps=None: {type(method).__name__} is trained step by step: say in how many steps.")
    return recipes


def check_kept(needed: Needs, rows: int | None, text: bool) -> None:
    """Raises UserError if rows or text are missing, or given to a method that takes none."""
    if needed.rows == "kept" and rows is None:
        raise UserError("rows=None: this method sweeps over kept rows: say how many, such as rows=100_000.")
    if needed.rows != "kept" and rows is not None:
        raise UserError(f"rows={rows}: this method keeps no rows: leave it out.")
    if rows is not None and rows < 1:
        raise UserError(f"rows={rows} must be at least 1.")
    if not text and (needed.rows != "none" or needed.windows):
        raise UserError("tokens=None: this method reads text: give windows, as from load_text(...).")


def expand(model: PyTree, site: str) -> str | tuple[str, ...]:
    """The leaf or array of this name; or all leaves that a glob matches, all arrays where it matches no leaf.

    Raises:
      UserError: there is none, or it is a projection.
    """
    site = understood(model, site, sites(model))
    if "*" not in site:
        if check_site(model, site).endswith(PROJECTIONS):
            leaf = site.rpartition("/")[0]
            raise UserError(f"site={site!r} is a linear map: name its leaf {leaf!r}, or an array.")
        return site
    matching = [name for name in sites(model, site) if not name.endswith(PROJECTIONS)]
    found = tuple(name for name in matching if name.endswith(LEAVES)) or tuple(matching)
    if not found:
        raise UserError(f"no site of the model matches {site!r}.{suggest(site, sites(model))}")
    return found


def check_word(name: str, value: str, known: Sequence[str]) -> None:
    """Raises UserError if an option is none of the words that it may be."""
    if value not in known:
        raise UserError(f"{name}={value!r} must be one of {', '.join(known)}.{suggest(value, known)}")


def check_text(windows: int, batch_size: int, seq: int) -> None:
    """Warn where one step takes more than the whole text: it would see rows twice."""
    if batch_size > windows * seq:
        warnings.warn(
            f"batch_size={batch_size:,} tokens are more than the text has ({windows:,} windows of {seq}: "
            f"{windows * seq:,} tokens), so that a step sees rows more than once: take a smaller batch_size, or more "
            "text.",
            stacklevel=3,
        )


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
    harvest_parts: int = 1,
    spike: float | None = None,
) -> None:
    """Raises UserError if `fit` could not run with these sizes; `seq` is the windows' length."""
    at_least_one = {"steps": steps, "buffer_batches": buffer_batches, "log_every": log_every}
    for name, value in (at_least_one | {"harvest_parts": harvest_parts}).items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if batch_size < seq or batch_size % seq:
        raise UserError(f"batch_size={batch_size} must be a multiple of the windows' length {seq}.")
    check_spread("batch_size", batch_size, batch_size // seq, mesh, "data")
    if batch_size // seq % (harvest_parts * mesh.shape["data"]):
        raise UserError(
            f"harvest_parts={harvest_parts} cannot cut the {batch_size // seq} windows of a batch on data="
            f"{mesh.shape['data']} evenly: take a divisor of {batch_size // seq // mesh.shape['data']}."
        )
    if save_every is not None and (save_every < 1 or save_every % log_every):
        raise UserError(f"save_every={save_every} must be a multiple of log_every={log_every}.")
    if spike is not None and spike <= 1:
        raise UserError(f"spike={spike} must be above 1 (times the usual loss), or None.")
    if stop_after is not None and (stop_after < 1 or stop_after % log_every):
        raise UserError(f"stop_after={stop_after} must be a multiple of log_every={log_every}.")
