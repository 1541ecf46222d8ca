"""From arrays in files to the leaves of a model, read lazily and placed where they belong.

A leaf reads only the part that its device asks for: on a pod, a process touches only the bytes of its own shards. What
a file calls the array, and how it lays it out, stands in a table per family (`families.py`, `gguf_file.py`): leaf name
-> (tensor name, layout), `*` standing for the number of the layer. Every array is a copy; nothing aliases a file.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.trees import fill_leaves, named_leaves
from jaxinterp.models.transformer import Transformer, TransformerConfig, initialise

Rows = slice | np.ndarray
Sharding = jax.sharding.Sharding


@runtime_checkable
class Placement(Protocol):
    """Says where every leaf of a model lies: `of(model)` maps each leaf's name to its sharding."""

    def of(self, model: PyTree) -> Mapping[str, Sharding]: ...


Shardings = Sharding | Placement | Callable[[str, tuple[int, ...]], Sharding] | None
"""None: the default device. A sharding: for every leaf. A placement (`training.mesh.model_shardings`) or a function
from a leaf's name and shape: the sharding of each leaf."""


@dataclass(frozen=True)
class StoredTensor:
    """One array in a file, not read yet.

    `read(rows, columns)` copies a part of it; `columns` None: whole rows. `refusal` says why the
    array's type cannot be read as numbers, where it cannot. `kind`: the type that the file keeps it in, where it is
    quantised.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    read: Callable[[Rows, slice | None], np.ndarray]
    refusal: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Layout:
    """How a file keeps one of our arrays: a matrix `(d_in, d_out)` or a vector `(d_out,)`.

    Attributes:
      transposed: the file's matrix is `(d_out, d_in)`, as PyTorch's linear layers are.
      order: which of the file's outputs are ours.
        "stored": all, in order.
        "stacked": those of the linear maps in `stack` stand one after the other; ours is number `part` (GPT-2, Phi-3).
        "interleaved": every head holds its query, key and value; ours is `part` of every head (GPT-NeoX), of `parts`.
        "alternating": one of each map in turn; ours begins with number `part` of `parts` (the experts of gpt-oss).
        "rotary_pairs": within a head, the file has dimension i next to i + head_dim / 2 (Llama in GGUF files, for
          the rotation of neighbours); ours are half a head apart.
      part: which of the maps in the file's array is ours: 0, 1 or 2 for query, key or value.
      stack: names of the maps of a stack.
      sizes: how many outputs each of them has; `sized` fills it in.
      parts: how many maps are interleaved or alternate.
      skip: rows of the file's matrix before our first one (OPT's positions).

    A leaf of three axes is a stack of matrices, one an expert; its layout is that of each matrix.
    """

    transposed: bool = False
    order: Literal["stored", "stacked", "interleaved", "rotary_pairs", "alternating"] = "stored"
    part: int = 0
    stack: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    parts: int = 3
    skip: int = 0

    def sized(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> "Layout":
        """The layout of our leaf `name` with the sizes that its neighbours in the stack have in the model."""
        sublayer, _, kind = name.rpartition("/")
        sublayer = sublayer.rpartition("/")[0]
        return replace(self, sizes=tuple(shapes[f"{sublayer}/{each}/{kind}"][-1] for each in self.stack))

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the file's array must have, where ours has `shape`."""
        several = self.parts * shape[-1]
        outputs = {"stacked": sum(self.sizes), "interleaved": several, "alternating": several}
        shape = (
            (shape[0] + self.skip, *shape[1:-1], outputs.get(self.order, shape[-1]))
            if len(shape) > 1
            else (outputs.get(self.order, shape[-1]),)
        )
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape

    def file_outputs(self, start: int, stop: int, outputs: int, head_dim: int) -> Rows:
        """Where the file keeps our outputs start..stop, of `outputs` in all."""
        if self.order == "stored":
            return slice(start, stop)
        if self.order == "stacked":
            before = sum(self.sizes[: self.part])
            return slice(before + start, before + stop)
        ours = np.arange(start, stop)
        if self.order == "alternating":
            return self.parts * ours + self.part
        head, within = ours // head_dim, ours % head_dim
        if self.order == "interleaved":
            return (self.parts * head + self.part) * head_dim + within
        half, pair = within // (head_dim // 2), within % (head_dim // 2)
        return head * head_dim + 2 * pair + half


PLAIN = Layout()
TRANSPOSED = Layout(transposed=True)
LeafTable = Mapping[str, tuple[str, Layout]]


def read_leaf(
    stored: StoredTensor, layout: Layout, index: tuple[slice, ...], shape: tuple[int, ...], head_dim: int
) -> np.ndarray:
    """Part `index` of our array of `shape`, read from the file's array; other parts are not touched."""
    start, stop, _ = index[-1].indices(shape[-1])
    outputs = layout.file_outputs(start, stop, shape[-1], head_dim)
    if len(shape) == 1:
        return stored.read(outputs, None)
    inputs = slice(*index[0].indices(shape[0]))
    if len(shape) > 2:  # whole matrices are read
        matrices = stored.read(inputs, None)
        return (matrices.swapaxes(-1, -2) if layout.transposed else matrices)[:, *index[1:-1], outputs]
    inputs = slice(inputs.start + layout.skip, inputs.stop + layout.skip)
    if layout.transposed:
        return stored.read(outputs, inputs).T
    if isinstance(outputs, slice):
        return stored.read(inputs, outputs)
    return stored.read(inputs, slice(None))[:, outputs]


