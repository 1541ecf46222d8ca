"""Compile an experiment's step for devices that need not be here, and say what it would take; or what would fit."""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Method, Recipe
from jaxinterp.data.tokens import TokenCorpus
from jaxinterp.data.windows import batches, windows
from jaxinterp.preflight import chips, compiled, estimate
from jaxinterp.preflight.chips import Chip
from jaxinterp.preflight.estimate import Estimate
from jaxinterp.preflight.gpus import UNTUNED
from jaxinterp.preflight.hlo import Work
from jaxinterp.training.fit import check_sizes, expand
from jaxinterp.training.mesh import make_mesh, model_shardings
from jaxinterp.training.program import Activations, Program


@dataclass(frozen=True)
class Setting:
    """What may be changed to make a run fit: the mesh's axes and the tokens of a step."""

    mesh: Mapping[str, int]
    batch_size: int

    def __str__(self) -> str:
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "data=1"
        return f"--mesh {axes} --batch-size {self.batch_size}"


def preflight(
    method: Method,
    shapes: Callable[[Any], Any],
    site: str,
    target: chips.Target,
    setting: Setting,
    *,
    steps: int,
    seq: int,
    buffer_batches: int = 8,
    activations: Activations = "auto",
    harvest_parts: int = 1,
    expected: int = 0,
) -> Estimate:
    """The estimate of one setting.

    Args:
      shapes: from a function (name, shape) -> sharding to the model of shapes: `model_shapes` with its source.
      expected: temporary bytes that a step will need at least; where these do not fit beside what a device holds
        between steps, nothing is compiled.
    Raises:
      UserError: the sizes do not fit together, or the mesh has more devices than the target.
    """
    axes = dict(setting.mesh)
    mesh = make_mesh(axes["data"], axes["feature"], axes["model"], devices=target.devices)
    sizes = {"batch_size": setting.batch_size, "buffer_batches": buffer_batches, "harvest_parts": harvest_parts}
    check_sizes(steps=steps, **sizes, seq=seq, mesh=mesh)
    model = shapes(model_shardings(mesh))
    needed = method.needs(expand(model, site))
    program = Program(
        one_recipe(method, steps),
        needed,
        mesh,
        setting.batch_size,
        seq,
        buffer_batches,
        seed=0,
        activations=activations,
        harvest_parts=harvest_parts,
    )
    chip = target.chip or Chip("unmeasured", 1.0, _memory(mesh), 1.0, 1.0)
    state = program.abstract_state(model)
    rows = program.abstract_given(model) if program.rows == "kept" else None
    besides = {"temporary, at least": expected} if expected else {}
    held = compiled.Program(compiled.held(model, state, rows) | besides, 0.0, 0.0, Work(), Work())
    found = Estimate(chip, held, mesh.devices.size, setting.batch_size, steps, _pace(seq) * _hosts(mesh))
    if not found.fits:
        return found  # what lies there between steps is too much already
    try:
        platform = _platform(mesh)
        here = mesh.devices.flat[0] in jax.devices()
        lowered = program.lower(model, platform)
        with jax.set_mesh(mesh):
            done = lowered.compile(compiler_options=dict(UNTUNED) if platform == "cuda" and not here else None)
    except jax.errors.JaxRuntimeError as error:
        temporary = overflowing(str(error), found.bytes_needed)
        if temporary is None:
            raise
        memory = held.memory | {"temporary, by the compiler's message": temporary}
        return replace(found, program=replace(held, memory=memory), refused=True)
    read = compiled.read(done, model, state, lambda: _counted(program, shapes), rows)
    if target.chip is None:
        chip = estimate.measured(tuple(mesh.devices.flat), chip.memory, sum(read.memory.values()))
    return replace(found, program=read, chip=chip)


def _counted(program: Program, shapes: Callable[[Any], Any]) -> dict[str, float]:
    """What one device of the mesh computes and accesses, from the same step lowered for a CPU and shared out evenly."""
    alone = make_mesh(1, devices=jax.devices("cpu")[:1])
    cost = replace(program, mesh=alone).lower(shapes(model_shardings(alone)), "cpu").cost_analysis() or {}
    return {name: value / program.mesh.devices.size for name, value in cost.items()}


def one_recipe(method: Method, steps: int) -> Recipe:
    """The recipe of a method's first pass: what an estimate of a step's memory and time is about."""
    recipes = method.recipe(steps)
    return recipes if isinstance(recipes, Recipe) else recipes[0]


