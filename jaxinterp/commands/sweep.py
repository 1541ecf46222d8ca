"""One method at many settings: all runs in one program, from one harvest, on one scoreboard.

Command: jaxinterp sweep --out runs/sweep --sweep k=16,32,64 --sweep seed=0..3
         jaxinterp sweep --out runs/l1 --method gated --sweep l1=0.002,0.006 --sweep features=1152,2304

A sweep names a hyperparameter of the method and its values; several sweeps are combined. The runs stand beside each
other in the program, on the same rows of the same forward passes, so that shapes may differ and each run is what it is
alone: run `k=16, seed=2` starts from the key of seed 2 and reads the text in the order of --seed. Where `seed` is
swept, the live write vectors of every setting are compared over seeds: the column `stable` is their mean matched cosine
(live: fired within the last fifth of the training tokens).
"""

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import PyTree

from jaxinterp.commands.methods import SEVERAL, Hyper, hyperparameters, make_method
from jaxinterp.commands.on_text import OnText, Prepared, prepared, train_together
from jaxinterp.commands.shell import Columns, check_distinct, measured_on, print_table, say, write_json
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.files import save_dictionary
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.evaluation.stability import compare_seeds
from jaxinterp.methods import Method, Seeds
from jaxinterp.report.pareto import Row, pareto
from jaxinterp.report.sections import Section, write_page
from jaxinterp.training.hosts import join
from jaxinterp.training.mesh import fetch
from jaxinterp.training.progress import waiting

SEED = "seed"
Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Config(OnText):
    """One method, one MLP, every combination of the values swept."""

    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # what is given is appended to the default
    """FIELD=VALUES of the method, values joined by commas, whole numbers also as 0..3; `seed` too. May be repeated;
    where it is not given: k=16,32,64 (of methods that have k) and seed=0..2."""
    method: str = "skip_transcoder"
    """Which method, of those that read and write one array."""
    hosts: str = "auto"
    """Processes of one run: auto (Cloud TPU, Slurm, jaxinterp launch), alone, or ADDRESS:PORT,COUNT,INDEX."""
    features: int = 1152
    tokens: int = 200_000


