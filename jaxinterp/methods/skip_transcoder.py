"""Skip transcoder: a transcoder with a linear path beside the sparse one.

    y ≈ s_out (z D + b_D + x' S) + mean_out

The skip path S starts at 0 and takes the part of the MLP that is linear, which sparse features are a poor way to write.

Source: Paulo, Shabalin, Belrose 2025 (arXiv 2501.18823).
"""

from dataclasses import dataclass

from jaxinterp.data.batch import Sites
from jaxinterp.methods.base import Recipe
from jaxinterp.methods.dictionary import DictionaryHyperparameters, dictionary_recipe
from jaxinterp.methods.transcoder import start


@dataclass(frozen=True)
class SkipTranscoder(DictionaryHyperparameters):
    """Hyperparameters of a skip transcoder."""

    def needs(self, site: str) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{site}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the objective."""
        return dictionary_recipe(
            self, lambda key, sample, model: start(self, key, sample, skip=True), steps, unit_norm=False
        )
