"""Product-key neurons in place of an MLP: thousands of single neurons, of which every token uses a few.

    y' = sum over channels and chosen neurons of a_n v_n + b
    a_n = s_n (x' . u_n)  (linear: sgatlin)   or   softmax(s)_n gelu(x' . u_n)  (peer)

x' normalised; u_n, v_n: read and write vectors, `read` and `write` [features, d]; the scores s and the choice by
product keys are those of `jaxinterp.models.mixtures.product_keys`. The loss is |y - ŷ|^2 over the target's variance.
In the papers the layer is trained inside a language model; here it learns one MLP of a model that is there.

Start: write vectors 0, the rest normal with standard deviation 1/sqrt(what is read) (keys: 1).

Source: Schug 2026 (arXiv 2606.07414): 16 channels, 8 neurons each, d_key 128. He 2024 (PEER, arXiv 2407.04153).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Site, Sites
from jaxinterp.decompositions.product_key_neurons import ProductKeyNeurons
from jaxinterp.decompositions.scales import moments, scales_of
from jaxinterp.methods.checks import check_one_of, check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import gradient_method, warmup_linear
from jaxinterp.models.mixtures.product_keys import (
    Kind,
    random_product_keys,
)
from jaxinterp.objectives import reconstruction, total


@dataclass(frozen=True)
class ProductKeyNeuronsMethod:
    """Hyperparameters. There are n^2 neurons for every channel (peer: n^2 in all)."""

    n: int = 32
    """Keys on each side."""
    channels: int = 4
    """Independent choices a token."""
    knn: int = 8
    """Neurons that each channel uses."""
    d_key: int = 128
    """Width of the router."""
    kind: Kind = "linear"
    """Linear neurons, or GELU neurons weighted by a softmax (peer)."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_whole(self, n=1, channels=1, knn=1, d_key=1)
        check_one_of(self, "kind", ("linear", "peer"))
        check_positive(self, "learning_rate")
        if self.knn > self.n:
            raise UserError(f"knn={self.knn} must be at most n={self.n}, the keys on each side.")

    def needs(self, site: Site) -> Sites:
        """From the MLP's input to its output."""
        return Sites(f"{one_leaf(site)}/in", f"{site}/out")

    def recipe(self, steps: int) -> Recipe:
        """Adam on the reconstruction."""
        optimizer = optax.adam(warmup_linear(self.learning_rate, steps))
        return gradient_method(lambda key, sample, model: start(self, key, sample), total(reconstruction()), optimizer)


def start(method: ProductKeyNeuronsMethod, key: PRNGKeyArray, sample: Batch) -> ProductKeyNeurons:
    """The start values of the module's text, with the means and scales of a sample."""
    x, y = sample.inputs, sample.targets
    d_in, d_out = x.shape[1], y.shape[1]
    layer = random_product_keys(key, d_in, d_out, method.n, method.channels, method.knn, method.d_key, method.kind)
    target_mean, target_variance = moments(y, sample.weight)
    return ProductKeyNeurons(
        scores=layer.scores,
        read=layer.read,
        write=jnp.zeros_like(layer.write),
        bias=jnp.zeros(d_out, jnp.float32),
        scales=scales_of(x, y, sample.weight),
        target_mean=target_mean,
        target_variance=target_variance,
        knn=method.knn,
        kind=method.kind,
        sites=sample.sites,
    )