def check_leaf(stored: StoredTensor, layout: Layout, shape: tuple[int, ...]) -> None:
    """Raises UserError if the file's array has another shape than ours calls for, or is not readable as numbers."""
    wanted = layout.file_shape(shape)
    if stored.shape != wanted:
        raise UserError(
            f"{stored.file}: tensor {stored.name!r} has shape {list(stored.shape)}, but the configuration calls for "
            f"{list(wanted)}: the configuration and the weights do not belong together."
        )
    if stored.refusal is not None:
        raise UserError(f"{stored.file}: tensor {stored.name!r} {stored.refusal}")


def skeleton(config: TransformerConfig) -> Transformer:
    """The model that `config` describes, made of shapes."""
    return jax.eval_shape(partial(initialise, config), jax.random.key(0))


def leaf_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every leaf of the model that `config` describes."""
    return {name: leaf.shape for name, leaf in named_leaves(skeleton(config)).items()}


def load_model(
    config: TransformerConfig,
    tensors: Mapping[str, StoredTensor],
    table: LeafTable | None,
    *,
    where: Path,
    buffers: str | None = None,
    dtype: DTypeLike = jnp.float32,
    sharding: Shardings = None,
) -> Transformer:
    """The model that `config` describes, its leaves read from `tensors` as `table` says.

    Everything is checked before the first array is read.

    Args:
      table: where each leaf is found; None where the file uses our own names and layouts.
      where: the file or directory, for messages.
      buffers: a regular expression for tensors that carry no weights (masks, rotary frequencies).
      dtype: of every leaf.
      sharding: one sharding for all leaves, a placement, a function from a leaf's name and shape, or None.
    Raises:
      UserError: a tensor is missing, unknown, of the wrong shape or of a type that holds no plain numbers.
    """
    tensors = tensors if table is None else with_stacks(tensors, table)
    if config.layers > len(tensors):
        raise UserError(f"{where}: the configuration has layers={config.layers}, but there are {len(tensors)} tensors.")
    whole = skeleton(config)
    shapes = {name: leaf.shape for name, leaf in named_leaves(whole).items()}
    placed = shardings_of(whole, sharding)
    sources: dict[str, tuple[StoredTensor, Layout]] = {}
    used = set()
    for name, shape in shapes.items():
        tensor_name, layout = (name, PLAIN) if table is None else look_up(table, name)
        if tensor_name not in tensors:
            raise UserError(f"{where}: missing tensor {tensor_name!r}.{suggest(tensor_name, tensors)}")
        sources[name] = tensors[tensor_name], layout.sized(name, shapes)
        used.add(tensor_name)
        check_leaf(*sources[name], shape)
        _check_sharding(name, shape, placed[name])
    refuse_unknown(tensors, used, buffers, where)
    return fill_leaves(
        whole,
        {name: _place(*sources[name], shape, config.head_dim, dtype, placed[name]) for name, shape in shapes.items()},
    )


def with_stacks(tensors: Mapping[str, StoredTensor], table: LeafTable) -> dict[str, StoredTensor]:
    """The tensors, those that a `#` in the table stands for stacked into one, in the order of their numbers.

    Raises:
      UserError: a number is missing, or two of a stack have different shapes.
    """
    found = dict(tensors)
    for template in {name for name, _ in table.values() if "#" in name}:
        expression = re.compile(re.escape(template).replace(r"\*", r"(\d+)").replace(r"\#", r"(\d+)"))
        stacks: dict[str, dict[int, StoredTensor]] = {}
        for name in [name for name in found if expression.fullmatch(name)]:
            *layer, number = expression.fullmatch(name).groups()  # type: ignore[union-attr]
            whole = template.replace("*", layer[0]) if layer else template
            stacks.setdefault(whole, {})[int(number)] = found.pop(name)
        found |= {name: _stack(name, members) for name, members in stacks.items()}
    return found


def _stack(name: str, members: Mapping[int, StoredTensor]) -> StoredTensor:
    """One tensor of several, the first axis their number."""
    first = members[min(members)]
    if sorted(members) != list(range(len(members))):
        missing = next(number for number in range(len(members)) if number not in members)
        raise UserError(f"{first.file}: missing tensor {name.replace('#', str(missing))!r}.")
    for member in members.values():
        if member.shape != first.shape:
            raise UserError(
                f"{member.file}: tensor {member.name!r} has shape {list(member.shape)}, but {first.name!r} "
                f"{list(first.shape)}."
            )

    def read(rows: Rows, columns: slice | None) -> np.ndarray:
        numbers = np.arange(len(members))[rows]
        stacked = np.stack([members[int(number)].read(slice(None), None) for number in numbers])
        return stacked if columns is None else stacked[:, columns]

    refusals = [member.refusal for member in members.values() if member.refusal]
    return StoredTensor(name, first.file, (len(members), *first.shape), read, refusals[0] if refusals else None)


def split_experts(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`experts.gate_up_proj` [experts, 2 hidden, d] and `experts.down_proj` as the stacks of matrices that they are.

    Some files keep a mixture's experts so, under no number: `experts.#.gate_proj.weight` is the name of the stack here.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        where, _, kind = name.rpartition(".")
        if not where.endswith(".experts") or kind not in ("gate_up_proj", "down_proj") or len(tensor.shape) != 3:
            continue
        del found[name]
        if kind == "down_proj":
            found[f"{where}.#.down_proj.weight"] = tensor
            continue
        half = tensor.shape[1] // 2
        for part, start in (("gate_proj", 0), ("up_proj", half)):

            def read(rows: Rows, columns: slice | None, start: int = start, whole: StoredTensor = tensor) -> np.ndarray:
                part = whole.read(rows, None)[:, start : start + whole.shape[1] // 2]
                return part if columns is None else part[:, columns]

            shape = (tensor.shape[0], half, tensor.shape[2])
            found[f"{where}.#.{part}.weight"] = StoredTensor(name, tensor.file, shape, read, tensor.refusal)
    return found


def look_up(table: LeafTable, name: str) -> tuple[str, Layout]:
    """The tensor and layout of our leaf `name`, the number of its layer put in."""
    number = re.match(r"blocks/(\d+)/", name)
    template, layout = table[re.sub(r"^blocks/\d+/", "blocks/*/", name)]
    return (template.replace("*", number.group(1)) if number else template), layout


def refuse_unknown(tensors: Collection[str], used: Collection[str], buffers: str | None, where: Path) -> None:
    """Raises UserError if a tensor is neither used nor a known buffer: it would change the computation."""
    for name in tensors:
        if name not in used and not (buffers and re.fullmatch(buffers, name)):
            raise UserError(
                f"{where}: unknown tensor {name!r}: the configuration has no place for it, and leaving it out would "
                "change the computation."
            )


def default_dtype(sharding: Shardings = None) -> Any:
    """float32 on CPU (XLA's CPU bfloat16 is slower), bfloat16 on TPU and GPU."""
    token = {"embedding": {"token": jax.ShapeDtypeStruct((), jnp.float32)}}
    example = shardings_of(token, sharding)["embedding/token"]
    device: Any = jax.devices()[0] if example is None else next(iter(example.device_set))
    return jnp.float32 if device.platform == "cpu" else jnp.bfloat16


def shardings_of(model: PyTree, sharding: Shardings) -> dict[str, Sharding | None]:
    """The sharding of every leaf of a model (of arrays or shapes), by name."""
    if isinstance(sharding, Placement):
        return dict(sharding.of(model))
    leaves = named_leaves(model)
    if sharding is None or isinstance(sharding, Sharding):
        return dict.fromkeys(leaves, sharding)
    return {name: sharding(name, leaf.shape) for name, leaf in leaves.items()}


def _check_sharding(name: str, shape: tuple[int, ...], wanted: Sharding | None) -> None:
    if wanted is not None:
        try:
            wanted.shard_shape(shape)
        except ValueError as error:
            raise UserError(
                f"sharding: leaf {name!r} of shape {list(shape)} cannot be split as asked: {error}"
            ) from error


def _place(
    stored: StoredTensor,
    layout: Layout,
    shape: tuple[int, ...],
    head_dim: int,
    dtype: DTypeLike,
    sharding: Sharding | None,
) -> jax.Array:
    """The array on the default device, or straight into `sharding`: every shard reads only its own part."""

    def read(index: Any) -> np.ndarray:
        return _filled(stored, layout, index, shape, head_dim, dtype)

    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, read)


