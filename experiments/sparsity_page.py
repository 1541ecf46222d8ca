"""What the sparsity experiment writes: comparisons, the table as markdown, a page with the chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.sparsity_results import Results
from jaxinterp.commands.shell import say
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page

PAIRS = (
    ("|a||w| (WINA, CETT)", "|a| (TEAL)"),
    ("input |x||w| (WINA)", "input |x| (TEAL)"),
    ("|s| rms(u) (CHESS)", "|s| (CATS)"),
    ("|s| rms(u)|w|", "|s| rms(u) (CHESS)"),
    ("R-Sparse", "|a||w| (WINA, CETT)"),
    ("Wanda", "magnitude"),
    ("DaSS", "magnitude"),
    ("DaSS", "Wanda"),
)
"""The first against the second."""


def write(out: Path, results: Results, shares: Sequence[float], subtitle: str, facts: Mapping[str, str]) -> None:
    """The table as markdown, comparisons, and a page with the chart."""
    rows = results.content["rows"]
    dense = rows[0]
    by_score: dict[str, dict[float, float]] = {}
    for row in rows[1:]:
        by_score.setdefault(row["score"], {})[row["sparsity"]] = row["perplexity"]
    table = [
        {"score": name} | {f"{share:.0%}": values.get(share) for share in shares}
        for name, values in by_score.items()
        if set(values) & set(shares) and name not in ("magnitude", "Wanda", "DaSS")
    ]
    weights = [
        {"score": name, "50 %": by_score[name].get(0.5), "2:4": by_score[name].get(0.501)}
        for name in ("magnitude", "Wanda", "DaSS")
        if name in by_score
    ]
    pairs = [
        found
        for first, second in PAIRS
        for share in [*shares, 0.501]
        if (found := results.compared(first, second, share)) is not None
    ]
    results.content["compared"] = pairs
    results.keep()
    other = results.content["other"]
    say(*markdown(dense, table, weights, pairs, other))
    (out / "table.md").write_text("\n".join(markdown(dense, table, weights, pairs, other)) + "\n")
    series = [
        Series(name, tuple((share, values[share] / dense["perplexity"]) for share in shares if share in values), True)
        for name, values in by_score.items()
        if len(set(values) & set(shares)) > 2
    ]
    chart = xy_chart(
        series,
        x_label="share of neurons left out",
        y_label="perplexity, relative to dense",
        title="Perplexity against sparsity",
        log_y=True,
        width=900,
        height=520,
    )
    write_page(
        out / "report.html",
        title="Sparsity",
        subtitle=subtitle,
        summary=f"Dense perplexity {dense['perplexity']:.2f} over {dense['tokens']} next tokens.",
        sections=(
            Section("Perplexity", (), tuple(table), (Chart("By sparsity", "every token, every layer", chart),), True),
            Section("Weights of the MLPs", (), tuple(weights)),
            Section("Differences, nats, 95 % over documents", (), tuple(pairs)),
        ),
        facts=facts,
    )


def markdown(
    dense: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    weights: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    other: Mapping[str, Any],
) -> list[str]:
    """The results as lines of markdown."""
    lines = [f"Dense perplexity {dense['perplexity']:.2f} over {dense['tokens']} next tokens.", ""]
    for part in (table, weights):
        if part:
            lines += [
                "| " + " | ".join(name.replace("|", "\\|") for name in part[0]) + " |",
                "|" + "---|" * len(part[0]),
                *("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in part),
                "",
            ]
    if pairs:
        lines += ["| nats: first - second | at | difference | 95 % over documents |", "|---|---|---|---|"]
    for row in pairs:
        at = "2:4" if row["sparsity"] == 0.501 else f"{row['sparsity']:.0%}"
        names = f"{_cell(row['first'])} - {_cell(row['second'])}"
        lines.append(f"| {names} | {at} | {row['ce difference']:+.4f} | [{row['low']:+.4f}, {row['high']:+.4f}] |")
    for name, value in other.items():
        lines += ["", f"{name}: {value}"]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}"
