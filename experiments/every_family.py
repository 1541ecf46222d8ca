"""The families that are compared: how each is made at a budget, how it is seen at the MLP's output, what it uses.

Budget: P trained numbers (a dictionary of `features`, d_in + d_out each) and k active components a token. Where a
family has a free size, the size is what makes P of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from jaxinterp.decompositions.at_output import AtOutput, at_output
from jaxinterp.decompositions.experts import Experts
from jaxinterp.decompositions.factor_analysers import FactorAnalysers
from jaxinterp.decompositions.linear_transforms import LinearTransforms
from jaxinterp.decompositions.mixture_of_decoders import MixtureOfDecoders
from jaxinterp.decompositions.mlp_parts import MLPParts
from jaxinterp.decompositions.plain import Neurons, PrincipalComponents
from jaxinterp.methods import Method, SkipTranscoder, SparseAutoencoder
from jaxinterp.methods.factor.experts import HiddenExperts
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod, halving_ranks
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.parameter_training import StochasticParameters, as_decomposition
from jaxinterp.methods.factor.parameters import Coefficients
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.methods.factor.targets import LeafTarget
from jaxinterp.models.sites import select

Placed = Callable[[Any, Any, Array], Any]
"""(what `fit` returned, the model, the output's mean) -> a decomposition that writes the MLP's output."""


@dataclass(frozen=True)
class Shape:
    """Of the MLP: its width, its neurons, how many matrices it has."""

    d: int
    neurons: int
    matrices: int


@dataclass(frozen=True)
class Family:
    """One family at one budget."""

    method: Method
    steps: int
    batch_size: int
    sized: bool = True
    """Whether its size is free: made to fit the parameters. Others are rows of reference."""
    rows: int | None = None
    """How many rows are kept, for methods that sweep over the same ones."""
    solved: bool = False
    """Moments and a solve: no loss that could still fall."""
    place: Placed = lambda found, model, mean: found


def families(
    site: str, shape: Shape, *, features: int, k: int, rate: float, tokens: int, batch_size: int
) -> dict[str, Family]:
    """Every family that is trained or solved, by name. `tokens`: that a dictionary trains on."""
    d, budget, steps = shape.d, 2 * shape.d * features, tokens // batch_size
    half = max(1, k // 2)
    rank = max(2, d // 9)
    part = d + shape.neurons + 3 * 16 + 1
    low = max(2, (budget - rank * d - 2 * d * half) // (2 * d + rank + 2))
    full = max(2, (budget - 2 * d * half) // (3 * d + 2))
    of_keys = lambda n: 8 * d * n**2 + 128 * (d + 8 * n)  # four pools of n^2 neurons, and their router
    keys = max(n for n in range(2, 4 + int((features / 4) ** 0.5)) if n == 2 or of_keys(n) <= 1.05 * budget)
    of_pool = lambda n: 2 * d * n**2 + 256 * (d + n)  # one pool of n^2 neurons, four channels of 32
    pool = max(n for n in range(2, 4 + int(features**0.5)) if n == 2 or of_pool(n) <= 1.05 * budget)
    ranks_of = lambda largest: halving_ranks(largest, max(1, features // 144))
    of_ranks = lambda ranks: 2 * d * sum(ranks) + (d + 1) * len(ranks)  # linear transforms and their gates
    ranks = max(
        (ranks_of(r) for r in range(4, features) if r == 4 or of_ranks(ranks_of(r)) <= 1.02 * budget), key=of_ranks
    )

    def streamed(method: Method) -> Family:
        return Family(method, steps, batch_size)

    experts = lambda number, rank: HiddenExperts(
        experts=number, k=min(half, number), shared=half, rank=rank, learning_rate=rate
    )
    inside = lambda found, model, mean: at_output(found, _mlp(model, site), mean)
    spd = StochasticParameters(
        LeafTarget(site),
        parts=max(2, budget // (shape.matrices * part)),
        coefficients=Coefficients(layerwise=0.0, importance=1e-3),
        learning_rate=rate,
    )
    parts_of = lambda found, model, mean: as_decomposition(found, model, site, mean)
    dead = max(1, tokens // 5)
    return {
        "TopK autoencoder": streamed(SparseAutoencoder(features=features, k=k, learning_rate=rate, dead_after=dead)),
        "skip transcoder": streamed(
            SkipTranscoder(features=max(k, features - d // 2), k=k, learning_rate=rate, dead_after=dead)
        ),
        "semi-NMF": Family(
            SemiNMF(features=max(2, 3 * k // 2), sparsity=0.05, iterations=100),
            steps=max(2, steps // 5),
            batch_size=batch_size,
            rows=min(tokens // 2, 16_384),
            sized=False,
            place=inside,
        ),
        "experts, low-rank router": streamed(experts(low, rank)),
        "experts, full router": streamed(experts(full, None)),
        "interaction basis": Family(
            LocalInteractionBasis(directions=k, probes=4),
            steps=max(2, min(16_384 // batch_size, steps)),
            batch_size=batch_size,
            sized=False,
            solved=True,
            place=inside,
        ),
        "parameter components": Family(spd, steps, max(batch_size // 2, 128), place=parts_of),
        "mixture of decoders": streamed(
            MixtureOfDecodersMethod(features=features // 2, hidden=features // 2, k=k, learning_rate=rate)
        ),
        "product-key neurons": streamed(
            ProductKeyNeuronsMethod(n=keys, channels=4, knn=min(keys, max(1, k // 4)), learning_rate=rate)
        ),
        "product-key GELU neurons": streamed(
            ProductKeyNeuronsMethod(
                n=pool, channels=4, knn=min(pool, max(1, k // 4)), d_key=32, kind="peer", learning_rate=rate
            )
        ),
        "factor analysers": streamed(
            MixtureOfFactorAnalysers(
                regions=max(2, features * 2 // max(k, 2)), rank=max(1, k - 1), port="out", learning_rate=rate
            )
        ),
        "linear transforms": streamed(LinearTransformsMethod(ranks=ranks, k=max(1, k // 4), learning_rate=rate)),
    }


def uses(decomposition: Any, l0: float) -> dict[str, float]:
    """Trained numbers, active components, and the numbers that an average token multiplies with in them.

    Choosing the components (routers, keys, gates, encoders of what is not chosen) is not counted in the last; what
    every token uses (skip paths, shared neurons, the MLP behind an interaction basis) is.
    """
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
    if isinstance(decomposition, Neurons):
        neurons = decomposition.hidden_mean.shape[0]
        return _uses(size(decomposition.mlp), l0, l0 * size(decomposition.mlp) / neurons)
    if isinstance(decomposition, PrincipalComponents):
        return _uses(decomposition.directions.size, l0, l0 * decomposition.directions.shape[1])
    if isinstance(decomposition, AtOutput) and decomposition.port == "hidden":
        kept = float(np.mean(np.sum(np.asarray(decomposition.inner.decoder) != 0, axis=1)))
        return _uses(decomposition.inner.decoder.size, l0, l0 * kept)
    if isinstance(decomposition, AtOutput):
        own = decomposition.inner.encoder.size + decomposition.inner.decoder.size
        return _uses(own, l0, own + size(decomposition.mlp))
    if isinstance(decomposition, MLPParts):
        vectors = size(decomposition.read) + size(decomposition.write)
        return _uses(size(decomposition.importance), l0, l0 * vectors / decomposition.features)
    if isinstance(decomposition, MixtureOfDecoders):
        dense = decomposition.encoder.size + decomposition.decoder.size
        row = (decomposition.gate.size + decomposition.scale.size) / decomposition.features
        return _uses(size(decomposition), l0, dense + l0 * row)
    if isinstance(decomposition, LinearTransforms):
        share = l0 / decomposition.features
        return _uses(size(decomposition), l0, share * (decomposition.read.size + decomposition.write.size))
    width = 2 * decomposition.target_mean.shape[0]
    if isinstance(decomposition, FactorAnalysers):
        return _uses(size(decomposition), l0, l0 * width / 2)
    if isinstance(decomposition, Experts):
        shared = decomposition.shared.encoder.shape[0]
        return _uses(size(decomposition), l0 + shared, (l0 + shared) * width)
    skip = vars(decomposition).get("skip")
    return _uses(size(decomposition), l0, l0 * width + (0 if skip is None else skip.size))


def _uses(parameters: int, active: float, numbers: float) -> dict[str, float]:
    return {"parameters": int(parameters), "active": float(active), "active_parameters": round(numbers)}


def _mlp(model: Any, site: str) -> Any:
    return select(model, site).get()
