"""A matrix as a picture: one square a number, red for one sign and blue for the other, white at 0."""

import numpy as np
from jaxtyping import Float

from jaxinterp.report.axes import px, svg

_SIDE = 200


def picture(values: Float[np.ndarray, "rows columns"], title: str) -> str:
    """An SVG of the matrix, strongest colour at its largest size. Squares of less than 2 % of it are left white."""
    rows, columns = values.shape
    size, largest = _SIDE / max(rows, columns), float(np.abs(values).max()) or 1.0
    parts = [f'<rect x="0" y="0" width="{_SIDE}" height="{_SIDE}" fill="#fff"/>']
    for row, column in np.argwhere(np.abs(values) > 0.02 * largest):
        value = float(values[row, column]) / largest
        colour = "#c0392b" if value > 0 else "#2c5aa0"
        parts.append(
            f'<rect x="{px(column * size)}" y="{px(row * size)}" width="{px(size)}" height="{px(size)}" '
            f'fill="{colour}" fill-opacity="{abs(value):.2f}"/>'
        )
    return svg(_SIDE, _SIDE, title, parts)
