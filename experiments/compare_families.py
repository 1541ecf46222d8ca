"""Every way to take one MLP apart, in one table: at equal parameters, equal active components, equal active numbers.

    python -m experiments.compare_families --quick --out runs/families
    python -m experiments.compare_families --out runs/families_full          (three k; the chart has curves)

Rows: the MLP's own neurons, principal components, TopK autoencoder, skip transcoder, semi-NMF, hidden experts with a
low-rank and a full router, directions of the local interaction basis, components of its matrices (SPD of the MLP's
output), mixtures of decoders and of linear transforms, product-key neurons, linear and GELU, and a mixture of factor
analysers. All are seen at the MLP's output, on the same held-out tokens: what factors the hidden activations or the
input goes through the rest of the MLP. What reads the hidden activations or the output (column "reads") has less to
compute than what reads the input.

Activations are harvested once and trained on by all, several times over where `tokens` are more than `harvested`. Rows
are written to OUT/rows as they come; a run that is stopped (--most-seconds stops it by itself) continues with --resume
after its last row.

    parameters          trained numbers; neurons: the MLP's
    active              components a token uses, shared neurons among them
    active parameters   numbers of these components, and of what every token uses (skip path, shared neurons)
    bits                of a token's codes at 1 % of the variance (evaluation.description_length)
    falls               by what share the loss fell within the last fifth of the steps

A row whose loss still falls by more than 2 % is marked "undertrained", one whose number of active components is more
than a tenth off is marked "other L0", one without a free size "reference": none of these is ranked.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.every_family import Family, Shape, families, uses
from experiments.families_page import COLUMNS, answers, marked, write_families
from jaxinterp.commands.on_text import OnText, Prepared, prepared
from jaxinterp.commands.shell import (
    check_distinct,
    command,
    folder_of_a_run,
    measured_on,
    print_table,
    read_json,
    say,
    write_json,
)
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.activation_cache import cache_activations, cached_windows
from jaxinterp.decompositions.at_output import AtOutput
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.description_length import description_length
from jaxinterp.evaluation.effects import Row
from jaxinterp.evaluation.held import Held, hold, score_held
from jaxinterp.models.mlp import MLP
from jaxinterp.models.sites import select
from jaxinterp.training.fit import fit

FREE = ("neurons", "principal components")
DEFAULT = (
    "neurons", "principal components", "TopK autoencoder", "skip transcoder", "semi-NMF", "experts, low-rank router",
    "experts, full router", "interaction basis", "parameter components", "mixture of decoders", "linear transforms",
    "product-key neurons", "product-key GELU neurons", "factor analysers",
)  # fmt: skip


class Plan(NamedTuple):
    """The sizes of a table."""

    features: int
    ks: tuple[int, ...]
    tokens: int
    batch_size: int
    heldout_tokens: int
    ce_tokens: int
    harvested: int


FULL = Plan(1152, (8, 32, 128), 614_400, 512, 16_384, 4_096, 204_800)
QUICK = FULL._replace(ks=(32,))


@dataclass(frozen=True)
class Config(OnText):
    """Where a size is None, it is that of the plan."""

    quick: bool = False
    """One k in place of three: 16 minutes on two cores."""
    features: int | None = None  # type: ignore[assignment]
    """Of the autoencoder, whose parameters the others match."""
    ks: tuple[int, ...] | None = None
    """Active components per token."""
    tokens: int | None = None  # type: ignore[assignment]
    batch_size: int | None = None  # type: ignore[assignment]
    heldout_tokens: int | None = None  # type: ignore[assignment]
    ce_tokens: int | None = None  # type: ignore[assignment]
    harvested: int | None = None
    """Different tokens that are harvested; training passes over them until it has seen `tokens`."""
    families: tuple[str, ...] = DEFAULT
    """Which families."""
    most_seconds: float | None = None
    """Stop after the row within which so many seconds have passed; continue with --resume."""


def main(config: Config) -> None:
    """Harvest once; then a row at a time, the page after each."""
    clock = time.perf_counter()
    config, sizes = sized(config)
    ready = prepared(config)
    mlp = select(ready.subject.model, config.site).get()
    if not isinstance(mlp, MLP):
        raise UserError(f"site={config.site!r} is a {type(mlp).__name__}: name an MLP of a model that `load` returns.")
    plan = planned(config, sizes, mlp)
    with folder_of_a_run(ready.out, ready.record) as out:
        rows = [read_json(path) for path in sorted(out.glob("rows/*.json"))]
        missing = {name: made for name, made in plan.items() if name not in {row["method"] for row in rows}}
        if missing:
            rows += compute(config, sizes, ready, missing, len(rows), clock, out)
    left = len(plan) - len(rows)
    print_table(COLUMNS, marked(rows))
    say(measured_on(rows), *(sentences := answers(rows, sizes.ks)))
    page = write_families(
        ready.out / "report.html",
        rows,
        sentences,
        title=f"{config.model}: {config.site}, every family",
        subtitle=f"{len(rows)} rows; sizes are free where a family allows it, and match {sizes.features:,} features",
        facts=ready.facts,
    )
    say(f"{time.perf_counter() - clock:.0f} s. Page: {page}")
    if left:
        say(f"{left} of {len(plan)} rows are missing: continue with --resume.")


def sized(config: Config) -> tuple[Config, Plan]:
    """The configuration with the plan's sizes where none was asked for, and the sizes.

    Raises:
      UserError: a family or a k is named twice, or no k is given.
    """
    plan = QUICK if config.quick else FULL
    asked = {name: getattr(config, name) for name in Plan._fields}
    plan = plan._replace(**{name: value for name, value in asked.items() if value is not None})
    check_distinct("families", config.families)
    check_distinct("ks", plan.ks)
    if not plan.ks:
        raise UserError("ks is empty: give at least one number of active components.")
    return replace(config, **plan._asdict()), plan


def planned(config: Config, sizes: Plan, mlp: MLP) -> dict[str, tuple[str, int, Family | None]]:
    """(family, k, how) for every row, by its name; how is None for what needs no training."""
    d, neurons = mlp.up_proj.weight.shape
    shape = Shape(d, neurons, len(mlp.projections()))
    found: dict[str, tuple[str, int, Family | None]] = {}
    for k in sizes.ks:
        known: dict[str, Family | None] = dict.fromkeys(FREE)
        known |= families(
            config.site, shape, features=sizes.features, k=k, rate=config.learning_rate, tokens=sizes.tokens,
            batch_size=sizes.batch_size,
        )  # fmt: skip
        for name in config.families:
            if name not in known:
                raise UserError(f"families: {name!r} must be one of {', '.join(known)}.{suggest(name, known)}")
            found[name if len(sizes.ks) == 1 else f"{name}, k {k}"] = (name, k, known[name])
    return found


def compute(
    config: Config,
    sizes: Plan,
    ready: Prepared,
    missing: Mapping[str, tuple[str, int, Family | None]],
    before: int,
    clock: float,
    out: Path,
) -> list[Row]:
    """The rows that are not there, each written as it comes."""
    names = tuple(f"{config.site}/{port}" for port in ("in", "hidden", "out"))
    count = min(len(ready.train), -(-min(sizes.tokens, sizes.harvested) // config.seq))
    say(f"harvesting {count * config.seq:,} tokens once ...")
    cache_activations(ready.subject, ready.train[:count], names, out / "activations", dtype="bfloat16")
    windows = cached_windows(out / "activations")
    free, mean = solved(config, sizes, ready, missing, out / "mean.npy")
    held = hold(
        ready.subject, ready.heldout, config.site, mean,
        tokens=sizes.heldout_tokens, ce_tokens=sizes.ce_tokens, seed=config.seed,
    )  # fmt: skip
    say(f"{time.perf_counter() - clock:.0f} s so far")
    rows: list[Row] = []
    for name, (family, k, how) in missing.items():
        began, cpu = time.perf_counter(), time.process_time()
        if how is None:
            found, trained = free[k]["neurons" if family == "neurons" else "pca"], dict[str, Any](solved=True)
        else:
            found, trained = learned(config, ready, windows, how, mean)
        trained |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        row = scored(name, found, held) | trained
        row |= {"family": family, "k": k, "sized": how is not None and how.sized}
        write_json(out / "rows" / f"{before + len(rows):03d}.json", row)
        rows.append(row)
        say(
            f"{name}: FVU {row['fvu']:.3f}, CE {row['ce_replaced']:.3f}, {row['active']:.1f} active, "
            f"{row['bits']:.0f} bits, {row['seconds']:.0f} s"
        )
        if config.most_seconds is not None and time.perf_counter() - clock > config.most_seconds:
            break
    return rows


def solved(
    config: Config, sizes: Plan, ready: Prepared, missing: Mapping[str, tuple[str, int, Family | None]], kept: Path
) -> tuple[dict[int, dict[str, Any]], Array]:
    """What needs no training, by k, and the output's mean, which is kept for a resumption that needs nothing else."""
    if kept.is_file() and all(how is not None for _, _, how in missing.values()):
        return {}, jnp.asarray(np.load(kept, allow_pickle=False))
    options = {"tokens": min(sizes.tokens, 16_384), "seed": config.seed, "features": max(sizes.ks)}
    free = {k: baselines(ready.subject, ready.train, config.site, k=k, **options) for k in sizes.ks}
    mean = next(iter(free.values()))["neurons"].target_mean
    np.save(kept, np.asarray(mean))
    return free, mean


