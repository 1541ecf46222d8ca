"""What every decomposition is: a pytree that encodes, decodes, and can stand where it was learned.

A decomposition's fields say by their metadata how they are trained and where they lie on a mesh, so that the trainer
needs no list of names.
"""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from jaxinterp.core.batch import Sites
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
