"""The table of families as it is read: which rows are ranked, what the numbers say, and the page with the chart.

A row whose loss still falls by more than 2 % is "undertrained", one whose number of active components is more than a
tenth off is "other L0", one without a free size "reference": none of these is ranked.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxinterp.commands.shell import Columns, measured_on
from jaxinterp.evaluation.effects import Row
from jaxinterp.evaluation.equal_sparsity import at_l0, equal_l0
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page

STILL_FALLS = 0.02


def status(row: Row, k: int) -> str:
    """Why a row is not ranked; nothing where it is."""
    if not row["sized"]:
        return "reference"
    if row.get("falls", 0.0) > STILL_FALLS:
        return "undertrained"
    return "" if equal_l0(row["active"], float(k)) else "other L0"


def marked(rows: Sequence[Row]) -> list[Row]:
    """The rows with their status and, among those that are ranked and read the same, their rank by FVU."""
    told = [dict(row) | {"status": status(row, row["k"])} for row in rows]
    ranked = [row for row in told if not row["status"]]
    for row in ranked:
        rivals = [each["fvu"] for each in ranked if (each["reads"], each["k"]) == (row["reads"], row["k"])]
        row["status"] = f"{1 + sum(fvu < row['fvu'] for fvu in rivals)} of {len(rivals)}"
    return told


COLUMNS: Columns = {
    "method": ("method", "{}"),
    "reads": ("reads", "{}"),
    "active": ("active", "{:.0f}"),
    "numbers": ("active_parameters", "{:,d}"),
    "FVU": ("fvu", "{:.3f}"),
    "CE": ("ce_replaced", "{:.3f}"),
    "bits": ("bits", "{:.0f}"),
    "rank": ("status", "{}"),
}


def answers(rows: Sequence[Row], ks: Sequence[int]) -> list[str]:
    """What the numbers say."""
    said = []
    for k in ks:
        own = [row for row in marked(rows) if row["k"] == k]
        for reads in ("in", "out"):
            ranked = sorted((r for r in own if " of " in r["status"] and r["reads"] == reads), key=lambda r: r["fvu"])
            if ranked:
                order = ", ".join(f"{row['family']} {row['fvu']:.3f}" for row in ranked)
                said.append(f"With {k} active components, reading the MLP's {reads}put, by FVU: {order}.")
        for word in ("undertrained", "other L0", "reference"):
            names = [f"{row['family']} {row['fvu']:.3f}" for row in own if row["status"] == word]
            if names:
                said.append(f"Not ranked at k {k} ({word}): {', '.join(names)}.")
    return [*said, "One seed, one layer, one learning rate for all that is trained by gradient: an order, no verdict."]


def write_families(
    path: Path,
    rows: Sequence[Row],
    sentences: Sequence[str],
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
) -> Path:
    """The table, the chart of FVU against active parameters, and the same at equal active parameters."""
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(row["family"], []).append(row)
    lines = [
        Series(name, tuple(sorted((row["active_parameters"], row["fvu"]) for row in own)), line=True)
        for name, own in by_family.items()
    ]
    chart = xy_chart(
        lines, x_label="active parameters per token, log scale", y_label="FVU", log_x=True, height=460,
        width=900, title="Unexplained variance against active parameters",
    )  # fmt: skip
    sections = [
        Section("At equal active components", tuple(sentences), tuple(_shown(row) for row in marked(rows))),
        Section(
            "FVU against active parameters",
            charts=(Chart("Unexplained variance", "FVU of the MLP's output on held-out text, lower is better", chart),),
            wide=True,
        ),
    ]
    if len({row["k"] for row in rows}) > 1:
        sections.append(Section("At equal active parameters", (_AT,), at_equal(by_family)))
    sections.append(Section("What the numbers mean", (measured_on(rows), *_NOTES)))
    return write_page(path, title=title, subtitle=subtitle, summary=sentences[0], sections=sections, facts=facts)


_AT = (
    "Every family at the active parameters of the skip transcoder with the middle k, read off between two of its own "
    "settings (linear in the logarithm), or its nearest setting where none comes close."
)
_NOTES = (
    "Active parameters: the numbers of the active components, and of what every token uses (skip path, shared neurons, "
    "dense path, the MLP behind an interaction basis). Choosing components is not counted.",
    "Bits: the codes of a token, rounded so far that the output changes by 1 % of its variance, each component coded "
    "on its own; a skip or dense path needs none, as both sides have the input.",
    "Semi-NMF reads the hidden activations, principal components and autoencoders the output: less is left for them to "
    "compute. Parameter components are trained on the MLP's output, not on the next token.",
)


def at_equal(by_family: Mapping[str, Sequence[Row]]) -> tuple[Row, ...]:
    """Every family at the same active parameters."""
    base = by_family.get("skip transcoder") or next(iter(by_family.values()))
    wanted = sorted(row["active_parameters"] for row in base)[len(base) // 2]
    read_off = {
        name: at_l0([row | {"l0": float(row["active_parameters"])} for row in own], wanted)
        for name, own in by_family.items()
    }
    return tuple(
        {"family": name, "read off": row["how"], "active parameters": round(row["l0"]), "FVU": row["fvu"],
         "CE": row["ce_replaced"], "KL": row["kl"]}
        for name, row in read_off.items()
    )  # fmt: skip


def _shown(row: Row) -> Row:
    return {
        "method": row["method"],
        "reads": row["reads"],
        "rank": row["status"],
        "active": row["active"],
        "parameters": row["parameters"],
        "active parameters": row["active_parameters"],
        "FVU": row["fvu"],
        "CE": row["ce_replaced"],
        "CE added": row["ce_replaced"] - row["ce_clean"],
        "recovered, zero": row["ce_recovered_zero"],
        "KL": row["kl"],
        "bits": row["bits"],
        "dead": row["dead_fraction"],
        "steps": row.get("steps"),
        "tokens": row.get("train_tokens"),
        "different tokens": row.get("different_tokens"),
        "falls": row.get("falls"),
        "seconds": row["seconds"],
        "CPU seconds": row["cpu_seconds"],
    }
