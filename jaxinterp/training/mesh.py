"""The mesh: which devices, which axes, and where each leaf of the model and of the training state lies.

The one file that knows. Axes:

    data      tokens; the buffer's lanes; and, beside `feature`, the optimizer's moments
    feature   dictionary rows
    model     the subject model's weights, where they do not fit on one device

Methods and objectives see whole arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import like_parameters, per_feature, per_token
from jaxinterp.core.protocols import MethodState
from jaxinterp.core.trees import named_leaves, path_name
from jaxinterp.kernels.sharded import SPREAD, spread_evenly
from jaxinterp.models.layers import cut_axes

AXES = ("data", "feature", "model")


def make_mesh(data: int = 1, feature: int = 1, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data * feature * model devices.

    Args:
      devices: default: those of this run, of all its processes; others for compiling only.
    Raises:
      UserError: there are fewer devices, or processes would be left without one.
    """
    sizes = {"data": data, "feature": feature, "model": model}
    wanted = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    given = jax.devices() if devices is None else list(devices)
    count = data * feature * model
    if min(sizes.values()) < 1:
        raise UserError(f"mesh {wanted}: every axis must have at least 1 device.")
    if count > len(given):
        raise UserError(f"mesh {wanted} needs {count} devices, but there are {len(given)}.")
    if devices is None and jax.process_count() > 1 and count != len(given):
        raise UserError(
            f"mesh {wanted} has {count} devices, but the processes of this run have {len(given)}: with several "
            "processes all devices take part."
        )
    # Auto axes: explicit ones refuse operations of third-party layers.
    types = (AxisType.Auto,) * len(AXES)
    shape, chosen = tuple(sizes.values()), given[:count]
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=chosen)
    except (NotImplementedError, AssertionError):  # no axis is a product of whole sides of the torus: sides are cut
        if count != len(given):
            raise UserError(
                f"mesh {wanted} has {count} devices, which are no part of a torus of {len(given)}: take all of them."
            ) from None
        arranged = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
        return Mesh(arranged, AXES, axis_types=types)


