"""The report as one HTML file: no network, no assets beside it, complete without JavaScript."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxinterp.core.json_value import Json
from jaxinterp.report.columns import answer_of
from jaxinterp.report.content import Report
from jaxinterp.report.feature_html import feature_section
from jaxinterp.report.plots import Reference, bar_chart, line_chart
from jaxinterp.report.scoreboard import dot_plots, summary, table, tiles
from jaxinterp.report.shell import card, document, facts_list, save
from jaxinterp.report.text import Number, count, finite, number, percent, power_of_ten, short_count

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


def write_report(content: Report, path: str | Path) -> Path:
    """Write the report as one HTML file and return its path; a file of that name is replaced in one step.

    Folders on the way are created. The text is UTF-8; nothing in it depends on the time or the place of writing.
    """
    return save(render(content), path)


def render(content: Report) -> str:
    """The whole page as a string."""
    sections = (
        ("scoreboard", "Scoreboard", _scoreboard(content)),
        ("training", "Training", _training(content)),
        ("density", "Density", _density(content)),
        ("features", "Features", _features(content)),
        ("read", "How to read this", _read()),
        ("run", "The run", facts_list(content.facts)),
    )
    return document(
        sections,
        title=content.title,
        subtitle=content.subtitle,
        summary=summary(content.scoreboard, content.effect),
        tiles=tiles(content.scoreboard, content.curves, len(content.densities), content.effect),
    )


def _scoreboard(content: Report) -> str:
    fvu, kept = dot_plots(content.scoreboard, content.effect)
    answer = answer_of(content.scoreboard, content.effect)
    return (
        '<p class="lede">Every row stands where the MLP stood and is measured on the same held-out text. The first row '
        "was trained in this run; the others are baselines. Best values are bold; ↓ and ↑ say which way is better.</p>"
        f"{table(content.scoreboard, content.effect)}"
        f'<div class="two">{card("Unexplained variance", "FVU, lower is better", fvu)}'
        f"{card(answer.title, answer.note, kept)}</div>"
        '<p class="note">Dots are means over the held-out tokens, bars are 95\u202f% intervals over documents. Dashed '
        "lines: the unchanged model (clean), and the MLP's output replaced by its training mean or by zero.</p>"
    )


def _training(content: Report) -> str:
    rows = content.curves
    if not rows:
        return '<p class="empty">No training log was recorded.</p>'
    tokens = _column(rows, "tokens")
    held_out = content.scoreboard[0].get("fvu") if content.scoreboard else None
    charts = (
        ("fvu", "FVU on training batches", "", (), Reference("held out", held_out)),
        ("loss", "Loss", "", (), None),
        ("l0", "L0", "active features per token", (0.0,), None),
        ("dead_fraction", "Dead features", "fraction that never fired between two log entries", (0.0,), None),
    )
    cards = []
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
        cards.append(card(title, ", ".join(filter(None, (note, "log scale" if log else ""))), chart))
    return f'<div class="two">{"".join(cards)}</div>'


def _density(content: Report) -> str:
    densities = np.asarray(content.densities, dtype=np.float64)
    edges, counts, dead = density_histogram(densities)
    live = densities[np.isfinite(densities) & (densities > 0)]
    if not densities.size:
        return '<p class="empty">No densities were recorded.</p>'
    frequent = int((live > 0.1).sum())
    middle = f"The median live feature fires on {percent(float(np.median(live)), 3)} of tokens. " if live.size else ""
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
    return (
        f'<p class="lede">{count(live.size)} of {count(densities.size)} features fired on the held-out text; '
        f"{count(dead)} did not and stand apart at the left. {middle}"
        f"{count(frequent)} {'fires' if frequent == 1 else 'fire'} on more than a tenth of all tokens.</p>"
        f'<div class="card">{chart}</div>'
        '<p class="note">The marks below the axis are the features shown in the next section.</p>'
    )


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


def _features(content: Report) -> str:
    return (
        '<p class="lede">Each feature with the held-out passages that activate it most, every passage from another '
        "window of text. The outlined token is the peak; the colour is the activation at every token."
        ' <span class="js-only">Use <kbd>←</kbd> and <kbd>→</kbd> to step through them.</span></p>'
        '<div class="legend">activation 0 <span class="ramp"></span> the feature\'s maximum &ensp; '
        '<span class="w">↵</span> newline &ensp; <span class="w">·</span> space</div>'
        f"{feature_section(content.features)}"
    )


def _read() -> str:
    entries = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in _DEFINITIONS)
    return f'<dl class="read card">{entries}</dl>'


def _column(rows: Sequence[Mapping[str, Json]], key: str) -> list[Number | None]:
    return [float(row[key]) if finite(row.get(key)) else None for row in rows]


def _spans(values: Sequence[Number | None], ratio: float) -> bool:
    """Whether positive values span so large a ratio that a log axis shows them better."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) / min(known) > ratio


def _powers(ticks: Sequence[Number]) -> tuple[str, ...]:
    """Labels for ticks that are exponents of ten."""
    return tuple(power_of_ten(int(tick)) if tick == int(tick) else "" for tick in ticks)
