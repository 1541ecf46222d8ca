"""What every chart is drawn with: axes with grid lines and labels, pixels as text, the SVG around the parts.

Colours, fonts and stroke widths come from the style sheet by class.
"""

import math
from collections.abc import Callable, Sequence

from jaxinterp.report.scales import Scale
from jaxinterp.report.text import Number, plain

CHARACTER = 6.1
"""The mean width of a character of an axis label at the style sheet's 11 px, in pixels."""

Labels = Callable[[Sequence[Number]], tuple[str, ...]]
"""Labels for the values of ticks."""


def y_axis(ys: Scale, left: Number, right: Number, labels: Labels, ticks: Sequence[Number] | None = None) -> str:
    """Grid lines and labels of a vertical axis."""
    ticks = ys.ticks() if ticks is None else ticks
    lines = "".join(f"M{px(left)} {px(ys(tick))}H{px(right)}" for tick in ticks)
    texts = "".join(
        f'<text class="tick aside" x="{px(left - 8)}" y="{px(ys(tick) + 4)}">{text}</text>'
        for tick, text in zip(ticks, labels(ticks), strict=True)
    )
    return f'<path class="grid" d="{lines}"/>{texts}'


def x_axis(xs: Scale, base: Number, labels: Labels, label: str, grid_from: Number | None = None) -> str:
    """The line, ticks and name of a horizontal axis, with grid lines from a height on where one is given."""
    ticks = xs.ticks(max(2, round((xs.stop - xs.start) / 90)))
    grid = "" if grid_from is None else "".join(f"M{px(xs(tick))} {px(grid_from)}V{px(base)}" for tick in ticks)
    texts = "".join(
        f'<text class="tick below" x="{px(xs(tick))}" y="{px(base + 9)}">{text}</text>'
        for tick, text in zip(ticks, labels(ticks), strict=True)
    )
    name = axis_label(label, xs.stop, base + 38, xs.stop - 4, ' text-anchor="end"')
    return (
        (f'<path class="grid" d="{grid}"/>' if grid else "")
        + f'<path class="axis" d="M{px(xs.start)} {px(base)}H{px(xs.stop)}"/>{texts}'
        + (name if label else "")
    )


def axis_label(label: str, x: Number, y: Number, room: Number, extra: str = "") -> str:
    """The name of an axis; one that is wider than its room is cut, and is whole in its title."""
    most = int(room / CHARACTER)
    if len(label) > most:
        shown = f"{plain(label[: most - 1].rstrip())}…<title>{plain(label)}</title>"
    else:
        shown = plain(label)
    return f'<text class="axis-label" x="{px(x)}" y="{px(y)}"{extra}>{shown}</text>'


def px(value: Number) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if math.isfinite(value) else "0"


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """The whole chart. On a phone it keeps its width, and so the size of its text, and is scrolled."""
    said = f'width="{width}" role="img" aria-label="{plain(title)}"'
    return f'<svg class="plot" viewBox="0 0 {width} {height}" {said}>{"".join(parts)}</svg>'


def nothing(title: str) -> str:
    """What stands where there is nothing to draw."""
    return f'<p class="empty">{plain(title)}: nothing to draw.</p>'