AT_ONCE = 2**20
"""Numbers that are read and dequantised at once: what loading needs beyond the model and one leaf, times about 25."""


def _filled(
    stored: StoredTensor,
    layout: Layout,
    index: tuple[slice, ...],
    shape: tuple[int, ...],
    head_dim: int,
    dtype: DTypeLike,
) -> np.ndarray:
    """`read_leaf` in `dtype`, a few rows of the file at a time: no array of the leaf's size beside the leaf."""
    spans = [axis.indices(size) for axis, size in zip(index, shape, strict=True)]
    sizes = tuple(stop - start for start, stop, _ in spans)
    found = np.empty(sizes, dtype)
    if not shape or not found.size:
        found[...] = read_leaf(stored, layout, index, shape, head_dim) if shape else stored.read(slice(None), None)
        return found
    axis = len(shape) - 1 if layout.transposed and len(shape) == 2 else 0
    step = max(1, AT_ONCE * sizes[axis] // found.size)
    for at in range(0, sizes[axis], step):
        start = spans[axis][0] + at
        part = (*index[:axis], slice(start, min(start + step, spans[axis][1])), *index[axis + 1 :])
        rows = read_leaf(stored, layout, part, shape, head_dim)
        found[(slice(None),) * axis + (slice(at, at + step),)] = rows
    return found
