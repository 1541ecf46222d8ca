"""The hierarchy of semi-NMF as a tree: which group belongs to which, and which neurons children share.

    F_(l-1) ≈ G_l F_l
    parent(i) = argmax_j G_l,ij |F_l,j|                                  child i of level l - 1
    share(i)  = G_l,i,parent |F_l,parent| / sum_j G_l,ij |F_l,j|         1: the child is made of one parent alone

Neurons that at least two children of a parent keep are what the children have in common.

Source: Shafran, Geiger, Geva 2025 (arXiv 2506.10920), section on hierarchies; the tree is this project's reading.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.methods.factor.semi_nmf import Factors


class Level(NamedTuple):
    """Of every child: its parent in the level above, and how much of it that parent is."""

    parent: Int[np.ndarray, " children"]
    share: Float[np.ndarray, " children"]


def tree(levels: Sequence[Factors]) -> list[Level]:
    """Parents and shares, from the lowest level up; `levels` as `semi_nmf.hierarchy` returns them."""
    found = []
    for level in levels:
        weights = np.asarray(level.coefficients) * np.linalg.norm(np.asarray(level.features), axis=1)
        parent = weights.argmax(axis=1)
        total = weights.sum(axis=1)
        share = weights[np.arange(len(parent)), parent] / np.where(total > 0, total, 1)
        found.append(Level(parent, share))
    return found


def shared_neurons(
    features: Float[Array | np.ndarray, "children d"], parent: Int[np.ndarray, " children"]
) -> dict[int, list[int]]:
    """Per parent that has two children or more: the neurons that at least two of them keep, the most shared first."""
    kept = np.asarray(features) != 0
    found: dict[int, list[int]] = {}
    for group in np.unique(parent):
        members = kept[parent == group]
        if len(members) < 2:
            continue
        count = members.sum(axis=0)
        order = np.argsort(-count, kind="stable")
        found[int(group)] = [int(neuron) for neuron in order if count[neuron] >= 2]
    return found
