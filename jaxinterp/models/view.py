"""A picture of a model: a foldable tree in a notebook, a table of names and shapes in a shell."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import treescope
from jaxtyping import PyTree
from treescope import rendering_parts

from jaxinterp.core.trees import named_leaves, path_name
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.sites import LEAVES, PROJECTIONS, sites


def show(model: PyTree) -> None:
    """Display the model's tree with the site names: in a notebook treescope's foldable tree, in a shell `tree_text`.

    Args:
      model: a model, or a subject around one.

    Example:
      >>> show(subject)  # doctest: +SKIP
    """
    model = model.model if isinstance(model, Subject) else model
    if _in_notebook():
        from IPython.display import HTML, display

        display(HTML(tree_html(model)))
    else:
        print(tree_text(model))


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this program; a plain IPython shell shows text."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def tree_text(model: PyTree) -> str:
    """One line for every array of the tree, those of all blocks together, and the sites.

    `blocks/*/mlp/up_proj/weight   float32 [64, 128]   x 4`
    """
    rows: dict[tuple[str, str], int] = {}
    for name, leaf in named_leaves(model).items():
        shape = f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else repr(leaf)
        key = re.sub(r"(^|/)\d+(?=/)", r"\1*", name), shape
        rows[key] = rows.get(key, 0) + 1
    width = max((len(name) for name, _ in rows), default=0)
    lines = [
        f"  {name:{width}}  {shape}" + (f"  x {count}" if count > 1 else "") for (name, shape), count in rows.items()
    ]
    return "\n".join([type(model).__name__, *lines, "sites", *_site_lines(model)])


def _site_lines(model: PyTree) -> Iterator[str]:
    """The site names, those of all blocks together."""
    counts: dict[str, int] = {}
    for name in sites(model):
        key = re.sub(r"(^|/)\d+(?=/)", r"\1*", name)
        counts[key] = counts.get(key, 0) + 1
    for name, count in counts.items():
        yield f"  {name}" + (f"  x {count}" if count > 1 else "")


def tree_html(model: PyTree) -> str:
    """HTML of the model's tree, each leaf, projection and array marked with its name."""
    leaves = {name for name in sites(model) if name.endswith((*LEAVES, *PROJECTIONS))}
    names: dict[str, str] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        names[jax.tree_util.keystr(path)] = path_name(path)
        for length in range(1, len(path)):
            if path_name(path[:length]) in leaves:
                names[jax.tree_util.keystr(path[:length])] = f"{path_name(path[:length])}  (site)"

    def name_beside(*, node: Any, path: str | None, node_renderer: Any) -> PyTree:
        if path not in names:
            return NotImplemented
        rendered = node_renderer(node, path=path)
        comment = rendering_parts.comment_color(rendering_parts.text(f"  # {names[path]}"))
        return rendering_parts.RenderableAndLineAnnotations(
            renderable=rendered.renderable, annotations=rendering_parts.siblings(comment, rendered.annotations)
        )

    renderer = treescope.active_renderer.get().extended_with(wrapper_hooks=[name_beside])
    with treescope.active_renderer.set_scoped(renderer):
        return treescope.render_to_html(model, compressed=False)
