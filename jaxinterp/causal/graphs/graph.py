"""The graph as a value: which nodes there are, and the direct effect of every node on every other.

Nodes in this order: features (by layer, position, index), errors (layer after layer, every position), tokens (every
position), targets. `adjacency[t, s]` is the effect of s on t; rows of errors and tokens are 0. What constants add to a
target is `bias[t]`, what features outside the graph add is `left_out[t]` (0 where all are in it), so that

    sum_s adjacency[t, s] + bias[t] + left_out[t] = value[t]

with value = pre-activation without the encoder's bias, or of a token's logit: the logit minus the mean of all logits,
before a soft cap and without a bias of the unembedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jaxinterp.core.errors import UserError

Kind = Literal["feature", "error", "token", "target"]


@dataclass(frozen=True)
class Node:
    """A node: for a token `index` is its id, for a target the token's id (-1 for a custom vector), for errors -1."""

    kind: Kind
    layer: int
    position: int
    index: int


@dataclass(frozen=True)
class Graph:
    """The module's graph; `layers` is the number of blocks of the model.

    `features` has (layer, position, index) in every row, `activation` and `pre` (pre-activation, with the encoder's
    bias) belong to it. `target_tokens` are ids, -1 for a custom vector; `weight` are the targets' probabilities.
    """

    tokens: Int[np.ndarray, " seq"]
    layers: int
    features: Int[np.ndarray, "features 3"]
    activation: Float[np.ndarray, " features"]
    pre: Float[np.ndarray, " features"]
    target_tokens: Int[np.ndarray, " targets"]
    weight: Float[np.ndarray, " targets"]
    adjacency: Float[np.ndarray, "nodes nodes"]
    bias: Float[np.ndarray, " nodes"]
    left_out: Float[np.ndarray, " nodes"]
    value: Float[np.ndarray, " nodes"]

    @property
    def size(self) -> int:
        """The number of nodes."""
        return self.adjacency.shape[0]

    @property
    def errors(self) -> slice:
        """Where the errors are among the nodes."""
        start = len(self.features)
        return slice(start, start + self.layers * len(self.tokens))

    @property
    def token_nodes(self) -> slice:
        """Where the tokens are among the nodes."""
        return slice(self.errors.stop, self.errors.stop + len(self.tokens))

    @property
    def targets(self) -> slice:
        """Where the targets are among the nodes."""
        return slice(self.token_nodes.stop, self.token_nodes.stop + len(self.target_tokens))

    def nodes(self) -> Iterator[Node]:
        """Every node, in order."""
        yield from (Node("feature", *map(int, row)) for row in self.features)
        for layer in range(self.layers):
            yield from (Node("error", layer, position, -1) for position in range(len(self.tokens)))
        yield from (Node("token", -1, position, int(id)) for position, id in enumerate(self.tokens))
        last = len(self.tokens) - 1
        yield from (Node("target", self.layers, last, int(id)) for id in self.target_tokens)

    def find(self, layer: int, position: int, index: int) -> int:
        """Which node a feature is.

        Raises:
          UserError: it is not active there, or was left out of the graph.
        """
        found = np.flatnonzero((self.features == (layer, position, index)).all(axis=1))
        if not found.size:
            raise UserError(f"feature {index} of layer {layer} at position {position} is not a node of this graph.")
        return int(found[0])

    def weights(self) -> Float[np.ndarray, " nodes"]:
        """The targets' probabilities, 0 at all other nodes."""
        all_nodes = np.zeros(self.size, self.adjacency.dtype)
        all_nodes[self.targets] = self.weight
        return all_nodes

    def sum_rule(self) -> Float[np.ndarray, " _"]:
        """By how much every feature and target misses the sum rule of the module, in this order."""
        missed = self.adjacency.sum(axis=1) + self.bias + self.left_out - self.value
        return np.concatenate([missed[: len(self.features)], missed[self.targets]])