def overflowing(message: str, held: int) -> int | None:
    """Temporary bytes that a program would need, of which the compiler says that they are too many; else None.

    The TPU compiler says it in two ways: all that a program uses, or its temporaries alone.
    """
    match = re.search(r"memory space hbm\. Used ([\d.]+)([KMG])|HLO temporaries \(([\d.]+)([KMG])\)", message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    size = int(float(match[1] or match[3]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[match[2] or match[4]])
    return max(0, size - held) if match[1] else size


def _platform(mesh: Mesh) -> str:
    """What JAX lowers for."""
    name = mesh.devices.flat[0].platform
    return "cuda" if name == "gpu" else name


def _hosts(mesh: Mesh) -> int:
    """How many processes feed the mesh."""
    return len({device.process_index for device in mesh.devices.flat})


@cache
def _pace(seq: int) -> float:
    """Tokens that a host's pipeline gives in a second, from text in memory, on this machine."""
    rows, of_document = max(1, min(256, 2**16 // seq)), 1024
    starts = np.arange(0, 2 * rows * seq + of_document, of_document)
    lengths = np.full_like(starts, of_document)
    text = np.zeros(len(starts) * of_document, np.int32)
    corpus = TokenCorpus("none", text, starts, lengths, starts.astype(np.uint64), frozenset(), None)
    data = iter(batches(windows(corpus, seq), rows, seed=0))
    next(data)
    started = time.perf_counter()
    taken = sum(1 for _ in zip(range(8), data, strict=False))
    return taken * rows * seq / (time.perf_counter() - started)


def _memory(mesh: Mesh) -> int:
    """What a present device has; of virtual ones, each a share of the machine's."""
    known = mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" in known:
        return int(known["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.devices.size


def announce(
    method: Method,
    shapes: Callable[[Any], Any],
    site: str,
    *,
    target: chips.Target,
    setting: Setting,
    steps: int,
    seq: int,
    activations: Activations = "auto",
    harvest_parts: int = 1,
) -> int:
    """Print the estimate of a setting, and the nearest setting that fits where it does not; 0 if it fits, else 1.

    Raises:
      UserError: as `preflight`.
    """

    def attempt(setting: Setting, expected: int = 0) -> Estimate:
        return preflight(
            method,
            shapes,
            site,
            target,
            setting,
            steps=steps,
            seq=seq,
            activations=activations,
            harvest_parts=harvest_parts,
            expected=expected,
        )

    found = attempt(setting)
    print(f"preflight on {target.text} ({found.devices} of {len(target.devices)} devices), {setting}")
    print("\n".join(found.lines()))
    if found.fits:
        return 0
    better = nearest(attempt, setting, len(target.devices), seq, found.temporary)
    if better is None:
        print("no neighbouring setting fits: take more devices, or a smaller dictionary.")
        return 1
    print(f"\nthe nearest setting that fits: {better[0]}")
    print("\n".join(better[1].lines()))
    return 1


def nearest(
    attempt: Callable[[Setting, int], Estimate], setting: Setting, devices: int, seq: int, temporary: int = 0
) -> tuple[Setting, Estimate] | None:
    """The first neighbour of a setting that fits.

    A compilation takes minutes. From one that did not fit it is taken how much the next must need at least: half of its
    temporary bytes per token of a device, as another mesh may spread some of it further.

    Args:
      attempt: from a setting and the temporary bytes expected to its estimate.
      temporary: of the setting itself, where it was compiled.
    """
    least = temporary / 2 / share_of(setting)
    for neighbour in neighbours(setting, devices, seq):
        try:
            found = attempt(neighbour, int(least * share_of(neighbour)))
        except UserError:  # sizes that do not divide
            continue
        if found.fits:
            return neighbour, found
        least = max(least, found.temporary / 2 / share_of(neighbour))
    return None


def share_of(setting: Setting) -> float:
    """Tokens of a step for every device: what temporary memory shrinks with at best."""
    mesh = setting.mesh
    return setting.batch_size / (mesh["data"] * mesh["feature"] * mesh["model"])


def neighbours(setting: Setting, devices: int, seq: int) -> Iterator[Setting]:
    """Settings with more of `feature`, then of `model`, on as many devices, then on all; then with smaller batches."""
    mesh = dict(setting.mesh)
    count = mesh["data"] * mesh["feature"] * mesh["model"]
    shapes = []
    for total in dict.fromkeys((count, devices)):
        of_total = [
            {"data": total // (feature * model), "feature": feature, "model": model}
            for model in _powers(mesh["model"], total)
            for feature in _powers(mesh["feature"], total // model)
            if total % (feature * model) == 0
        ]
        shapes += sorted(of_total, key=lambda shape: shape["feature"] * shape["model"])
    batch = setting.batch_size
    while batch >= seq:
        yield from (
            replace(setting, mesh=s, batch_size=batch) for s in shapes if (s, batch) != (mesh, setting.batch_size)
        )
        batch //= 2


def _powers(start: int, stop: int) -> list[int]:
    found = [start]
    while found[-1] * 2 <= stop:
        found.append(found[-1] * 2)
    return found
