"""Activation patterns as specifications (NAP): which neurons are always on, always off, for inputs of one class; and a
proof by interval bounds that inputs with this pattern get this class.

    on  = neurons with a > 0 on at least `share` of the class's inputs,  off likewise with a <= 0
    x follows the pattern where every neuron of `on` is > 0 and every one of `off` is <= 0

    coverage: the share of inputs of the class that follow;  accuracy: the share of followers that are of the class

For a ReLU network z_l = W_l a_{l-1} + b_l, a_l = relu(z_l), bounds of a box go forward as centre and radius; a neuron
of `on` has its lower bound raised to 0, one of `off` gives 0. The class is certain where its logit exceeds every other
one by bounds of the *difference*; an empty intersection (no input of the box follows) is certain, too.

Source: Geng et al. 2023, arXiv 2210.16114 (they solve with Marabou; interval bounds prove less).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxinterp.core.errors import UserError

Layer = tuple[Float[np.ndarray, "_d_in _d_out"], Float[np.ndarray, " _d_out"]]


class Pattern(NamedTuple):
    """Neurons by layer that must be on, and off."""

    on: tuple[Bool[np.ndarray, " _neurons"], ...]
    off: tuple[Bool[np.ndarray, " _neurons"], ...]

    def size(self) -> int:
        """How many neurons it names."""
        return int(sum(each.sum() for each in (*self.on, *self.off)))


def mine_pattern(activations: Sequence[Float[np.ndarray, "inputs _neurons"]], share: float = 1.0) -> Pattern:
    """The pattern of the inputs given, one array a layer; `share` 1: of all of them.

    Raises:
      UserError: share is not above 0.5 and at most 1, or there are no inputs.
    """
    if not 0.5 < share <= 1:
        raise UserError(f"share={share} must lie above 0.5 and at most at 1: a neuron must not be on and off.")
    if not activations or not len(activations[0]):
        raise UserError("activations must hold at least one layer and one input.")
    active = [(np.asarray(layer) > 0).mean(axis=0) for layer in activations]
    return Pattern(tuple(each >= share for each in active), tuple(1 - each >= share for each in active))


def follows(
    pattern: Pattern, activations: Sequence[Float[np.ndarray, "inputs _neurons"]]
) -> Bool[np.ndarray, " inputs"]:
    """Which inputs follow the pattern."""
    kept = np.ones(len(activations[0]), bool)
    for layer, on, off in zip(activations, pattern.on, pattern.off, strict=True):
        active = np.asarray(layer) > 0
        kept &= (active | ~on).all(axis=1) & (~active | ~off).all(axis=1)
    return kept


class Quality(NamedTuple):
    """How much of a class a pattern covers, and how many of its followers are of the class (NaN: none follows)."""

    coverage: float
    accuracy: float


def quality(
    pattern: Pattern,
    activations: Sequence[Float[np.ndarray, "inputs _neurons"]],
    labels: Int[np.ndarray, " inputs"],
    label: int,
) -> Quality:
    """Coverage and accuracy on labelled inputs."""
    kept, own = follows(pattern, activations), np.asarray(labels) == label
    coverage = float((kept & own).sum() / own.sum()) if own.any() else float("nan")
    return Quality(coverage, float((kept & own).sum() / kept.sum()) if kept.any() else float("nan"))


def certified(
    layers: Sequence[Layer],
    low: Float[np.ndarray, " d"],
    high: Float[np.ndarray, " d"],
    label: int,
    pattern: Pattern | None = None,
) -> bool:
    """Whether every x in the box that follows the pattern gets the label, proved by interval bounds.

    Args:
      layers: (weight `(d_in, d_out)`, bias), ReLU between them, none behind the last.
    Raises:
      UserError: the box is empty, or the pattern has another number of layers.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if (low > high).any():
        raise UserError("low must be at most high in every coordinate.")
    hidden = len(layers) - 1
    if pattern is not None and len(pattern.on) != hidden:
        raise UserError(f"pattern has {len(pattern.on)} layers, the network {hidden} hidden ones.")
    for index, (weight, bias) in enumerate(layers[:-1]):
        low, high = _through(low, high, np.asarray(weight, np.float64), np.asarray(bias, np.float64))
        if pattern is not None:
            on, off = pattern.on[index], pattern.off[index]
            if (on & (high <= 0)).any() or (off & (low > 0)).any():
                return True  # nothing in the box follows
            low, high = np.where(on, np.maximum(low, 0), low), np.where(off, np.minimum(high, 0), high)
        low, high = np.maximum(low, 0), np.maximum(high, 0)
    weight, bias = (np.asarray(each, np.float64) for each in layers[-1])
    others = np.arange(weight.shape[1]) != label
    margin, _ = _through(low, high, weight[:, [label]] - weight[:, others], bias[label] - bias[others])
    return bool((margin > 0).all())


def _through(low: np.ndarray, high: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    centre, radius = (low + high) / 2, (high - low) / 2
    middle, spread = centre @ weight + bias, radius @ np.abs(weight)
    return middle - spread, middle + spread
