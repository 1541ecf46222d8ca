"""What experiments that compare methods share: equal L0 by interpolation, Pareto charts, and sentences from numbers."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import grain
from rich import box
from rich.console import Console
from rich.table import Table

from jaxinterp.data.text import load_text
from jaxinterp.errors import UserError
from jaxinterp.methods import Method, Together
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import check_site, sites
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart
from jaxinterp.training.fit import Fit, fit
from jaxinterp.training.mesh import parse_mesh
from jaxinterp.training.tracking import JsonLines, ProgressBar

Row = dict[str, Any]

METRICS = ("fvu", "ce_replaced", "ce_recovered_zero", "ce_recovered_mean", "kl", "top1_agreement", "dead_fraction")
"""What is read off at equal L0."""

NEAR = 0.1
"""L0 within this fraction of the one asked for counts as equal."""


def read_text(
    text: str, subject: Subject, *, tokens: int, heldout_tokens: int, seq: int
) -> tuple[grain.MapDataset, grain.MapDataset]:
    """Training and held-out windows of a text, of which a tenth is held out by document."""
    return load_text(text, subject.tokenizer, seq=seq, max_tokens=2 * (tokens + 10 * heldout_tokens))


def train_together(
    methods: Mapping[str, Method], subject: Subject, train: grain.MapDataset, config: Any, out: Path, *, tokens: int
) -> Fit:
    """All methods in one run, with checkpoints and a log in `out`.

    `config` has site, batch_size, seed, mesh and resume, as every experiment of this kind does.
    """
    steps = tokens // config.batch_size
    with ProgressBar(steps) as bar:
        return fit(
            Together(methods),
            subject,
            train,
            site=config.site,
            steps=steps,
            batch_size=config.batch_size,
            seed=config.seed,
            mesh=parse_mesh(config.mesh),
            checkpoint=out / "checkpoints",
            save_every=max(10, steps // 40 * 10),
            resume=config.resume,
            track=(JsonLines(out / "log.jsonl", resume=config.resume), bar),
        )


def check_mlp(model: Any, site: str) -> str:
    """`site`, if it is the leaf of an MLP.

    Raises:
      UserError: it is not.
    """
    if not check_site(model, site).endswith("/mlp"):
        leaves = ", ".join(sites(model, "**/mlp")[:3])
        raise UserError(f"site={site!r} is no MLP: name the leaf itself, such as {leaves}.")
    return site


def at_l0(rows: Sequence[Row], l0: float) -> Row:
    """A method's numbers where so many features are active: measured, or between two measured settings.

    Between two settings every metric is linear in log L0. `how` says which: "measured" (within a tenth), "between", or
    "nearest" where no two settings enclose the L0, and the numbers belong to the `l0` that the row has.
    """
    near = min(rows, key=lambda row: abs(math.log(max(row["l0"], 1e-9) / l0)))
    if abs(near["l0"] / l0 - 1) <= NEAR:
        return near | {"how": "measured"}
    for low, high in pairwise(sorted((row for row in rows if row["l0"] > 0), key=lambda row: row["l0"])):
        if low["l0"] < l0 < high["l0"]:
            share = math.log(l0 / low["l0"]) / math.log(high["l0"] / low["l0"])
            between = {name: (1 - share) * low[name] + share * high[name] for name in METRICS}
            return low | between | {"l0": float(l0), "how": "between"}
    return near | {"how": "nearest"}


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows whose L0 is that which was asked for."""
    return [row for row in rows if row["how"] != "nearest"]


def pareto(rows: Mapping[str, Sequence[Row]], *, emphasis: str = "") -> tuple[Chart, Chart]:
    """FVU and added cross-entropy against L0, a line for each method."""

    def chart(title: str, note: str, value: Any) -> Chart:
        lines = [
            Series(name, tuple(sorted((row["l0"], value(row)) for row in own)), line=True, emphasis=name == emphasis)
            for name, own in rows.items()
        ]
        return Chart(
            title,
            note,
            xy_chart(
                lines,
                x_label="active features per token (L0), log scale",
                y_label=title,
                title=title,
                log_x=True,
                height=460,
            ),
        )

    return (
        chart("Unexplained variance", "FVU, lower is better", lambda row: row["fvu"]),
        chart(
            "Cross-entropy added",
            "nats per token with the MLP replaced, lower is better",
            lambda row: row["ce_replaced"] - row["ce_clean"],
        ),
    )


def ahead(rows: Sequence[Row], key: str) -> list[Row]:
    """Rows with a value, the lowest first."""
    return sorted((row for row in rows if math.isfinite(row[key])), key=lambda row: row[key])


def shown(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The columns of the table at equal L0."""
    return tuple(
        {
            "method": row["method"],
            "reads": str(row["reads"]).rpartition("/")[2],
            "L0": row["l0"],
            "read off": row["how"],
            "FVU": row["fvu"],
            "CE": row["ce_replaced"],
            "CE added": row["ce_replaced"] - row["ce_clean"],
            "recovered, zero": row["ce_recovered_zero"],
            "recovered, mean": row["ce_recovered_mean"],
            "KL": row["kl"],
            "dead": row["dead_fraction"],
        }
        for row in rows
    )


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The table at equal L0, in 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("method", "reads", "L0", "", "FVU", "CE", "rec zero", "KL", "dead"):
        table.add_column(title, justify="left" if title in ("method", "reads", "") else "right", no_wrap=True)
    marks = {"measured": "", "between": "~", "nearest": "!"}
    for row in rows:
        numbers = [f"{row[key]:.3f}" for key in ("fvu", "ce_replaced", "ce_recovered_zero", "kl")]
        reads = str(row["reads"]).rpartition("/")[2]
        table.add_row(
            row["method"], reads, f"{row['l0']:.1f}", marks[row["how"]], *numbers, f"{row['dead_fraction']:.0%}"
        )
    console.print(table)
    console.print("~ read off between two settings, ! no setting has this L0: the nearest one")
