"""Attention-output sparse autoencoder: a sparse dictionary of what the heads of one attention sublayer say together.

    x = [z^1 ... z^heads] (array "z", before W_O)  or  out (array "out", behind it)
    x ≈ s (f D + b_D) + mean,   f = activation((x - mean) E^T / s + b_E),   |D_j| = 1

z [tokens, heads * head_dim], out [tokens, d_model]; E, D [features, d]. At z every write vector falls into one block a
head, D_j = [D_j^1 ... D_j^heads], so that a feature says which heads it is made of, and its pre-activation falls
exactly into parts by head and by source position: `jaxinterp.evaluation.attention.attribution`.

Defaults: z, TopK with k = 32, AuxK, Adam at 1e-3; start and norms are those of `SparseAutoencoder`. The published ones
were ReLU with an L1 penalty (`activation="relu", l1=...`), Adam at 1.2e-3 with β = (0, 0.9999), batches of 4096,
resampling of dead features (here: AuxK), 24,576 features for GPT2-small's 768 dimensions.

Source: Kissane, Krzyzanowski, Bloom, Conmy, Nanda 2024, arXiv 2406.17759; defaults from the authors' code.
"""

from dataclasses import dataclass
from typing import Literal

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.checks import check_not_negative, check_one_of
from jaxinterp.methods.sparse.dictionary import (
    Chosen,
    DictionaryFields,
    autoencoder_recipe,
    auxk_of,
    check_choice,
    check_dictionary,
    chosen,
    l1_of,
)
from jaxinterp.models.attention import Attention
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.objectives import Objective, reconstruction, total


@dataclass(frozen=True)
class AttentionSparseAutoencoder(DictionaryFields):
    """Hyperparameters of a sparse autoencoder of an attention sublayer."""

    activation: Chosen = "topk"
    """How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""
    array: Literal["z", "out"] = "z"
    """Which array of the sublayer it takes apart: the heads' outputs side by side, or what they add up to."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_choice(self.activation, self.k, self.l1, self)
        check_not_negative(self, "l1", "auxk")
        check_one_of(self, "array", ("z", "out"))

    def needs(self, site: Site) -> Sites:
        """The same array, read and written.

        Raises:
          UserError: the site is not a single attention leaf.
        """
        if not isinstance(site, str) or not site.endswith("/attn"):
            raise UserError(f"site={site!r} is not an attention sublayer: name one leaf, such as blocks/3/attn.")
        return Sites(f"{site}/{self.array}", f"{site}/{self.array}")

    def make_activation(self) -> Activation:
        """The activation as the dictionary holds it."""
        return chosen(self.activation, self.k)

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + auxk * AuxK; or the objective that was given."""
        return self.objective or total(reconstruction(), *l1_of(self.l1), *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective, write vectors of length 1."""
        return autoencoder_recipe(self.make_activation(), self.make_objective(), self, steps)


class AttentionStandIn(eqx.Module):
    """An attention sublayer whose z or out passes through its dictionary; it can stand where the sublayer stood."""

    attention: Attention
    dictionary: Dictionary

    def __check_init__(self) -> None:
        """Raises UserError if the dictionary is not an autoencoder of an attention sublayer's z or out."""
        own = self.dictionary.sites
        if own.reads != own.writes or not str(own.writes).endswith(("/attn/z", "/attn/out")):
            raise UserError(
                f"the dictionary reads {own.reads!r} and writes {own.writes!r}: one that stands in for attention reads "
                "and writes the same array, such as blocks/3/attn/z or blocks/3/attn/out."
            )

    @property
    def sites(self) -> Sites:
        """The input and output of the leaf that it stands for: `replace` puts it nowhere else."""
        leaf = self.dictionary.sites.leaf
        return Sites(f"{leaf}/in", f"{leaf}/out")

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        real: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """The sublayer's output; the codes are offered to `tap`."""
        given: dict[str, PyTree] = {"rules": rules, "real": real, "positions": positions}
        if str(self.dictionary.sites.writes).endswith("/out"):
            return self.dictionary(self.attention(x, **given), tap=tap)

        def through(name: str, value: Array) -> Array:
            if name != "z":
                return value
            return self.dictionary(value.reshape(*x.shape[:2], -1), tap=tap).reshape(value.shape)

        return self.attention(x, tap=through, **given)
