"""Charts of y against x with several series: lines through a few measured points, or clouds of many.

Six colours, then the same with other marks and dashed lines. Names stand at the right, each as near as possible to the
last point of its series.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinterp.report.axes import axis_label, nothing, px, svg, x_axis, y_axis
from jaxinterp.report.scales import Scale, fit_scale, log_labels, tick_labels
from jaxinterp.report.text import finite, number, plain

HUES = 6
_CLOUD = 60  # a series without a line and of more points than this is drawn as one path
_MOST_POINTS = 4000  # of a cloud
_CHARACTER = 6.6  # the mean width of a character of a name, in pixels
_NAME = 16  # the height of a name, in pixels


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name; `line` joins them in the order given, `emphasis` draws them stronger."""

    name: str
    points: tuple[tuple[float, float], ...]
    line: bool = False
    emphasis: bool = False


def xy_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    log_y: bool = False,
    identity: bool = False,
    width: int = 540,
    height: int = 360,
) -> str:
    """An SVG chart; points that are not finite (not positive on a log axis) are left out. `identity` draws y = x."""
    shown = [
        (
            one,
            [
                (x, y)
                for x, y in one.points
                if finite(x) and finite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
            ],
        )
        for one in series
    ]
    points = [point for _, kept in shown for point in kept]
    if not points:
        return nothing(title)
    gutter = 26 + _CHARACTER * min(max(len(one.name) for one, _ in shown), 26)
    right, bottom = width - gutter, height - 48
    across, up = [x for x, _ in points], [y for _, y in points]
    if identity:
        across = up = [*across, *up]
    xs = fit_scale(across, 58, right, log=log_x)
    ys = fit_scale(up, bottom, 24, log=log_y)
    parts = [
        y_axis(ys, xs.start, xs.stop, log_labels if log_y else tick_labels),
        x_axis(xs, bottom, log_labels if log_x else tick_labels, x_label),
        axis_label(y_label, 58, 12, width - 62),
    ]
    if identity:
        low, high = max(xs.low, ys.low), min(xs.high, ys.high)
        parts.append(f'<path class="reference" d="M{px(xs(low))} {px(ys(low))}L{px(xs(high))} {px(ys(high))}"/>')
    places = _places([ys(kept[-1][1]) if kept else float(bottom) for _, kept in shown], 24.0, float(bottom))
    for index, ((one, kept), at) in enumerate(zip(shown, places, strict=True)):
        parts.append(_drawn(one, kept, index, xs, ys, at))
    return svg(width, height, title, parts)


def _drawn(one: Series, kept: list[tuple[float, float]], index: int, xs: Scale, ys: Scale, at: float) -> str:
    """The series and its name, which stands at the height `at`."""
    parts = []
    where = [(xs(x), ys(y)) for x, y in kept]
    cloud = not one.line and len(kept) > _CLOUD
    if cloud:
        step = -(-len(where) // _MOST_POINTS)
        parts.append(f'<path class="cloud" d="{"".join(f"M{px(x)} {px(y)}h0" for x, y in where[::step])}"/>')
    elif one.line and len(where) > 1:
        dashed = " dashed" if index // HUES % 2 else ""
        path = "L".join(f"{px(x)} {px(y)}" for x, y in where)
        parts.append(f'<path class="series{dashed}" d="M{path}"/>')
    if not cloud:
        for (x, y), (value_x, value_y) in zip(where, kept, strict=True):
            said = f"{one.name}: {number(value_x, 4)}, {number(value_y, 4)}"
            parts.append(f"{_mark(x, y, index)}<title>{plain(said)}</title></g>")
    if where and one.line:
        parts.append(
            f'<path class="leader" d="M{px(where[-1][0] + 5)} {px(where[-1][1])}L{px(xs.stop + 6)} {px(at)}"/>'
        )
    name = one.name if len(one.name) <= 26 else one.name[:25] + "…"
    parts.append(f"{_mark(xs.stop + 12, at, index)}</g>")
    parts.append(f'<text class="legend-name" x="{px(xs.stop + 21)}" y="{px(at + 4)}">{plain(name)}</text>')
    strong = " strong" if one.emphasis else ""
    return f'<g class="h{index % HUES}{strong}">{"".join(parts)}</g>'


def _mark(x: float, y: float, index: int) -> str:
    """The opening of a group with a circle, a square or a triangle in it."""
    shape = index // HUES % 3
    if shape == 0:
        body = f'<circle class="mark" cx="{px(x)}" cy="{px(y)}" r="4"/>'
    elif shape == 1:
        body = f'<rect class="mark" x="{px(x - 3.6)}" y="{px(y - 3.6)}" width="7.2" height="7.2"/>'
    else:
        body = f'<path class="mark" style="fill:var(--hue)" d="M{px(x)} {px(y - 4.8)}l4.6 8.4h-9.2z"/>'
    return f"<g>{body}"


def _places(wanted: list[float], top: float, bottom: float) -> list[float]:
    """Heights for names, each as near to the wanted one as it can be without overlapping another."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    height = min(_NAME, (bottom - top) / max(len(wanted) - 1, 1))
    places = [0.0] * len(wanted)
    above = top - height
    for index in order:
        above = places[index] = max(wanted[index], above + height)
    below = bottom + height
    for index in reversed(order):
        below = places[index] = min(places[index], below - height)
    return places
