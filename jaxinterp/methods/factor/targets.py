"""What parameter decompositions need of a model: its matrices, what each reads, and its output with matrices masked.

A target is a frozen dataclass without arrays; the model comes as an argument.

    ToyTarget          models that take `apply` (toy models of superposition), on rows of data
    ProjectionTarget   projections of a language model, on windows of text, by KL of the next token
    LeafTarget         the projections of one MLP, on rows of its input, by the error of its output

The last one is cheap, as the rest of the model is not run. It is not the published objective, which compares outputs
of the whole model: a part that the output needs and the next token doesn't is important here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Needs, Site
from jaxinterp.decompositions.components import Components, Scale
from jaxinterp.decompositions.mlp_parts import mlp_linear, mlp_with
from jaxinterp.methods.factor.parameters import Distance, Mask, Parts, left_over, masked_linear
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace, select


class Clean(NamedTuple):
    """Of the unmasked model: what each matrix reads, the output, and the weight of each input."""

    reads: dict[str, Array]
    output: Array
    weight: Array


@runtime_checkable
class Target(Protocol):
    """How a model is decomposed."""

    @property
    def kind(self) -> Distance:
        """What outputs are compared by."""
        ...

    def needs(self, site: Site = None) -> Needs:
        """Which arrays of the model, and whether windows of text."""
        ...

    def weights(self, model: PyTree) -> dict[str, Float[Array, "_in _out"]]:
        """The matrices that are decomposed, by name."""
        ...

    def clean(self, model: PyTree, batch: Batch) -> Clean:
        """A forward pass of the unmasked model."""
        ...

    def masked(self, model: PyTree, parts: Mapping[str, Parts], batch: Batch, masks: Mapping[str, Mask]) -> Array:
        """The output with the named matrices masked and the others as they are."""
        ...


@dataclass(frozen=True)
class ToyTarget:
    """All matrices of a toy model `model(x, apply)` with `weights()` and `reads(x)`, on the rows of the batch."""

    kind: Distance = "squares"

    def needs(self, site: Site = None) -> Needs:
        """No array; rows are given by hand."""
        return no_site(site)

    def weights(self, model: PyTree) -> dict[str, Float[Array, "_in _out"]]:
        """All matrices of the model."""
        return model.weights()

    def clean(self, model: PyTree, batch: Batch) -> Clean:
        """The model on the batch's inputs."""
        return Clean(model.reads(batch.inputs), model(batch.inputs), batch.weight)

    def masked(self, model: PyTree, parts: Mapping[str, Parts], batch: Batch, masks: Mapping[str, Mask]) -> Array:
        """The model with masked matrices."""
        weights = model.weights()

        def apply(name: str, x: Array) -> Array:
            if name not in masks:
                return x @ weights[name]
            return masked_linear(x, weights[name], parts[name], masks[name])

        return model(batch.inputs, apply)


READS = {"gate_proj": "in", "up_proj": "in", "down_proj": "hidden", "q_proj": "in", "k_proj": "in", "v_proj": "in"}
"""Which array of its sublayer each projection reads; `o_proj` reads z, its heads one after another."""


@dataclass(frozen=True)
class ProjectionTarget:
    """Projections of a language model, `("blocks/1/mlp/up_proj", ...)`, on windows of text, by KL of the next token."""

    projections: tuple[str, ...]
    kind: Distance = "kl"

    def __post_init__(self) -> None:
        """Raises UserError if a name is not that of a projection."""
        for name in self.projections:
            field = name.rpartition("/")[2]
            if field not in READS and field != "o_proj":
                raise UserError(f"projections: {name!r} must end in one of {', '.join([*READS, 'o_proj'])}.")

    def needs(self, site: Site = None) -> Needs:
        """Windows of text: the whole model is run."""
        return no_site(site)

    def weights(self, model: PyTree) -> dict[str, Float[Array, "_in _out"]]:
        """Their matrices, in float32."""
        return {name: self._linear(model, name).weight.astype(jnp.float32) for name in self.projections}

    def clean(self, model: PyTree, batch: Batch) -> Clean:
        """The model on the windows."""
        windows = self._windows(batch)
        trace = run(model, windows["tokens"])
        reads = {}
        for name in self.projections:
            leaf, _, field = name.rpartition("/")
            array = trace[f"{leaf}/{READS.get(field, 'z')}"]
            reads[name] = array.reshape(*array.shape[:2], -1).astype(jnp.float32)
        return Clean(reads, trace.logits.astype(jnp.float32), windows["weight"])

    def masked(self, model: PyTree, parts: Mapping[str, Parts], batch: Batch, masks: Mapping[str, Mask]) -> Array:
        """The logits with masked projections: `Components` in their places, masks as edits of what they offer."""
        replaced, edits = {}, {}
        for name, mask in masks.items():
            own = parts[name]
            replaced[name] = Components.of(
                self._linear(model, name), own.read, own.write, keep_rest=mask.rest is not None
            )
            edits[f"{name}/components"] = Scale(mask.parts)
            if mask.rest is not None:
                edits[f"{name}/rest"] = Scale(mask.rest[..., None])
        tokens = self._windows(batch)["tokens"]
        return run(replace(model, replaced), tokens, edits=edits).logits.astype(jnp.float32)

    def _linear(self, model: PyTree, name: str) -> PyTree:
        return select(model, name).get()

    def _windows(self, batch: Batch) -> dict[str, Array]:
        if batch.windows is None:
            raise UserError("the batch has no windows of text: train with fit(...), which gives them.")
        return batch.windows


