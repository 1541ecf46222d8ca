"""Inline SVG charts, written by hand: a line chart, bars, and dots with confidence intervals.

Colours, fonts and stroke widths come from the style sheet by class, so that a chart follows the page's colour scheme.
Numbers can be read without a script: every mark carries its value as an SVG title, and lines show a point on hovering.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxinterp.report.axes import Labels, axis_label, nothing, px, svg, x_axis, y_axis
from jaxinterp.report.scales import Scale, fit_scale, log_labels, tick_labels
from jaxinterp.report.text import Number, finite, number, plain

_MOST_POINTS = 400  # of a line: more are not visible at this width
_MOST_HOVERS = 60
_CHARACTER = 6.4  # the mean width of a character at the style sheet's 11.5 px, in pixels


@dataclass(frozen=True)
class Dot:
    """One row of a dot plot: a value with its interval (low, high), where there is one."""

    label: str
    value: Number | None
    interval: Sequence[Number | None] | None = None
    emphasis: bool = False


@dataclass(frozen=True)
class Reference:
    """A value to compare with, drawn as a dashed line with a label; `bare` leaves the number out of the label."""

    label: str
    value: Number | None
    bare: bool = False


def line_chart(
    x: Sequence[Number | None],
    y: Sequence[Number | None],
    *,
    x_label: str,
    title: str,
    log_y: bool = False,
    include: Sequence[Number] = (),
    reference: Reference | None = None,
    x_labels: Labels = tick_labels,
    y_labels: Labels | None = None,
    width: int = 540,
    height: int = 220,
) -> str:
    """A line through the points (x, y), broken where y is not finite; on a log axis also where it is not positive."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if finite(a) and finite(b) and (not log_y or b > 0)]
    if not known:
        return nothing(title)
    compared = [reference.value] if reference and finite(reference.value) else []
    xs = fit_scale([a for a, _ in known], 58, width - 14, margin=0.0)
    ys = fit_scale([*(b for _, b in known), *compared], height - 46, 14, log=log_y, include=include)
    y_labels = y_labels or (log_labels if log_y else tick_labels)
    parts = [y_axis(ys, xs.start, xs.stop, y_labels), x_axis(xs, height - 46, x_labels, x_label)]

    points = [
        (xs(a), ys(b)) if finite(a) and finite(b) and (not log_y or b > 0) else None for a, b in zip(x, y, strict=True)
    ]
    kept = [points[index] for index in _thinned(len(points), _MOST_POINTS)]
    parts.append(f'<path class="line" d="{_path(kept)}"/>')
    if compared and reference is not None:
        at = ys(compared[0])
        above = at - 6 if at > 30 else at + 14
        text = f"{plain(reference.label)} {number(reference.value)}"
        parts.append(f'<path class="reference" d="M{px(xs.start)} {px(at)}H{px(xs.stop)}"/>')
        parts.append(f'<text class="reference-label" x="{px(xs.start + 6)}" y="{px(above)}">{text}</text>')

    hovers = [known[index] for index in _thinned(len(known), _MOST_HOVERS)]
    strip = (xs.stop - xs.start) / len(hovers)
    for a, b in hovers:
        across, down = xs(a), ys(b)
        parts.append(
            f'<g class="hover"><rect x="{px(across - strip / 2)}" y="14" width="{px(strip)}" height="{height - 60}"/>'
            f'<circle cx="{px(across)}" cy="{px(down)}" r="3.5"/>'
            f"<title>{x_labels([a])[0]}: {number(b, 4)}</title></g>"
        )
    return svg(width, height, title, parts)


