"""An attribution graph written down a second time, in plain NumPy: forward in time, one source after another.

It shares nothing with the package but the weights: its own forward pass (RMSNorm or LayerNorm, rotary or learned
positions, grouped heads, biases), its own transcoders, its own influence (by a matrix inverse) and its own pruning (by
loops).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def array(leaf) -> np.ndarray | None:
    return None if leaf is None else np.asarray(leaf, np.float64)


@dataclass
class Dense:
    """A model, transcoders (lists by layer; decoders [features, reach, d]) and a prompt."""

    model: Any
    tokens: np.ndarray
    encoders: list[np.ndarray]
    encoder_biases: list[np.ndarray]
    decoders: list[np.ndarray]
    decoder_biases: list[np.ndarray]
    skips: list[np.ndarray | None]
    thresholds: list[np.ndarray]
    k: int | None = None
    patterns: list[np.ndarray] = field(default_factory=list)
    scales: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.layers, self.seq = len(self.model.blocks), len(self.tokens)
        self.mlp_in, self.mlp_out = [], []
        x = array(self.model.embedding.token)[self.tokens] * self.model.embedding.scale
        if self.model.embedding.position is not None:
            x = x + array(self.model.embedding.position)[: self.seq]
        for layer, block in enumerate(self.model.blocks):
            x = x + self.attention(layer, self.norm(block.attn_norm, x, f"attn{layer}"))
            self.mlp_in.append(self.norm(block.mlp_norm, x, f"mlp{layer}"))
            self.mlp_out.append(self.mlp(block.mlp, self.mlp_in[-1]))
            x = x + self.mlp_out[-1]
        self.final = self.norm(self.model.final_norm, x, "final")
        unembedding = self.model.unembedding
        self.matrix = array(self.model.embedding.token).T if unembedding is None else array(unembedding.weight)
        self.logits = self.final @ self.matrix
        self.encode()

    def norm(self, norm, x, name, frozen=False, constant=True):
        centred = x - x.mean(axis=1, keepdims=True) if norm.kind == "layer" else x
        if not frozen:
            self.scales[name] = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + norm.epsilon)
        y = centred * self.scales[name] * (array(norm.weight) + norm.offset)
        return y + array(norm.bias) if constant and norm.bias is not None else y

    def linear(self, linear, x, constant=True):
        y = x @ array(linear.weight)
        return y + array(linear.bias) if constant and linear.bias is not None else y

    def rotated(self, x, attention):
        half = attention.rotary_dimensions // 2
        y = x.copy()
        for position in range(self.seq):
            for i in range(half):
                angle = position * attention.rotary_base ** (-2 * i / attention.rotary_dimensions)
                a, b = x[position, :, i], x[position, :, i + half]
                y[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                y[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return y

    def attention(self, layer, x, frozen=False, constant=True):
        attention = self.model.blocks[layer].attn
        groups = attention.heads // attention.kv_heads
        value = self.linear(attention.v_proj, x, constant).reshape(self.seq, attention.kv_heads, -1)
        if not frozen:
            query = self.linear(attention.q_proj, x).reshape(self.seq, attention.heads, -1)
            key = self.linear(attention.k_proj, x).reshape(self.seq, attention.kv_heads, -1)
            if attention.rotary_dimensions:
                query, key = self.rotated(query, attention), self.rotated(key, attention)
            pattern = np.zeros((attention.heads, self.seq, self.seq))
            for head in range(attention.heads):
                for q in range(self.seq):
                    scores = np.array([query[q, head] @ key[p, head // groups] * attention.scale for p in range(q + 1)])
                    weights = np.exp(scores - scores.max())
                    pattern[head, q, : q + 1] = weights / weights.sum()
            self.patterns.append(pattern)
        z = np.stack([self.patterns[layer][head] @ value[:, head // groups] for head in range(attention.heads)], axis=1)
        return self.linear(attention.o_proj, z.reshape(self.seq, -1), constant)

    def mlp(self, mlp, x):
        pre = self.linear(mlp.up_proj if mlp.gate_proj is None else mlp.gate_proj, x)
        if mlp.activation == "gelu":
            hidden = pre * 0.5 * (1 + np.vectorize(math.erf)(pre / math.sqrt(2)))
        elif mlp.activation == "relu":
            hidden = np.maximum(pre, 0)
        else:
            hidden = pre / (1 + np.exp(-pre))
        if mlp.gate_proj is not None:
            hidden = hidden * self.linear(mlp.up_proj, x)
        return self.linear(mlp.down_proj, hidden)

    def encode(self):
        """Nodes of features, (layer, position, index, activation), and errors [layers, seq, d]."""
        self.features, self.pre = [], []
        reconstruction = [bias + (0 if s is None else x @ s) for bias, s, x in
                          zip(self.decoder_biases, self.skips, self.mlp_in, strict=True)]  # fmt: skip
        for layer in range(self.layers):
            pre = self.mlp_in[layer] @ self.encoders[layer].T + self.encoder_biases[layer]
            for position in range(self.seq):
                order = sorted(range(pre.shape[1]), key=lambda i: (-pre[position, i], i))
                allowed = order if self.k is None else order[: self.k]
                for index in sorted(allowed):
                    z = pre[position, index]
                    if z <= self.thresholds[layer][index]:
                        continue
                    for step in range(self.decoders[layer].shape[1]):
                        row = z * self.decoders[layer][index, step]
                        reconstruction[layer + step] = (
                            reconstruction[layer + step] + np.eye(self.seq)[position][:, None] * row
                        )
                    if position > 0:
                        self.features.append((layer, position, index, z))
                        self.pre.append(z)
        self.errors = np.stack(self.mlp_out) - np.stack(reconstruction)
        self.errors[:, 0] = 0

    def forward(self, writes=None, token=None, constants=False):
        """What every MLP and the unembedding read of given writes, patterns and scales frozen."""
        writes = {} if writes is None else writes
        x = np.zeros((self.seq, self.model.config.d_model)) if token is None else token
        if constants and self.model.embedding.position is not None:
            x = x + array(self.model.embedding.position)[: self.seq]
        reads = []
        for layer, block in enumerate(self.model.blocks):
            inside = self.norm(block.attn_norm, x, f"attn{layer}", frozen=True, constant=constants)
            x = x + self.attention(layer, inside, frozen=True, constant=constants)
            reads.append(self.norm(block.mlp_norm, x, f"mlp{layer}", frozen=True, constant=constants))
            x = x + writes.get(layer, 0)
            if self.skips[layer] is not None:
                x = x + reads[-1] @ self.skips[layer]
        return [*reads, self.norm(self.model.final_norm, x, "final", frozen=True, constant=constants)]

    def at(self, position, vector):
        out = np.zeros((self.seq, len(vector)))
        out[position] = vector
        return out

    def graph(self, most=10, mass=0.95):
        """(adjacency, bias, targets, probabilities) with nodes in the documented order."""
        last = np.exp(self.logits[-1] - self.logits[-1].max())
        last /= last.sum()
        chosen = []
        for token in sorted(range(len(last)), key=lambda i: -last[i]):
            if len(chosen) == most or last[chosen].sum() >= mass:
                break
            chosen.append(token)
        reads = [(layer, position, self.encoders[layer][i]) for layer, position, i, _ in self.features]
        mean = self.matrix.mean(axis=1)
        goals = [(self.layers, self.seq - 1, self.matrix[:, token] - mean) for token in chosen]
        sources = []
        for layer, position, i, z in self.features:
            decoder = self.decoders[layer]
            steps = range(decoder.shape[1])
            sources.append(self.forward({layer + t: self.at(position, z * decoder[i, t]) for t in steps}))
        for layer in range(self.layers):
            for position in range(self.seq):
                sources.append(self.forward({layer: self.at(position, self.errors[layer, position])}))
        embedded = array(self.model.embedding.token)[self.tokens] * self.model.embedding.scale
        for position in range(self.seq):
            sources.append(self.forward(token=self.at(position, embedded[position])))
        at_zero = {}
        for layer in range(self.layers):
            at_zero[layer] = np.tile(self.decoder_biases[layer], (self.seq, 1))
            skip = self.skips[layer]
            at_zero[layer][0] = self.mlp_out[layer][0] - (0 if skip is None else self.mlp_in[layer][0] @ skip)
        constant = self.forward(at_zero, constants=True)
        size = len(sources) + len(goals)
        adjacency, bias = np.zeros((size, size)), np.zeros(size)
        rows = [*enumerate(reads), *((len(sources) + n, goal) for n, goal in enumerate(goals))]
        for row, (layer, position, vector) in rows:
            adjacency[row, : len(sources)] = [reached[layer][position] @ vector for reached in sources]
            bias[row] = constant[layer][position] @ vector
        return adjacency, bias, chosen, last[chosen]


def influence(adjacency, weights):
    """w ((I - A')^-1 - I), by a matrix inverse."""
    size = np.abs(adjacency)
    share = size / np.maximum(size.sum(axis=1, keepdims=True), 1e-10)
    return weights @ (np.linalg.inv(np.eye(len(share)) - share) - np.eye(len(share))), share


def pruned(adjacency, weights, features, fixed, node_threshold=0.8, edge_threshold=0.98):
    """The kept nodes and edges (target, source), by loops."""
    score, _ = influence(adjacency, weights)
    order = sorted(range(len(score)), key=lambda n: -score[n])
    kept, mass = set(range(fixed, len(score))), 0.0
    for node in order:
        kept.add(node)
        mass += score[node]
        if mass >= node_threshold * score.sum():
            break
    small = np.array(
        [[a if t in kept and s in kept else 0 for s, a in enumerate(row)] for t, row in enumerate(adjacency)]
    )
    again, share = influence(small, weights)
    edges = {(t, s): share[t, s] * (again[t] + weights[t]) for t, s in zip(*np.nonzero(small), strict=True)}
    total, mass, chosen = sum(edges.values()), 0.0, set()
    for edge in sorted(edges, key=lambda e: -edges[e]):
        chosen.add(edge)
        mass += edges[edge]
        if mass >= edge_threshold * total:
            break
    while True:
        dead = {n for n in kept if n < fixed and not any(s == n for _, s in chosen)}
        dead |= {n for n in kept if n < features and not any(t == n for t, _ in chosen)}
        if not dead:
            return kept, chosen
        kept -= dead
        chosen = {(t, s) for t, s in chosen if t in kept and s in kept}
