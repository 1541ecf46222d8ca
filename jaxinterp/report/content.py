"""What a report says, as plain frozen data; how it looks is the business of the other modules here.

Everything is a number, a string or a tuple of those, so that a report can be written without a model, a decomposition
or an accelerator at hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.evaluation.effects import Effect


@dataclass(frozen=True)
class TokenContext:
    """A snippet of text with the feature's activation at every token; `peak` is the index of the marked token."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int

    def __post_init__(self) -> None:
        """Raises UserError if the fields contradict each other."""
        if len(self.tokens) != len(self.activations):
            raise UserError(
                f"activations has {len(self.activations)} entries for {len(self.tokens)} tokens: give one each."
            )
        if not 0 <= self.peak < len(self.tokens):
            raise UserError(f"peak={self.peak} is not an index into {len(self.tokens)} tokens.")

    def __str__(self) -> str:
        """One line: `7.53  ... returns the [[ number]] of rows`."""
        marked = [f"[[{token}]]" if place == self.peak else token for place, token in enumerate(self.tokens)]
        return f"{self.activations[self.peak]:.3g}  {''.join(marked)}".replace("\n", "\\n")


@dataclass(frozen=True)
class NeuronMatch:
    """One MLP neuron and how it lies to the feature: cosines with its write vector and its read vector, in [-1, 1].

    A cosine is None where the two vectors live in different spaces.
    """

    index: int
    write_cosine: float | None
    read_cosine: float | None


@dataclass(frozen=True)
class FeaturePage:
    """One feature: how often it fires, where it fires most, and what it writes.

    density           the fraction of held-out tokens on which it fires, in [0, 1]
    max_activation    its largest activation on those tokens
    histogram_edges   [bins + 1] edges, histogram_counts [bins] counts, of the non-zero activations
    raised, lowered   (token, logit) by the direct path, strongest first
    later_raised, later_lowered   (token, nats) through all later layers: what its ablation takes away from the
                      log-probability of the next token, where it fires; empty where it was not measured
    quantiles         contexts of weaker firings too: (name, contexts), such as ("median", (...))
    read_write_cosine the cosine of its read and write vectors, None where their dimensions differ
    """

    index: int
    density: float
    max_activation: float
    contexts: tuple[TokenContext, ...]
    histogram_edges: tuple[float, ...]
    histogram_counts: tuple[int, ...]
    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]
    neurons: tuple[NeuronMatch, ...]
    read_write_cosine: float | None
    quantiles: tuple[tuple[str, tuple[TokenContext, ...]], ...] = ()
    later_raised: tuple[tuple[str, float], ...] = ()
    later_lowered: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError if the histogram's edges and counts do not fit together."""
        if self.histogram_counts and len(self.histogram_edges) != len(self.histogram_counts) + 1:
            raise UserError(
                f"feature {self.index}: histogram_edges has {len(self.histogram_edges)} entries for "
                f"{len(self.histogram_counts)} counts: give one more edge than counts."
            )


@dataclass(frozen=True)
class Report:
    """A whole report.

    facts       what was run, in the order to be shown: model, site, method, features, k, tokens, seed, corpus hash,
                versions, command
    scoreboard  one mapping a row; the first is the trained decomposition, the rest are baselines. Keys: method, fvu,
                fvu_interval [low, high], l0, dead_fraction, ce_clean, ce_replaced, ce_replaced_interval, ce_zero,
                ce_mean, ce_recovered_zero, ce_recovered_mean, kl, top1_agreement, tokens, seconds. Of an encoder
                similarity_replaced and so on in place of ce_replaced and so on. A value may be None.
    curves      the rows of the training log: step, tokens, loss, fvu, l0, dead_fraction, tokens_per_second
    densities   the firing frequency per held-out token of every feature, 0 for a dead one
    effect      with which the scoreboard was measured: its columns and words; None: the listed one whose keys it has
    """

    title: str
    subtitle: str
    facts: Mapping[str, str]
    scoreboard: Sequence[Mapping[str, Json]]
    curves: Sequence[Mapping[str, Json]]
    densities: Float[np.ndarray, " features"]
    features: tuple[FeaturePage, ...]
    effect: Effect | None = None