@dataclass(frozen=True)
class LeafTarget:
    """All projections of one MLP, by the squared error of its output, in units of the batch's own variance.

    With this unit the distance is the unexplained share (FVU) of the output under the masks.
    """

    site: str
    kind: Distance = "squares"

    def needs(self, site: Site = None) -> Needs:
        """The MLP's input.

        Raises:
          UserError: another site is named.
        """
        if site not in (None, self.site):
            raise UserError(f"site={site!r}: the target is {self.site!r}; give the same name, or leave the site out.")
        return Needs(f"{self.site}/in", f"{self.site}/out")

    def weights(self, model: PyTree) -> dict[str, Float[Array, "_in _out"]]:
        """Its matrices by the names of their fields, in float32."""
        mlp = select(model, self.site).get()
        return {name: mlp_linear(mlp, name).weight.astype(jnp.float32) for name in mlp.projections()}

    def clean(self, model: PyTree, batch: Batch) -> Clean:
        """The MLP on the batch's inputs."""
        mlp = select(model, self.site).get()
        x = batch.inputs.astype(jnp.float32)
        hidden = mlp.hidden(x)
        reads = {name: hidden if name == "down_proj" else x for name in mlp.projections()}
        return Clean(reads, mlp.write(hidden) / self.unit(batch), batch.weight)

    def masked(self, model: PyTree, parts: Mapping[str, Parts], batch: Batch, masks: Mapping[str, Mask]) -> Array:
        """The MLP with masked projections."""
        mlp, weights = select(model, self.site).get(), self.weights(model)

        def linear(name: str, x: Array) -> Array:
            if name not in masks:
                return mlp_linear(mlp, name)(x)
            return masked_linear(x, weights[name], parts[name], masks[name], mlp_linear(mlp, name).bias)

        return mlp_with(mlp, batch.inputs.astype(jnp.float32), linear) / self.unit(batch)

    def unit(self, batch: Batch) -> Float[Array, ""]:
        """The root of the mean over dimensions of the output's variance in the batch."""
        y, weight = batch.targets.astype(jnp.float32), batch.weight / jnp.maximum(jnp.sum(batch.weight), 1)
        return jnp.sqrt(jnp.maximum(jnp.mean(weight @ (y - weight @ y) ** 2), 1e-30))


def no_site(site: Site) -> Needs:
    """Windows of text, and no arrays.

    Raises:
      UserError: a site is named.
    """
    if site is not None:
        raise UserError(f"site={site!r}: the target names its matrices; leave the site out.")
    return Needs(windows=True, rows="none")


def share_left_over(weights: Mapping[str, Float[Array, "_in _out"]], parts: Mapping[str, Parts]) -> Float[Array, ""]:
    """sum |D|^2 / sum |W|^2 over all matrices: how much of the weights is in no part."""
    rest = sum(jnp.sum(left_over(weight, parts[name]) ** 2) for name, weight in weights.items())
    return jnp.asarray(rest / sum(jnp.sum(weight**2) for weight in weights.values()))


def leading_axes(clean: Clean) -> tuple[int, ...]:
    """The axes of the inputs: (batch,) or (batch, seq)."""
    return next(iter(clean.reads.values())).shape[:-1]


def no_gradient(clean: Clean) -> Clean:
    """The same numbers, constants for the gradient."""
    return jax.lax.stop_gradient(clean)
