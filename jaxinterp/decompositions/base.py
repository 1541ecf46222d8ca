"""What every decomposition is: a pytree that encodes, decodes, and can stand where it was learned.

A decomposition's fields say by their metadata how they are trained and where they lie on a mesh, so that the trainer
needs no list of names.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Int, PyTree

from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE, STATE_ROWS, per_feature, trainable
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.codes import Codes, SparseCodes

__all__ = [
    "PARAMETER",
    "PARAMETER_ROWS",
    "STATE",
    "STATE_ROWS",
    "Decomposition",
    "Features",
    "Normalised",
    "Revivable",
    "Shown",
    "Target",
    "Vectors",
    "per_feature",
    "trainable",
]


@runtime_checkable
class Decomposition(Protocol):
    """A pytree with codes in its middle: `decode(encode(x), x)` approximates what `sites.writes` holds.

    Called by `total` (in training), by the scoreboard, by `StandIn`, `Through` and `run_with` (in a model).

    Attributes:
      sites: the arrays that it reads and writes.
      target_mean: `[d_out]`, the mean of the target over the training tokens: what mean ablation puts in its place. A
        tuple of them where it writes several arrays.
    """

    sites: Sites
    target_mean: PyTree

    def encode(
        self, x: PyTree, *, k: Int[Array, ""] | None = None, weight: Array | None = None, training: bool = False
    ) -> Codes:
        """The codes of x.

        Args:
          x: `[..., d_in]`, any leading axes; a tuple of arrays where it reads several.
          k: how many features to keep, where their number is chosen; at most its own.
          weight: `[...]`, which tokens count, where the codes of one token depend on the others.
          training: whether codes may depend on the whole batch.
        Returns:
          Codes with the leading axes of x.
        """
        ...

    def decode(self, codes: Codes, x: PyTree) -> PyTree:
        """What the codes say the target is, `[..., d_out]`; x is there for paths beside the codes."""
        ...

    def __call__(self, x: PyTree) -> PyTree:
        """decode(encode(x), x), in the dtype of x: it can replace the leaf where it was learned.

        One that takes `tap` besides offers its codes (`offered.replaced` does it for all).
        """
        ...


@runtime_checkable
class Target(Protocol):
    """What a reconstruction is measured against; read by `reconstruction` and every other squared error.

    Attributes:
      target_mean: as in `Decomposition`.
      target_variance: `[]`, the mean over training tokens of |y - mean|^2; positive, constant during training.
    """

    target_mean: PyTree
    target_variance: PyTree


@runtime_checkable
class Vectors(Protocol):
    """What has vectors, one row a feature; read by `l1`, by cosines and graphs.

    Attributes:
      encoder: `[features, d_in]`, read vectors; decoder: `[features, d_out]`, write vectors.
    """

    encoder: PyTree
    decoder: PyTree


@runtime_checkable
class Shown(Decomposition, Vectors, Protocol):
    """A decomposition with vectors: what feature pages read."""


@runtime_checkable
class Features(Vectors, Protocol):
    """Vectors that codes are multiplied with; read by terms that add up a part of the codes.

    Attributes:
      features: how many; `decoder` is in the units in which `combine` adds up.
    """

    @property
    def features(self) -> int:
        """The number of rows."""
        ...

    def combine(self, codes: Codes) -> PyTree:
        """sum_j z_j D_j, `[..., d_out]`: `decode` without biases, scales and paths beside the codes."""
        ...


@runtime_checkable
class Revivable(Features, Target, Protocol):
    """Features that may die and be trained again; read by `auxk`, `ghost` and `Resampling`.

    Attributes:
      tokens_since_fired: `[features]`, integers, counted by the method's `after_step`.
      output_scale: `[]`, target units per unit of `combine`.
    """

    tokens_since_fired: PyTree
    output_scale: PyTree

    def encode_among(self, x: PyTree, allowed: Bool[Array, " features"], k: int) -> SparseCodes:
        """The k largest positive codes of each token among the allowed features."""
        ...


@runtime_checkable
class Normalised(Revivable, Protocol):
    """Features that see their input normalised, and decide by a linear map of it; read by `ghost`."""

    encoder_bias: PyTree

    def normalise(self, x: PyTree) -> PyTree:
        """What `encoder` is multiplied with, of the shape of x."""
        ...
