"""The methods of the comparison of all dictionaries, and the settings at which each is trained."""

from statistics import NormalDist
from typing import Any

import jax.numpy as jnp

from jaxinterp.core.errors import UserError
from jaxinterp.methods import (
    GatedSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    Method,
    SkipTranscoder,
    SparseAutoencoder,
    TopAFASparseAutoencoder,
    Transcoder,
)

L1_TRANSCODER = (0.002, 0.006, 0.018)
L1 = (0.002, 0.006, 0.018)
L1_GATED = (0.002, 0.006, 0.018)
AFA = (10.0, 100.0, 1000.0)

FASTER = ("transcoder L1", "relu L1", "gated")
FASTER_BY = 5
"""These train at so many times the learning rate: penalties work through biases, far to go in a short run."""

GROUPS = (4, 10)
"""The fewest and the most groups of Group Bias Adaptation."""


def methods(features: int, l0: int, learning_rate: float, dead_after: int) -> dict[str, dict[str, Method]]:
    """By name and setting: at half of `l0`, at `l0` and at twice of it, or at coefficients that enclose it."""
    shared: dict[str, Any] = {"features": features, "learning_rate": learning_rate, "dead_after": dead_after}
    faster = {"learning_rate": FASTER_BY * learning_rate}
    counts = tuple(max(1, count) for count in (l0 // 2, l0, 2 * l0))

    def by_k(method: Any, **more: Any) -> dict[str, Method]:
        return {f"k {k}": method(k=k, **shared, **more) for k in counts}

    def by_coefficient(method: Any, name: str, values: tuple[float, ...], **more: Any) -> dict[str, Method]:
        # Calibrated at L0 64; fewer active features want a proportionally larger coefficient.
        scaled = [value * 64 / l0 for value in values]
        return {f"{name} {value:.3g}": method(**{name: value}, **(shared | more)) for value in scaled}

    # Target frequencies a factor of a hundred apart from the first group to the last. They add up to as much as four
    # times the L0 asked for: biases that only start to adapt let about half of the target through.
    groups = groups_of(features)
    share = float(jnp.mean(jnp.geomspace(1.0, 0.01, groups)))
    adapted: dict[str, Method] = {
        f"target {count}": GroupBiasAdaptation(
            groups=groups,
            highest=min(0.9, count / features / share),
            lowest=min(0.9, count / features / share) / (100 if groups > 1 else 1),
            every=4,
            rate=0.06,
            gain=0.2,
            **shared,
        )
        for count in (l0, 2 * l0, 4 * l0)
    }
    return {
        "skip transcoder": by_k(SkipTranscoder),
        "transcoder": by_k(Transcoder),
        "transcoder L1": by_coefficient(Transcoder, "l1", L1_TRANSCODER, activation="relu", auxk=0.0, **faster),
        "topk": by_k(SparseAutoencoder),
        "batch topk": by_k(SparseAutoencoder, activation="batch_topk"),
        "relu L1": by_coefficient(SparseAutoencoder, "l1", L1, activation="relu", auxk=0.0, **faster),
        "gated": by_coefficient(GatedSparseAutoencoder, "l1", L1_GATED, **faster),
        "jumprelu": {
            f"target {count}": JumpReLUSparseAutoencoder(
                target_l0=float(count),
                l0=1.0,
                threshold=NormalDist().inv_cdf(1 - min(0.45, 2 * count / features)),
                **shared,
            )
            for count in counts
        },
        "matryoshka": by_k(MatryoshkaSparseAutoencoder),
        "top-AFA": by_coefficient(TopAFASparseAutoencoder, "afa", AFA, cap=min(8 * l0, features - 1)),
        "group bias": adapted,
    }


def groups_of(features: int) -> int:
    """The most groups, up to ten, that divide the features."""
    return max(groups for groups in range(1, GROUPS[1] + 1) if features % groups == 0)


def check_groups(features: int) -> None:
    """Raises UserError if features do not divide into enough groups of one size."""
    if groups_of(features) < GROUPS[0]:
        raise UserError(
            f"features={features} has no divisor from {GROUPS[0]} to {GROUPS[1]}, which group bias needs: take "
            f"{features // GROUPS[1] * GROUPS[1] or GROUPS[1]}, or leave it out (--only)."
        )