def main(config: Config) -> None:
    """Train all, score all, compare seeds; of several processes all train, and the first one does the rest."""
    clock = time.perf_counter()
    settings = combinations(config)
    runs: dict[str, Method] = {name: method_of(config, setting) for name, setting in settings.items()}
    join(config.hosts)
    ready = prepared(config)
    say(f"{len(runs)} runs in one program: {', '.join(runs)}")
    trained = fetch(train_together(runs, ready, config).decomposition)
    if jax.process_index() > 0:
        return
    found = {name: each[0] for name, each in trained.items()}
    for name, dictionary in found.items():
        save_dictionary(dictionary, ready.out / "dictionaries" / name.replace(" ", ""))
    with waiting(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text"):
        board = scoreboard(
            found, ready.subject, ready.heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens
        )
        stable = stability(settings, found, dead_after=max(1, config.tokens // 5))
    rows = [row | {"stability": stable.get(without_seed(settings[row["method"]]))} for row in board]
    write_json(ready.out / "results.json", rows)
    print_table(COLUMNS, rows)
    sentences = reading(rows, stable)
    say(measured_on(rows), *sentences)
    path = report(config, ready, settings, rows, sentences)
    say(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


COLUMNS: Columns = {
    "run": ("method", "{}"),
    "L0": ("l0", "{:.1f}"),
    "FVU": ("fvu", "{:.3f}"),
    "CE": ("ce_replaced", "{:.3f}"),
    "rec zero": ("ce_recovered_zero", "{:.3f}"),
    "dead": ("dead_fraction", "{:.1%}"),
    "stable": ("stability", "{:.3f}"),
}


def combinations(config: Config) -> dict[str, dict[str, Json]]:
    """The settings by the name of their run, `k=16, seed=0`.

    Raises:
      UserError: a sweep is not of the form FIELD=VALUES, names no field of the method, or names one twice; the method
        is one of several layers.
    """
    if config.method in SEVERAL:
        raise UserError(f"method={config.method!r} takes several layers, and a sweep one array: choose another method.")
    swept: dict[str, list[Any]] = {}
    for text in config.sweep or unasked(config.method):
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not values:
            raise UserError(f"sweep={text!r}: write it as k=16,32,64 or seed=0..3.")
        if name in swept:
            raise UserError(f"sweep: {name} stands there twice; join its values by commas.")
        swept[name] = parsed(name, values, config)
        check_distinct(f"sweep {name}", swept[name])
    named = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    return {", ".join(f"{name}={value}" for name, value in setting.items()): setting for setting in named}


def unasked(method: str) -> tuple[str, ...]:
    """What is swept where nothing is asked for."""
    return ("k=16,32,64", "seed=0..2") if chooses_k(method) else ("seed=0..2",)


def chooses_k(method: str) -> bool:
    """Whether k is the number of active features."""
    return "k" in hyperparameters(method)


def parsed(name: str, values: str, config: Config) -> list[Any]:
    """The values of a field, of the type that it has in the method.

    Raises:
      UserError: the method has no such field, or a value is not of its type.
    """
    known = hyperparameters(config.method) | {SEED: Hyper(int, 0, "of the start values")}
    if name not in known:
        raise UserError(f"sweep: {config.method} has no {name!r} to sweep.{suggest(name, known)}")
    if ".." in values and known[name].kind is int:
        first, _, last = values.partition("..")
        numbers = list(range(known[name].read(name, first), known[name].read(name, last) + 1))
        if not numbers:
            raise UserError(f"sweep {name}={values} is empty: write the smaller number first.")
        return numbers
    return [known[name].read(f"sweep {name}", value) for value in values.split(",")]


def method_of(config: Config, setting: Setting) -> Method:
    """The method at a setting, started from the setting's seed."""
    plain: dict[str, Json] = {
        "features": config.features,
        "learning_rate": config.learning_rate,
        "dead_after": max(1, config.tokens // 5),
    }
    own = {name: value for name, value in setting.items() if name != SEED}
    return Seeds(make_method(config.method, plain, own), 1, first=setting.get(SEED, 0))


def without_seed(setting: Setting) -> str:
    """What runs that differ by their seed have in common."""
    return ", ".join(f"{name}={value}" for name, value in setting.items() if name != SEED)


def stability(settings: Mapping[str, Setting], found: Mapping[str, PyTree], *, dead_after: int) -> dict[str, float]:
    """The mean matched cosine of live write vectors over seeds, by setting; only where there are two seeds."""
    alike: dict[str, list[Any]] = defaultdict(list)
    for name, dictionary in found.items():
        live = np.asarray(dictionary.tokens_since_fired) < dead_after
        alike[without_seed(settings[name])].append(np.asarray(dictionary.decoder)[live])
    cosines = {name: compare_seeds(rows).cosine for name, rows in alike.items() if len(rows) > 1}
    return {name: cosine for name, cosine in cosines.items() if not math.isnan(cosine)}  # none where nothing is live


def reading(rows: Sequence[Row], stable: Mapping[str, float]) -> list[str]:
    """What the numbers say."""
    best = min(rows, key=lambda row: row["ce_replaced"])
    said = [
        f"The lowest cross-entropy is that of {best['method']} ({best['ce_replaced']:.3f}; unchanged "
        f"{best['ce_clean']:.3f}), at {best['l0']:.1f} active features."
    ]
    if len(stable) > 1:
        most = max(stable, key=lambda name: stable[name])
        said.append(f"Seeds agree most at {most} (mean matched cosine {stable[most]:.3f}).")
    return said


def report(
    config: Config, ready: Prepared, settings: Mapping[str, Setting], rows: Sequence[Row], sentences: Sequence[str]
) -> Path:
    """The page: a point for every run, a line for every seed."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[f"seed {settings[row['method']].get(SEED, 0)}"].append(row)
    table = tuple({title: row[key] for title, (key, _) in COLUMNS.items()} for row in rows)
    return write_page(
        ready.out / "report.html",
        title=f"{config.model}: {config.site}, a sweep of {config.method}",
        subtitle=f"{len(rows)} runs in one program, {config.tokens:,} tokens",
        summary=sentences[0],
        sections=[
            Section("Against L0", tuple(sentences), charts=pareto(lines)),
            Section("All runs", (measured_on(rows),), table),
        ],
        facts=ready.facts,
    )
