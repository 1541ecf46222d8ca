"""Stacked bars: one bar a place (a layer), its parts one above the other, with a legend at the right."""

from collections.abc import Mapping, Sequence

from jaxinterp.report.axes import px, svg, x_axis, y_axis
from jaxinterp.report.scales import fit_scale, tick_labels
from jaxinterp.report.text import Number, number, plain

_COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b", "#ff9da6", "#7f7f7f",
    "#bab0ac",
)  # fmt: skip


def stacked_bars(
    values: Mapping[str, Sequence[Number]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    width: int = 720,
    height: int = 360,
) -> str:
    """An SVG of bars.

    Args:
      values: part -> one number for every bar, not negative; parts are stacked in this order from the bottom.
    """
    bars = len(next(iter(values.values())))
    totals = [sum(own[bar] for own in values.values()) for bar in range(bars)]
    right, bottom = width - 190, height - 48
    xs = fit_scale([-0.5, bars - 0.5], 58, right, margin=0.0)
    ys = fit_scale([0.0, max(totals)], bottom, 24, include=(0.0,))
    parts = [
        y_axis(ys, xs.start, xs.stop, tick_labels),
        x_axis(xs, bottom, tick_labels, x_label),
        f'<text class="axis-label" x="58" y="12">{plain(y_label)}</text>',
    ]
    below: list[Number] = [0.0] * bars
    wide = 0.8 * (xs(1.0) - xs(0.0))
    for index, (name, own) in enumerate(values.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        for bar, value in enumerate(own):
            top, base = ys(below[bar] + value), ys(below[bar])
            below[bar] += value
            if value > 0:
                parts.append(
                    f'<rect x="{px(xs(bar) - wide / 2)}" y="{px(top)}" width="{px(wide)}" height="{px(base - top)}" '
                    f'style="fill:{colour}"><title>{plain(name)}, {bar}: {number(value)}</title></rect>'
                )
        at = 28 + 17 * index
        parts.append(f'<rect x="{px(right + 14)}" y="{px(at)}" width="10" height="10" style="fill:{colour}"/>')
        parts.append(f'<text class="legend-name" x="{px(right + 30)}" y="{px(at + 9)}">{plain(name)}</text>')
    return svg(width, height, title, parts)