def mesh_sizes(text: str) -> dict[str, int]:
    """The axes' sizes from `data=2,feature=4`; an axis that is not named has size 1.

    Raises:
      UserError: not of this form, or an unknown axis.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.split(",")):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdigit():
            raise UserError(f"mesh {text!r}: write it as data=2,feature=4 (axes {', '.join(AXES)}; whole numbers).")
        sizes[axis] = int(size)
    return sizes


def parse_mesh(text: str) -> Mesh:
    """A mesh from `data=2,feature=4`.

    Raises:
      UserError: not of this form, an unknown axis, or too few devices.
    """
    sizes = mesh_sizes(text)
    return make_mesh(sizes["data"], sizes["feature"], sizes["model"])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
    """The leading axis is spread over `data`."""
    return NamedSharding(mesh, P("data"))


def data_places(mesh: Mesh, process: int) -> tuple[int, ...]:
    """At which places of `data` a process's devices lie, in rising order: which parts of every global batch it reads.

    Processes whose devices lie at the same places read the same rows. The places need not lie side by side: on a TPU's
    torus a host's chips are a block, and an axis of the mesh may go through it anywhere.
    """
    axis = mesh.axis_names.index("data")
    return tuple(sorted({at[axis] for at, device in np.ndenumerate(mesh.devices) if device.process_index == process}))


def spread_over_data(
    own: Mapping[str, np.ndarray], places: tuple[int, ...], windows: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """Global arrays with so many windows, over `data`, from the rows of a process's places, one place after another."""
    share, lies = windows // mesh.shape["data"], over_data(mesh)
    begins = lambda index: places.index((index[0].start or 0) // share) * share
    part = lambda array, index: array[begins(index) : begins(index) + share]
    put = lambda array: jax.make_array_from_callback((windows, *array.shape[1:]), lies, partial(part, array))
    return {name: put(array) for name, array in own.items()}


def check_spread(field: str, value: int, pieces: int, mesh: Mesh, axis: str) -> None:
    """Raises UserError if `pieces` pieces of `field` cannot be spread evenly over a mesh axis."""
    size = mesh.shape[axis]
    if pieces % size:
        raise UserError(
            f"{field}={value} cannot be spread evenly over the mesh axis {axis}={size}: take a multiple of "
            f"{value // pieces * size}."
        )


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """Where each leaf of a `TrainState` lies.

    Arrays of one row a feature lie over `feature`, the buffer's lanes and arrays of one row a token over `data`, the
    rest on every device: by the marks of their fields. An optimizer's moments that are shaped like their parameter lie
    as it does, and are spread over `data` besides where they can be cut evenly: each device updates its part of them,
    and the updated parameters are gathered.

    Raises:
      UserError: the dictionary's rows, or the kept rows, cannot be spread evenly.
    """

    def rows(leaf: PyTree, field: str, axis: str) -> NamedSharding:
        check_spread(field, leaf.shape[0], leaf.shape[0], mesh, axis)
        return NamedSharding(mesh, P(axis))

    def by_marks(tree: PyTree) -> PyTree:
        def place(leaf: PyTree, of_feature: bool, of_token: bool) -> NamedSharding:
            if of_feature:
                return rows(leaf, "features", "feature")
            return rows(leaf, "rows", "data") if of_token else replicated(mesh)

        return jax.tree.map(place, tree, per_feature(tree), per_token(tree))

    def moment(leaf: PyTree, parameter: PyTree, of_feature: bool) -> NamedSharding:
        if not of_feature or leaf.shape != parameter.shape:
            return replicated(mesh)
        return NamedSharding(mesh, SPREAD) if spread_evenly(leaf.shape[0], mesh) else rows(leaf, "features", "feature")

    def of_method(part: PyTree) -> PyTree:
        if not isinstance(part, MethodState):
            return by_marks(part)
        moments = like_parameters(part.optimizer, part.decomposition, moment, replicated(mesh))
        return MethodState(by_marks(part.decomposition), moments, by_marks(part.aux))

    placed = jax.tree.map(lambda _: replicated(mesh), state)
    method = jax.tree.map(of_method, state.method, is_leaf=lambda part: isinstance(part, MethodState))
    buffer = jax.tree.map(lambda _: over_data(mesh), state.buffer)
    # Not `replace`, which would call the constructor: its annotations are about arrays.
    return eqx.tree_at(lambda s: (s.method, s.buffer), placed, (method, buffer), is_leaf=lambda node: node is None)


@dataclass(frozen=True)
class ModelShardings:
    """Where each leaf of a subject model lies: cut over `model` as its layer allows.

    The layers say it themselves (`Linear.cut`, `Embedding.cuts`): attention heads and hidden activations of an MLP are
    cut, so that a layer needs one sum at its end (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053). A matrix of a
    model of another make is cut along its largest axis; what does not divide, norms and biases lie on every device.
    """

    mesh: Mesh

    def of(self, model: PyTree) -> dict[str, NamedSharding]:
        """The sharding of every array (or `jax.ShapeDtypeStruct`) of the model, by name."""
        axes = cut_axes(model)
        places = {}
        for name, leaf in named_leaves(model).items():
            shape = np.shape(leaf)
            largest = max(range(len(shape)), key=lambda axis: shape[axis]) if len(shape) > 1 else None
            places[name] = self._cut(shape, axes.get(name, largest))
        return places

    def _cut(self, shape: tuple[int, ...], axis: int | None) -> NamedSharding:
        size = self.mesh.shape["model"]
        if size == 1 or axis is None or shape[axis] % size:
            return replicated(self.mesh)
        return NamedSharding(self.mesh, P(*(("model" if each == axis else None) for each in range(len(shape)))))


def model_shardings(mesh: Mesh) -> ModelShardings:
    """Where each leaf of a subject model lies on the mesh: `load(source, sharding=model_shardings(mesh))`."""
    return ModelShardings(mesh)


def place_model(model: PyTree, mesh: Mesh) -> PyTree:
    """The model on the mesh: leaves that lie on it already stay where they are, the others go where they belong."""
    wanted = model_shardings(mesh).of(model)

    def place(path: tuple[PyTree, ...], leaf: PyTree) -> PyTree:
        if not eqx.is_array(leaf):
            return leaf
        lies = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if lies else jax.device_put(leaf, wanted[path_name(path)])

    return jax.tree_util.tree_map_with_path(place, model)


def fetch(tree: PyTree) -> PyTree:
    """Every array of the tree whole and on this process's first device; all processes must call it together."""
    here = jax.local_devices()[0]

    def whole(leaf: PyTree) -> PyTree:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, here)
        if leaf.is_fully_replicated:
            return jax.device_put(leaf.addressable_data(0), here)
        return jax.device_put(multihost_utils.process_allgather(leaf, tiled=True), here)

    return jax.tree.map(whole, tree)