def learned(config: Config, ready: Prepared, windows: Any, how: Family, mean: Any) -> tuple[Any, dict[str, Any]]:
    """A decomposition of the output, and how it was trained."""
    result = fit(
        how.method,
        ready.subject,
        windows,
        site=config.site,
        steps=how.steps,
        rows=how.rows,
        batch_size=how.batch_size,
        seed=config.seed,
        log_every=max(1, min(10, how.steps // 10)),
    )
    seen = how.rows or how.steps * how.batch_size
    different = min(seen, len(windows) * config.seq)
    trained: dict[str, Any] = {
        "different_tokens": different,
        "steps": int(result.state.step),
        "train_tokens": seen,
        "solved": how.solved,
    }
    if not how.solved:
        losses = [float(row["loss"]) for row in result.history]
        trained |= {"falls": falls(losses), "losses": losses}
    return how.place(result.decomposition, ready.subject.model, mean), trained


def falls(losses: Sequence[float]) -> float:
    """By what share the loss fell from the first to the second half of the last fifth of training."""
    late = losses[-max(2, len(losses) // 5) :]
    half = len(late) // 2
    first, second = sum(late[:half]) / half, sum(late[half:]) / (len(late) - half)
    return (first - second) / abs(first)


def scored(name: str, decomposition: Any, held: Held) -> Row:
    """The row of the scoreboard, with what the decomposition uses and its description length."""
    row = score_held(name, decomposition, held)
    x = held.counted_rows(decomposition.sites.reads, 4096)
    length = description_length(decomposition, x, held.variance)
    reads = decomposition.port if isinstance(decomposition, AtOutput) else str(row["reads"]).rpartition("/")[2]
    return row | uses(decomposition, row["l0"]) | {"bits": length.bits, "reads": reads}


if __name__ == "__main__":
    command(Config, main, __doc__)
