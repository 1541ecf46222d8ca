"""What a run leaves behind: its scoreboard, beside baselines where there are some, and its report."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grain

from jaxinterp.commands.shell import print_scoreboard, write_json
from jaxinterp.core.decomposition import Decomposition
from jaxinterp.core.json_value import Json
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.effects import Row
from jaxinterp.evaluation.listed_effects import EFFECTS
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.evaluation.several import score_layers
from jaxinterp.models.load import Subject
from jaxinterp.report.content import Report
from jaxinterp.report.features import feature_pages
from jaxinterp.report.page import write_report
from jaxinterp.report.sections import Section, write_page
from jaxinterp.training.progress import waiting
from jaxinterp.training.tracking import read_rows


def write_results(
    config: Any,
    plan: Any,
    decomposition: Decomposition,
    subject: Subject,
    train: grain.MapDataset,
    heldout: grain.MapDataset,
    settings: Mapping[str, Json],
    facts: Mapping[str, str],
    seconds: float,
) -> Path:
    """Score, print, and write `scoreboard.json`, `features.json` and `report.html` into the run's folder.

    Returns:
      The path of the report.
    """
    facts = {name: str(value) for name, value in settings.items()} | dict(facts)
    sizes: dict[str, Any] = {"tokens": config.heldout_tokens, "ce_tokens": config.ce_tokens, "progress": True}
    if not isinstance(decomposition.sites.writes, str):
        rows = score_layers(decomposition, subject, heldout, **sizes)
        return _several(config, plan, rows, facts)
    name = config.method.replace("_", " ")
    times, clock = {name: seconds}, time.perf_counter()
    rivals: dict[str, Decomposition] = {}
    if decomposition.sites.writes == f"{plan.site}/out" and plan.site.endswith("/mlp"):
        options: dict[str, Any] = {"k": plan.k, "features": plan.features, "seed": config.seed, "progress": True}
        rivals = baselines(subject, train, plan.site, **options)
        times |= dict.fromkeys(rivals, time.perf_counter() - clock)
    rows = scoreboard({name: decomposition, **rivals}, subject, heldout, **sizes, effect=EFFECTS[plan.effect])
    rows = [row | {"seconds": round(times[row["method"]], 1)} for row in rows]
    write_json(config.out / "scoreboard.json", rows)
    options = {"features": config.pages, "seed": config.seed, "later": config.later, "progress": True}
    densities, pages = feature_pages(decomposition, subject, heldout, **options)
    write_json(config.out / "features.json", [asdict(page) for page in pages])
    report = Report(
        title=f"{config.model}: {plan.site}",
        subtitle=f"{name}, {plan.features} features; {subject.source or subject.name}",
        facts=facts,
        scoreboard=rows,
        curves=read_rows(config.out / "log.jsonl"),
        densities=densities,
        features=pages,
    )
    with waiting("writing the report"):
        path = write_report(report, config.out / "report.html")
    print_scoreboard(rows)
    return path


def _several(config: Any, plan: Any, rows: list[Row], facts: Mapping[str, str]) -> Path:
    """Of several layers: a table of all together and each alone."""
    write_json(config.out / "scoreboard.json", rows)
    print_scoreboard(rows)
    keys = {"layers": "method", "FVU": "fvu", "L0": "l0", "dead": "dead_fraction", "CE": "ce_replaced"}
    keys |= {"recovered, zero": "ce_recovered_zero", "recovered, mean": "ce_recovered_mean", "KL": "kl"}
    table = tuple({title: row[key] for title, key in keys.items()} for row in rows)
    return write_page(
        config.out / "report.html",
        title=f"{config.model}: {plan.site}",
        subtitle=f"{config.method.replace('_', ' ')}, {plan.features} features a layer; {facts['checkpoint']}",
        summary=f"All layers replaced: CE {rows[0]['ce_replaced']:.3f}, unchanged {rows[0]['ce_clean']:.3f}.",
        sections=[Section("All layers, and each alone", (), table)],
        facts=dict(facts),
    )
