"""What every decomposition is: a pytree that encodes, decodes, and can stand where it was learned.

A decomposition's fields say by their metadata how they are trained and where they lie on a mesh, so that the trainer
needs no list of names.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE, STATE_ROWS, per_feature, trainable
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import Codes

__all__ = [
    "PARAMETER",
    "PARAMETER_ROWS",
    "STATE",
    "STATE_ROWS",
    "Decomposition",
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
        """decode(encode(x), x), in the dtype of x: it can replace the leaf where it was learned.

        One that takes `tap` besides offers its codes (`offered.replaced` does it for all).
        """
        ...
