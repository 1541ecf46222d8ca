"""A picture of a model: treescope's foldable tree, with the site names written beside the nodes."""

from typing import Any

import jax
import treescope
from treescope import rendering_parts

from jaxinterp.core.trees import path_name
from jaxinterp.models.sites import sites


def show(model: Any) -> str:
    """HTML of the model's tree, each MLP leaf and each array marked with its name.

    In a notebook: `IPython.display.HTML(show(model))`.
    """
    leaves = set(sites(model, "**/mlp"))
    names: dict[str, str] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]:
        names[jax.tree_util.keystr(path)] = path_name(path)
        for length in range(1, len(path)):
            if path_name(path[:length]) in leaves:
                names[jax.tree_util.keystr(path[:length])] = f"{path_name(path[:length])}  (site)"

    def name_beside(*, node: Any, path: str | None, node_renderer: Any) -> Any:
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
