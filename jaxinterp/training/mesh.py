"""The mesh: which devices, which axes, and where each leaf of the training state lies. The one file that knows.

Axes: `data` (tokens) and `feature` (dictionary rows). Methods and objectives see whole arrays.
"""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.decompositions.base import per_feature
from jaxinterp.errors import UserError
from jaxinterp.trees import named_leaves, path_name


def make_mesh(data: int = 1, feature: int = 1) -> Mesh:
    """A mesh of data * feature devices.

    Raises:
      UserError: there are fewer devices.
    """
    devices = jax.devices()
    if data * feature > len(devices) or data < 1 or feature < 1:
        raise UserError(
            f"mesh data={data},feature={feature} needs {data * feature} devices, but there are {len(devices)}."
        )
    # Auto axes: explicit ones refuse operations of third-party layers.
    return jax.make_mesh(
        (data, feature), ("data", "feature"), axis_types=(AxisType.Auto,) * 2, devices=devices[: data * feature]
    )


def parse_mesh(text: str) -> Mesh:
    """A mesh from `data=2,feature=4`.

    Raises:
      UserError: not of this form, or an unknown axis.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in ("data", "feature") or not size.isdigit():
            raise UserError(f"mesh {text!r}: write it as data=2,feature=4 (axes data and feature, whole numbers).")
        sizes[axis] = int(size)
    return make_mesh(**sizes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
    """The leading axis is spread over `data`."""
    return NamedSharding(mesh, P("data"))


def check_spread(field: str, value: int, pieces: int, mesh: Mesh, axis: str) -> None:
    """Raises UserError where `pieces` pieces of `field` cannot be spread evenly over a mesh axis."""
    size = mesh.shape[axis]
    if pieces % size:
        raise UserError(
            f"{field}={value} cannot be spread evenly over the mesh axis {axis}={size}: take a multiple of "
            f"{value // pieces * size}."
        )


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where each leaf of a `TrainState` lies: dictionary rows over `feature`, buffer lanes over `data`, the rest whole.

    An optimizer's moments lie as the parameters that they belong to, found by their common name and shape.

    Raises:
      UserError: the dictionary's rows cannot be spread evenly.
    """
    decomposition = getattr(state.method, "decomposition", state.method)
    marks, leaves = named_leaves(per_feature(decomposition)), named_leaves(decomposition)
    rows = {name: leaves[name].shape for name, marked in marks.items() if marked}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        if name.startswith("buffer/"):
            return over_data(mesh)
        if any(name.endswith(f"/{row}") and leaf.shape == shape for row, shape in rows.items()):
            check_spread("features", leaf.shape[0], leaf.shape[0], mesh, "feature")
            return NamedSharding(mesh, P("feature"))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def place_model(model: Any, mesh: Mesh) -> Any:
    """The model on the mesh: leaves that lie on it already stay where they are, the others go to every device."""

    def place(leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        lies = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if lies else jax.device_put(leaf, replicated(mesh))

    return jax.tree.map(place, model)
