"""A tree of several levels, leaves on the left: every node joined to its parent, wider lines for larger shares."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxinterp.report.axes import px, svg
from jaxinterp.report.text import plain

_ROW, _EDGE = 13, 14


def tree_chart(
    parents: Sequence[Int[np.ndarray, " _children"]],
    shares: Sequence[Float[np.ndarray, " _children"]],
    title: str,
    *,
    names: Sequence[str] = (),
    width: int = 720,
) -> str:
    """An SVG of the tree.

    Args:
      parents: per level, from the leaves up, the parent of every node in the level above.
      shares: per level, how much of a node its parent is, in [0, 1]: the opacity and width of the line.
      names: of the leaves; default: their numbers.
    """
    at = _heights(parents)
    columns = np.linspace(70, width - 40, len(parents) + 1)
    height = 2 * _EDGE + _ROW * len(parents[0])
    parts = []
    for level, (parent, share) in enumerate(zip(parents, shares, strict=True)):
        left, right, middle = columns[level], columns[level + 1], (columns[level] + columns[level + 1]) / 2
        for child, (above, much) in enumerate(zip(parent, share, strict=True)):
            start, end = at[level][child], at[level + 1][above]
            path = f"M{px(left)} {px(start)}C{px(middle)} {px(start)} {px(middle)} {px(end)} {px(right)} {px(end)}"
            told = f"{child} of level {level} in {above} of level {level + 1}: {much:.0%}"
            parts.append(
                f'<path class="branch" style="fill:none;stroke:currentColor;stroke-opacity:{0.15 + 0.7 * much:.2f};'
                f'stroke-width:{0.6 + 2 * much:.2f}" d="{path}"><title>{told}</title></path>'
            )
    for level, heights in enumerate(at):
        used = {int(node) for node in (range(len(heights)) if level == 0 else parents[level - 1])}
        for node in sorted(used):
            x, y = columns[level], heights[node]
            parts.append(f'<circle cx="{px(x)}" cy="{px(y)}" r="3" style="fill:currentColor"/>')
            name = names[node] if level == 0 and names else str(node)
            anchor, beside = ("end", -7) if level == 0 else ("start", 7)
            parts.append(
                f'<text class="tick" x="{px(x + beside)}" y="{px(y + 4)}" text-anchor="{anchor}">{plain(name)}</text>'
            )
    return svg(width, height, title, parts)


def _heights(parents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Leaves in the order of their ancestors from the top down; a parent at the mean height of its children."""
    keys = [np.arange(len(parents[0]))]
    lineage = np.arange(len(parents[0]))
    for parent in parents:
        lineage = parent[lineage] if len(keys) > 1 else parent
        keys.append(lineage)
    order = np.lexsort(keys)
    heights = [np.empty(len(order))]
    heights[0][order] = _EDGE + _ROW * (np.arange(len(order)) + 0.5)
    for level, parent in enumerate(parents):
        above = len(parents[level + 1]) if level + 1 < len(parents) else int(parent.max()) + 1
        total = np.bincount(parent, weights=heights[level], minlength=above)
        count = np.bincount(parent, minlength=above)
        heights.append(np.where(count > 0, total / np.maximum(count, 1), 0))
    return heights