def bar_chart(
    edges: Sequence[Number],
    counts: Sequence[int],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    log_y: bool = False,
    apart: tuple[str, int] | None = None,
    rug: Sequence[Number] = (),
    x_labels: Labels = tick_labels,
    edge_text: Callable[[Number], str] = number,
    width: int = 720,
    height: int = 240,
    hover: bool = True,
) -> str:
    """Bars of `counts` between `edges`; `apart` is a bar of its own (label, count) at the left, `rug` marks the axis.

    With `log_y` the axis begins below one, so that a count of one can be seen. `hover=False` draws one path for all.
    """
    if not sum(counts) and not (apart and apart[1]):
        return nothing(title)
    if len(edges) < 2 or not all(map(finite, edges)) or edges[0] >= edges[-1]:
        edges, counts = (0.0, 1.0), (0,)
    base = height - (48 if x_label else 28)
    left = 46.0 + (62.0 if apart else 0.0)
    xs = Scale(float(edges[0]), float(edges[-1]), left, width - 12)
    highest = max(*counts, apart[1] if apart else 0, 1)
    top = 24 if y_label else 12
    ys = Scale(0.7, max(highest * 1.15, 2), base, top, True) if log_y else Scale(0.0, highest * 1.06, base, top)

    y_labels = log_labels if log_y else tick_labels
    ticks = [tick for tick in ys.ticks(4) if tick == int(tick)]
    parts = [y_axis(ys, 46.0, xs.stop, y_labels, ticks), x_axis(xs, base, x_labels, x_label)]
    if y_label:
        parts.append(axis_label(y_label, 46, 12, width - 50))
    boxes = [
        (xs(low) + 0.5, max(xs(high) - xs(low) - 1, 1.0), amount, f"{edge_text(low)} to {edge_text(high)}: {amount:,}")
        for low, high, amount in zip(edges, edges[1:], counts, strict=False)
        if amount
    ]
    if hover:
        parts += [
            _bar(across, wide, min(ys(amount), base - 1.2), base, "bar", text) for across, wide, amount, text in boxes
        ]
    else:
        outline = "".join(f"M{px(a)} {px(base)}V{px(ys(n))}h{px(w)}V{px(base)}z" for a, w, n, _ in boxes)
        parts.append(f'<path class="bar" d="{outline}"/>')
    if apart:
        label, amount = apart
        parts.append(_bar(58.0, 30.0, ys(amount) if amount else base, base, "bar apart", f"{label}: {amount:,}"))
        parts.append(f'<text class="tick below" x="73" y="{base + 9}">{plain(label)}</text>')
        parts.append(f'<path class="grid" d="M98 {top}V{base}"/>')
    marks = "".join(f"M{px(xs(value))} {base + 1}v5" for value in rug if finite(value) and xs.holds(value))
    if marks:
        parts.append(f'<path class="rug" d="{marks}"/>')
    return svg(width, height, title, parts)


def dot_plot(
    rows: Sequence[Dot],
    *,
    title: str,
    references: Sequence[Reference] = (),
    show: Callable[[Number | None], str] = number,
    width: int = 540,
) -> str:
    """One row a method: a dot, its interval, and the number. A reference far outside the dots becomes an arrow.

    A reference is far outside where it would stretch the axis to more than three times what the dots need.
    """
    values = [value for row in rows if finite(row.value) for value in (row.value, *_ends(row))]
    if not values:
        return nothing(title)
    near, far = _sorted_out(
        values, [(one.value, _reference_text(one, show)) for one in references if finite(one.value)]
    )
    gutter = min(max(_text_width(row.label) for row in rows) + 18, 190)
    xs = fit_scale([*values, *(value for value, _ in near)], gutter, width - 78, margin=0.06)

    lanes = _lanes([(xs(value), text) for value, text in near])
    # Room for two lanes at least, so that two charts side by side most often begin at the same height.
    top = 16.0 * max(max(lanes, default=0) + 1 + bool(far), 2) + 8 if references else 8.0
    bottom = top + 30 * len(rows)
    parts = [x_axis(xs, bottom, tick_labels, "", grid_from=top)]
    for lane, (value, text) in zip(lanes, near, strict=True):
        at, down = xs(value), 12 + 16 * lane
        inside = min(max(at, gutter + _text_width(text) / 2), width - _text_width(text) / 2)
        parts.append(f'<path class="reference" d="M{px(at)} {px(down + 4)}V{px(bottom)}"/>')
        parts.append(
            f'<text class="reference-label" x="{px(inside)}" y="{px(down)}" text-anchor="middle">{plain(text)}</text>'
        )
    if far:
        right = " · ".join(text for value, text in far if value > xs.high)
        left = " · ".join(text for value, text in far if value < xs.low)
        for text, at, anchor in ((f"{right} →", width - 4, "end"), (f"← {left}", gutter, "start")):
            if len(text) > 2:
                where = f'x="{px(at)}" y="{px(top - 12)}" text-anchor="{anchor}"'
                parts.append(f'<text class="reference-label" {where}>{plain(text)}</text>')
    for index, row in enumerate(rows):
        parts.append(_dot_row(row, xs, top + 30 * index + 15, gutter, width, show))
    return svg(width, round(bottom + 26), title, parts)


