"""Skip transcoder: a transcoder with a linear path beside the sparse one.

    y ≈ s_out (z D + b_D + x' S) + mean_out,   z = activation(x' E^T + b_E),   x' = (x - mean_in) / s_in

x [tokens, d_in]; y [tokens, d_out]; E [features, d_in], D [features, d_out], S [d_in, d_out], z [tokens, features]. The
loss is the transcoder's; nothing penalises S, which takes the part of the MLP that is linear: sparse features are a
poor way to write it.

Start: E uniform in ±1/sqrt(d_in), D = 0, S = 0, biases 0: as published, where the encoder's bias starts at minus the
mean input's pre-activation (here x is centred).

Defaults: TopK with k = 32, AuxK at 1/32, Adam at 1e-3. EleutherAI's sparsify has no AuxK by default, 32 d features, and
signum at 5e-3 / sqrt(features / 2^14), or Adam at 2e-4 / sqrt(features / 2^14).

Source: Paulo, Shabalin, Belrose 2025 (arXiv 2501.18823) and EleutherAI's sparsify.
"""

from dataclasses import dataclass

from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.activations import Activation
from jaxinterp.methods.checks import check_not_negative, one_leaf
from jaxinterp.methods.sparse.dictionary import (
    Chosen,
    DictionaryFields,
    auxk_of,
    check_choice,
    check_dictionary,
    chosen,
    l1_of,
)
from jaxinterp.methods.sparse.transcoder import transcoder_recipe
from jaxinterp.objectives import Objective, reconstruction, total


@dataclass(frozen=True)
class SkipTranscoder(DictionaryFields):
    """Hyperparameters of a skip transcoder."""

    activation: Chosen = "topk"
    """How codes are made sparse: k a token, k a token on average, by the L1 penalty; or any activation, by value."""
    k: int = 32
    """Active features per token (topk, batch_topk)."""
    l1: float = 0.0
    """Coefficient of the L1 penalty on codes, against a reconstruction in units of the target's variance."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features; 0 switches it off (published: 1/32; for transcoders 0)."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter makes no sense."""
        check_dictionary(self)
        check_choice(self.activation, self.k, self.l1, self)
        check_not_negative(self, "l1", "auxk")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output.

        Raises:
          UserError: the site is not a single leaf.
        """
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def make_activation(self) -> Activation:
        """The activation as the dictionary holds it."""
        return chosen(self.activation, self.k)

    def make_objective(self) -> Objective:
        """reconstruction + l1 * L1 + auxk * AuxK; or the objective that was given."""
        return self.objective or total(reconstruction(), *l1_of(self.l1), *auxk_of(self.auxk, self))

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective."""
        return transcoder_recipe(self.make_activation(), self.make_objective(), self, steps, skip=True)
