"""Compile an experiment's step for devices that need not be here, and say what it would take; or what would fit."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from jaxinterp.errors import UserError
from jaxinterp.methods.base import Method
from jaxinterp.preflight import chips, compiled, estimate
from jaxinterp.preflight.estimate import Estimate
from jaxinterp.training.fit import check_sizes, expand
from jaxinterp.training.mesh import make_mesh, model_shardings
from jaxinterp.training.program import Program


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
) -> Estimate:
    """The estimate of one setting.

    Args:
      shapes: from a function (name, shape) -> sharding to the model of shapes: `model_shapes` with its source.
    Raises:
      UserError: the sizes do not fit together, or the mesh has more devices than the target.
    """
    axes = dict(setting.mesh)
    mesh = make_mesh(axes["data"], axes["feature"], axes["model"], devices=target.devices)
    check_sizes(steps=steps, batch_size=setting.batch_size, seq=seq, mesh=mesh, buffer_batches=buffer_batches)
    model = shapes(model_shardings(mesh))
    needed = method.needs(expand(model, site))
    program = Program(method.recipe(steps), needed, mesh, setting.batch_size, seq, buffer_batches, seed=0)
    platform = target.devices[0].platform
    done = program.compile(model, platform)
    chip = target.chip or estimate.measured(tuple(mesh.devices.flat), _memory(mesh))
    numbers = compiled.read(done, model, program.abstract_state(model))
    return Estimate(chip, numbers, mesh.devices.size, setting.batch_size, steps)


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
) -> int:
    """Print the estimate of a setting, and the nearest setting that fits where it does not; 0 if it fits, else 1.

    Raises:
      UserError: as `preflight`.
    """

    def attempt(setting: Setting) -> Estimate:
        return preflight(method, shapes, site, target, setting, steps=steps, seq=seq)

    found = attempt(setting)
    print(f"preflight on {target.text} ({found.devices} of {len(target.devices)} devices), {setting}")
    print("\n".join(found.lines()))
    if found.fits:
        return 0
    better = nearest(attempt, setting, len(target.devices), seq)
    if better is None:
        print("no neighbouring setting fits: take more devices, or a smaller dictionary.")
        return 1
    print(f"\nthe nearest setting that fits: {better[0]}")
    print("\n".join(better[1].lines()))
    return 1


def nearest(
    attempt: Callable[[Setting], Estimate], setting: Setting, devices: int, seq: int
) -> tuple[Setting, Estimate] | None:
    """The first neighbour of a setting that fits: more of `feature`, then of `model`, then smaller batches."""
    for neighbour in neighbours(setting, devices, seq):
        try:
            found = attempt(neighbour)
        except UserError:  # sizes that do not divide
            continue
        if found.fits:
            return neighbour, found
    return None


def neighbours(setting: Setting, devices: int, seq: int) -> Iterator[Setting]:
    """Settings of as many devices, the least changed first; then of all devices; then with smaller batches."""
    mesh = dict(setting.mesh)
    count = mesh["data"] * mesh["feature"] * mesh["model"]
    for total in dict.fromkeys((count, devices)):
        shapes = [
            {"data": total // (feature * model), "feature": feature, "model": model}
            for model in _powers(mesh["model"], total)
            for feature in _powers(mesh["feature"], total // model)
            if total % (feature * model) == 0
        ]
        for shape in sorted(shapes, key=lambda shape: shape["feature"] * shape["model"]):
            if shape != mesh:
                yield replace(setting, mesh=shape)
    batch = setting.batch_size // 2
    while batch >= seq * mesh["data"]:
        yield replace(setting, batch_size=batch)
        batch //= 2


def _powers(start: int, stop: int) -> list[int]:
    found = [start]
    while found[-1] * 2 <= stop:
        found.append(found[-1] * 2)
    return found