def _dot_row(
    row: Dot, xs: Scale, middle: Number, gutter: Number, width: int, show: Callable[[Number | None], str]
) -> str:
    tone = "strong" if row.emphasis else "soft"
    room = int((gutter - 12) / _CHARACTER)
    name = row.label if len(row.label) <= room else row.label[: room - 1] + "…"
    line = f'y="{px(middle + 4)}" text-anchor="end"'
    parts = [
        f'<text class="name {tone}" x="{px(gutter - 12)}" {line}>{plain(name)}</text>',
        f'<text class="value {tone}" x="{width - 4}" {line}>{show(row.value)}</text>',
    ]
    said = f"{row.label}: {number(row.value, 4)}"
    if finite(row.value):
        if ends := _ends(row):
            low, high = (px(xs(end)) for end in ends)
            parts.append(f'<path class="interval {tone}" d="M{low} {px(middle)}H{high}"/>')
            said += f" (95 % interval {number(ends[0], 4)} to {number(ends[1], 4)})"
        parts.append(f'<circle class="dot {tone}" cx="{px(xs(row.value))}" cy="{px(middle)}" r="4.5"/>')
    return f"<g>{''.join(parts)}<title>{plain(said)}</title></g>"


def _sorted_out(
    values: Sequence[Number], references: Sequence[tuple[Number, str]]
) -> tuple[list[tuple[Number, str]], list[tuple[Number, str]]]:
    """The references (value, text) that fit on the axis of the values, and those that don't; each by value."""
    low, high = min(values), max(values)
    limit = 3 * max(high - low, 0.02 * max(abs(low), abs(high)))
    fits = [low == high or max(high, value) - min(low, value) <= limit for value, _ in references]
    ordered = sorted(zip(references, fits, strict=True), key=lambda pair: pair[0][0])
    return [one for one, fit in ordered if fit], [one for one, fit in ordered if not fit]


def _lanes(labels: Sequence[tuple[Number, str]]) -> list[int]:
    """The row of each label (centre, text; sorted by centre), so that no two labels of one row overlap."""
    ends: list[float] = []
    chosen = []
    for centre, text in labels:
        half = _text_width(text) / 2 + 6
        lane = next((index for index, end in enumerate(ends) if centre - half >= end), len(ends))
        ends[lane : lane + 1] = [centre + half]
        chosen.append(lane)
    return chosen


def _reference_text(reference: Reference, show: Callable[[Number | None], str]) -> str:
    return reference.label if reference.bare else f"{reference.label} {show(reference.value)}"


def _text_width(text: str) -> float:
    return _CHARACTER * len(text)


def _ends(row: Dot) -> tuple[Number, ...]:
    ends = tuple(end for end in row.interval or () if finite(end))
    return ends if len(ends) == 2 else ()


def _bar(across: Number, wide: Number, top: Number, base: Number, name: str, text: str) -> str:
    size = f'x="{px(across)}" y="{px(top)}" width="{px(wide)}" height="{px(max(base - top, 0))}"'
    return f'<rect class="{name}" {size}><title>{plain(text)}</title></rect>'


def _thinned(length: int, most: int) -> list[int]:
    """At most `most` indices below `length`, evenly spread, both ends among them."""
    if length <= most:
        return list(range(length))
    return [round(index * (length - 1) / (most - 1)) for index in range(most)]


def _path(points: Sequence[tuple[Number, Number] | None]) -> str:
    pieces, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        # A stroke of no length behind every move: a lone point between two gaps is drawn as a dot.
        pieces.append(f"{pen}{px(point[0])} {px(point[1])}" + ("h0" if pen == "M" else ""))
        pen = "L"
    return "".join(pieces)
