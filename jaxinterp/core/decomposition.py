"""What a decomposition is, as protocols: nothing is inherited, and each reader names the protocol that it needs.

    Codes           what `encode` returns: how strongly each component is active for each token
    Decomposition   encodes, decodes, and can replace the leaf where it was learned
    Target          what a reconstruction is measured against
    Vectors         read and write vectors, one row a feature;  Shown: a decomposition with vectors
    Features        vectors that codes are multiplied with
    Revivable       features that may die and be trained again;  Normalised: and that see their input normalised

A decomposition's fields say by their marks (`core.fields`) how they are trained and where they lie on a mesh, so that
the trainer needs no list of names.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.sites import Sites


@runtime_checkable
class Codes(Protocol):
    """How strongly each component of a decomposition is active for each token; active: its value is not zero.

    Ours are `SparseCodes` and `DenseCodes` of `decompositions.codes`, and `LayerCodes`, of several layers.

    Attributes:
      features: the number of components.
      capped: whether there is a limit of active components that tokens should not reach.
    """

    @property
    def features(self) -> int: ...
    @property
    def capped(self) -> bool: ...

    def dense(self) -> Float[Array, "*axes features"]:
        """One value per feature."""
        ...

    def weighted(self, per_feature: Float[Array, " features"]) -> Float[Array, "*axes"]:
        """Per token, the sum of its values times a number of each feature."""
        ...

    def active(self) -> Float[Array, "*axes"]:
        """The number of active features of each token."""
        ...

    def smallest(self) -> Float[Array, "*layers"]:
        """The smallest positive value, 0 where there is none; one a layer of codes of several layers."""
        ...

    def fired(self, weight: Float[Array, "*axes"]) -> Float[Array, " features"]:
        """How many tokens (by weight) each feature is active on."""
        ...


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

    def encode_among(self, x: PyTree, allowed: Bool[Array, " features"], k: int) -> Codes:
        """The k largest positive codes of each token among the allowed features."""
        ...


@runtime_checkable
class Normalised(Revivable, Protocol):
    """Features that see their input normalised, and decide by a linear map of it; read by `ghost`."""

    encoder_bias: PyTree

    def normalise(self, x: PyTree) -> PyTree:
        """What `encoder` is multiplied with, of the shape of x."""
        ...
