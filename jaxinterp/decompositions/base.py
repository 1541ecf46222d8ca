"""What every decomposition is: a pytree that encodes, decodes, and can stand where it was learned.

A decomposition's fields say by their metadata how they are trained and where they lie on a mesh, so that the trainer
needs no list of names.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.codes import Codes


@runtime_checkable
class Decomposition(Protocol):
    """A pytree with codes in its middle: `decode(encode(x), x)` approximates what `sites.writes` holds.

    `target_mean` is the mean of the target over the training tokens: what mean ablation puts in its place. One that is
    made of read and write vectors has them as `encoder` and `decoder`, one row a component.
    """

    sites: Sites
    target_mean: Float[Array, " d_out"]

    def encode(
        self, x: Any, *, k: Int[Array, ""] | None = None, weight: Array | None = None, training: bool = False
    ) -> Codes:
        """The codes of x. `k`, `weight` and `training` matter to those whose codes depend on them."""
        ...

    def decode(self, codes: Codes, x: Any) -> Any:
        """What the codes say the target is; x is there for paths beside the codes."""
        ...

    def __call__(self, x: Any) -> Any:
        """decode(encode(x), x), in the dtype of x: it can stand where it was learned."""
        ...


PARAMETER = {"trained": True, "per_feature": False}
"""Metadata of a field that the gradient trains: `bias: Array = eqx.field(metadata=PARAMETER)`."""

PARAMETER_ROWS = {"trained": True, "per_feature": True}
"""Likewise, with one row a feature: spread over the mesh axis `feature`."""

STATE = {"trained": False, "per_feature": False}
"""Metadata of a field that the gradient never touches: scales, thresholds, frozen weights."""

STATE_ROWS = {"trained": False, "per_feature": True}
"""Likewise, with one row a feature."""


def trainable(decomposition: Any) -> Any:
    """The filter that keeps untrained leaves out of the gradient: True at every array of a PARAMETER field."""
    return _by_field(decomposition, "trained")


def per_feature(decomposition: Any) -> Any:
    """True at every array with one row a feature."""
    return _by_field(decomposition, "per_feature")


def _by_field(decomposition: Any, flag: str) -> Any:
    def mark(path: tuple[Any, ...], leaf: Any) -> bool:
        node = decomposition
        for key in path:
            field = getattr(type(node), "__dataclass_fields__", {}).get(getattr(key, "name", None))
            if field is not None and flag in field.metadata:
                return bool(field.metadata[flag]) and (
                    eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
                )
            node = (
                getattr(node, key.name) if hasattr(key, "name") else node[getattr(key, "key", getattr(key, "idx", 0))]
            )
        return False

    return jax.tree_util.tree_map_with_path(mark, decomposition)


class StandIn(eqx.Module):
    """A decomposition of something inside an MLP, as a callable that can stand where the whole MLP stood.

    It reads the MLP's input; where the decomposition reads or writes an array further in, the original MLP computes
    the way there and the way on. One that can read a gradient beside its array does without it here.
    """

    mlp: Any
    decomposition: Any

    @property
    def sites(self) -> Sites:
        """The input and output of the leaf that it stands for: `replace` puts it nowhere else."""
        leaf = self.decomposition.sites.leaf
        return Sites(f"{leaf}/in", f"{leaf}/out")

    def __call__(self, x: Float[Array, "*axes d_model"]) -> Float[Array, "*axes d_model"]:
        sites, mlp = self.decomposition.sites.without_gradients, self.mlp
        readers: dict[str, Callable[[Any], Any]] = {"in": lambda x: x, "hidden": mlp.hidden, "out": mlp}
        writers: dict[str, Callable[[Any], Any]] = {"in": mlp, "hidden": mlp.write, "out": lambda y: y}
        for name in (sites.reads, sites.writes):
            if not isinstance(name, str) or _port(name) not in readers:
                raise UserError(f"site {name!r} cannot be reached from an MLP's input: in, hidden and out can.")
        value = self.decomposition(readers[_port(sites.reads)](x))
        return writers[_port(sites.writes)](value.astype(x.dtype))


def _port(name: str) -> str:
    return name.rpartition("/")[2]
