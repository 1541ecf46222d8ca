"""The report as one HTML file: no network, no assets beside it, complete without JavaScript."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from jaxinterp.core.json_value import Json
from jaxinterp.report import templates
from jaxinterp.report.columns import answer_of
from jaxinterp.report.content import Report
from jaxinterp.report.feature_views import views
from jaxinterp.report.plots import Reference, bar_chart, line_chart
from jaxinterp.report.scoreboard import board, dot_plots, summary, tiles
from jaxinterp.report.text import Number, finite, number, power_of_ten, short_count
from jaxinterp.storage.files import write_text

_DEFINITIONS = (
    (
        "Feature, read vector, write vector",
        "A feature is active to the degree that the MLP's input points along its read vector, and adds its write "
        "vector to the reconstruction in proportion to its activation.",
    ),
    (
        "FVU, fraction of variance unexplained",
        "Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all held-out tokens, where y is the MLP's output, ŷ the reconstruction and ȳ the "
        "held-out mean.",
    ),
    (
        "Cross-entropy: clean, replaced, mean, zero",
        "The model's loss on held-out text: as it is, with the reconstruction in place of the MLP's output, with its "
        "training mean in that place, with nothing there.",
    ),
    (
        "Similarity of embeddings: replaced, mean, zero",
        "Of an encoder, which predicts no token: the cosine of a text's embedding (the mean over its tokens) with the "
        "unchanged model's, with the same things in the place of the MLP's output.",
    ),
    (
        "Recovered",
        "The share of an ablation's damage that the reconstruction avoids: 100\u202f% is as good as the MLP itself, "
        "0 as bad as the ablation. Where the ablation hardly hurts, look at the cross-entropies instead.",
    ),
    (
        "95\u202f% interval",
        "Over documents. All rows are measured on the same documents, so two methods may differ reliably although "
        "their intervals overlap.",
    ),
    (
        "L0, density, dead",
        "L0 is the mean number of active features per token; a feature's density is the fraction of tokens on which "
        "it is active; a dead feature was never active on the held-out tokens.",
    ),
    (
        "Logits raised and lowered",
        "The direct path only: the write vector, times the final norm's weight, times the unembedding, minus its mean "
        "over the vocabulary; in logits per unit of activation for a residual stream of root mean square 1. What later "
        "layers make of the feature is not in it.",
    ),
    (
        "Similar neurons, read/write cosine",
        "Cosines of the feature's write vector with the neurons' rows of the down projection, and of its read vector "
        "with their columns of the gate projection (of the up projection where there is no gate). The read/write "
        "cosine compares the feature's own two vectors.",
    ),
)

_ANCHORS = (
    ("scoreboard", "Scoreboard"),
    ("training", "Training"),
    ("density", "Density"),
    ("features", "Features"),
    ("read", "How to read this"),
    ("run", "The run"),
)


def write_report(content: Report, path: str | Path) -> Path:
    """Write the report as one HTML file and return its path; a file of that name is replaced in one step.

    Folders on the way are created. The text is UTF-8; nothing in it depends on the time or the place of writing.
    """
    return write_text(path, render(content))


def render(content: Report) -> str:
    """The whole page as a string."""
    answer = answer_of(content.scoreboard, content.effect)
    return templates.render(
        "report.html",
        title=content.title,
        subtitle=content.subtitle,
        summary=Markup(summary(content.scoreboard, content.effect)),
        anchors=_ANCHORS,
        tiles=tiles(content.scoreboard, content.curves, len(content.densities), content.effect),
        scores=board(content.scoreboard, content.effect),
        answer=answer,
        dots=tuple(map(Markup, dot_plots(content.scoreboard, content.effect))),
        curves=_curves(content),
        density=_density(content),
        features=views(content.features),
        definitions=_DEFINITIONS,
        facts=content.facts,
    )


def _curves(content: Report) -> list[tuple[str, str, Markup]]:
    """Title, note and chart of what the log has."""
    rows = content.curves
    if not rows:
        return []
    tokens = _column(rows, "tokens")
    held_out = content.scoreboard[0].get("fvu") if content.scoreboard else None
    charts = (
        ("fvu", "FVU on training batches", "", (), Reference("held out", held_out)),
        ("loss", "Loss", "", (), None),
        ("l0", "L0", "active features per token", (0.0,), None),
        ("dead_fraction", "Dead features", "fraction that never fired between two log entries", (0.0,), None),
    )
    found = []
    for key, title, note, include, reference in charts:
        values = _column(rows, key)
        log = key in ("fvu", "loss") and _spans(values, 4.0)
        chart = line_chart(
            tokens,
            values,
            x_label="training tokens",
            title=title,
            log_y=log,
            include=include,
            reference=reference,
            x_labels=lambda ticks: tuple(map(short_count, ticks)),
        )
        found.append((title, ", ".join(filter(None, (note, "log scale" if log else ""))), Markup(chart)))
    return found


@dataclass(frozen=True)
class _Density:
    """Numbers of features, the median density of the live ones, and their histogram."""

    live: int
    all: int
    dead: int
    frequent: int
    median: float | None
    chart: Markup


def _density(content: Report) -> _Density | None:
    densities = np.asarray(content.densities, dtype=np.float64)
    if not densities.size:
        return None
    edges, counts, dead = density_histogram(densities)
    live = densities[np.isfinite(densities) & (densities > 0)]
    chart = bar_chart(
        edges,
        counts,
        title="Firing frequency of the features",
        x_label="firing frequency per token, log scale",
        y_label="features",
        apart=("dead", dead),
        rug=[math.log10(feature.density) for feature in content.features if feature.density > 0],
        x_labels=_powers,
        edge_text=lambda exponent: number(100 * 10**exponent, 2) + "\u202f%",
        width=1150,
        height=260,
    )
    median = float(np.median(live)) if live.size else None
    return _Density(live.size, densities.size, dead, int((live > 0.1).sum()), median, Markup(chart))


def density_histogram(
    densities: Float[np.ndarray, " features"], per_decade: int = 4
) -> tuple[tuple[float, ...], tuple[int, ...], int]:
    """Edges [bins + 1] and counts [bins] of log10(density) over live features, and the number of dead ones.

    The edges stand at multiples of 1 / `per_decade`. A density that is zero or not a number counts as dead.
    """
    alive = np.isfinite(densities) & (densities > 0)
    dead = int(densities.size - alive.sum())
    if not alive.any():
        return (-1.0, 0.0), (0,), dead
    logs = np.log10(densities[alive])
    first = math.floor(logs.min() * per_decade)
    last = max(math.ceil(logs.max() * per_decade), first + 1)
    edges = np.arange(first, last + 1) / per_decade
    counts, _ = np.histogram(logs, edges)
    return tuple(map(float, edges)), tuple(map(int, counts)), dead


def _column(rows: Sequence[Mapping[str, Json]], key: str) -> list[Number | None]:
    return [float(row[key]) if finite(row.get(key)) else None for row in rows]


def _spans(values: Sequence[Number | None], ratio: float) -> bool:
    """Whether positive values span so large a ratio that a log axis shows them better."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) / min(known) > ratio


def _powers(ticks: Sequence[Number]) -> tuple[str, ...]:
    """Labels for ticks that are exponents of ten."""
    return tuple(power_of_ten(int(tick)) if tick == int(tick) else "" for tick in ticks)
