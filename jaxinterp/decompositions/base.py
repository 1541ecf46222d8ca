"""What every decomposition is: a pytree that encodes, decodes, and can stand where it was learned.

A decomposition's fields say by their metadata how they are trained and where they lie on a mesh, so that the trainer
needs no list of names.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE, STATE_ROWS, per_feature, trainable
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import Codes

__all__ = [
    "PARAMETER",
    "PARAMETER_ROWS",
    "STATE",
    "STATE_ROWS",
    "Decomposition",
    "StandIn",
    "per_feature",
    "trainable",
]


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
