"""Build an attribution graph: targets first, then features, the most influential ones first where not all fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxinterp.causal.graphs.capture import Captured, capture, subject_of
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.linear import direct_effects
from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.core.errors import UserError
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.transformer import Transformer
from jaxinterp.training.mesh import over_data, place_model, replicated


class Targets(NamedTuple):
    """What a graph explains at the last position: read vectors of the final norm's output, ids and weights."""

    tokens: np.ndarray
    weight: np.ndarray
    read: np.ndarray
    value: np.ndarray


def attribution_graph(
    subject: Subject | Transformer | str | Path,
    prompt: str | Any,
    transcoders: Transcoders,
    *,
    targets: Sequence[int] | None = None,
    vectors: Float[Any, "targets d"] | None = None,
    weights: Sequence[float] | None = None,
    probability: float = 0.95,
    most_targets: int = 10,
    max_features: int | None = None,
    batch: int = 64,
    update_every: int = 4,
    first: int = 1,
    mesh: Mesh | None = None,
) -> Graph:
    """The graph of one prompt: direct effects of features, errors and tokens on features and on logits.

    Args:
      subject: a subject, a model, or what `load` takes (a model directory).
      prompt: a text (a special token is put before it) or token ids [seq].
      transcoders: see `from_arrays` and `transcoders_of`.
      targets: token ids to explain; None: the most probable ones with `probability` of the mass, at most
        `most_targets`.
      vectors: instead of tokens, directions of the final norm's output to explain, with `weights` that add to 1 or
        less.
      max_features: how many features are nodes; None: all that are active. Those left out count in `left_out`.
      batch: targets in one vector-Jacobian product.
      update_every: where not all features are nodes: batches between two rankings by influence.
      first: features at positions before this one are not nodes.
      mesh: spread the model over `model` and the batch over `data`; None: one device.
    Raises:
      UserError: an argument is not possible, or prompt, model and transcoders do not belong together.
    """
    if batch < 1 or update_every < 1 or (max_features is not None and max_features < 1):
        raise UserError(
            f"batch={batch}, update_every={update_every}, max_features={max_features}: each must be at least 1."
        )
    if mesh is not None:
        batch = -(-batch // mesh.shape["data"]) * mesh.shape["data"]
        subject = subject_of(subject)
        subject = Subject(place_model(subject.model, mesh), subject.tokenizer, subject.name)
        transcoders = jax.device_put(transcoders, replicated(mesh))
    captured = capture(subject, prompt, transcoders, first=first)
    chosen = choose_targets(captured, targets, vectors, weights, probability, most_targets)
    return graph_of(captured, chosen, max_features=max_features, batch=batch, update_every=update_every, mesh=mesh)


def choose_targets(
    captured: Captured,
    targets: Sequence[int] | None = None,
    vectors: Any = None,
    weights: Sequence[float] | None = None,
    probability: float = 0.95,
    most: int = 10,
) -> Targets:
    """Targets as `attribution_graph` describes them; a token's read vector is its column of W_U minus their mean."""
    final = np.asarray(captured.seen.final)[-1]
    if vectors is not None:
        read = np.asarray(vectors, final.dtype)
        if targets is not None or weights is None or len(weights) != len(read) or read.shape[1:] != final.shape:
            raise UserError(
                f"vectors {read.shape}: give [targets, {final.size}] with a weight for each, and no targets."
            )
        ids, weight = np.full(len(read), -1), np.asarray(weights, final.dtype)
        return Targets(ids, weight, read, read @ final)
    logits = np.asarray(captured.seen.logits, np.float64)[-1]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if targets is None:
        if not 0 < probability <= 1 or most < 1:
            raise UserError(f"probability={probability} must be in (0, 1] and most_targets={most} at least 1.")
        order = np.argsort(-probabilities, kind="stable")[:most]
        enough = int(np.searchsorted(np.cumsum(probabilities[order]), probability)) + 1
        ids = order[:enough]
    else:
        ids = np.asarray(targets, np.int64)
        if not ids.size or ids.min() < 0 or ids.max() >= logits.size:
            raise UserError(f"targets={list(targets)} must be token ids from 0 to {logits.size - 1}.")
    matrix = np.asarray(captured.unembedding)
    read = (matrix[:, ids] - matrix.mean(axis=1, keepdims=True)).T
    return Targets(ids, probabilities[ids].astype(final.dtype), read, read @ final)


def graph_of(
    captured: Captured,
    targets: Targets,
    *,
    max_features: int | None = None,
    batch: int = 64,
    update_every: int = 4,
    mesh: Mesh | None = None,
) -> Graph:
    """The graph of a captured prompt; arguments as `attribution_graph` has them."""
    place = Places(captured)
    seq, layers = len(place.tokens), place.layers
    if mesh is None:
        batch = min(batch, -(-(len(place.features) + len(targets.read)) // 8) * 8)
    rows_of_targets = _rows(
        captured, place, np.full(len(targets.read), layers), np.full(len(targets.read), seq - 1), targets.read, batch,
        mesh,
    )  # fmt: skip
    count = len(place.features)
    wanted = count if max_features is None else min(max_features, count)
    rows, bias = [rows_of_targets[0]], [rows_of_targets[1]]
    visited: list[int] = []
    while len(visited) < wanted:
        if wanted == count:
            queue = list(range(count))
        else:
            order = _ranked(np.concatenate(rows), targets.weight, visited, count)
            queue = order[: min(update_every * batch, wanted - len(visited))]
        chosen = np.asarray(queue)
        own, own_bias = _rows(
            captured, place, place.features[chosen, 0], place.features[chosen, 1], place.read(chosen), batch, mesh
        )
        rows.append(own)
        bias.append(own_bias)
        visited += queue
    return _assembled(captured, place, targets, np.concatenate(rows), np.concatenate(bias), np.asarray(visited, int))


class Places:
    """Which node is which: host arrays of a captured prompt."""

    def __init__(self, captured: Captured) -> None:
        """Features in the order of layer, position and index."""
        self.tokens = np.asarray(captured.tokens)
        self.layers = captured.seen.mlp_in.shape[0]
        self.transcoders = captured.transcoders
        index, value = np.asarray(captured.writes.index), np.asarray(captured.writes.value)
        self.slots = np.flatnonzero(value.ravel())
        reader, position, _ = np.unravel_index(self.slots, value.shape)
        self.reader = reader
        blocks = np.asarray(captured.transcoders.layers)
        self.features = np.stack([blocks[reader], position, index.ravel()[self.slots]], axis=1).astype(np.int64)
        self.activation = value.ravel()[self.slots]
        pre = [np.asarray(own) for own in captured.seen.pre]
        self.pre = np.asarray(
            [pre[r][p, i] for r, p, i in zip(reader, position, self.features[:, 2], strict=True)], value.dtype
        )

    def slots_of(self, features: Int[np.ndarray, "chosen 3"]) -> Int[np.ndarray, " chosen"]:
        """Where features (layer, position, index) are among the effects of one target, flattened."""
        known = {tuple(row): int(slot) for row, slot in zip(self.features.tolist(), self.slots, strict=True)}
        return np.array([known[tuple(row)] for row in features.tolist()], int)

    def read(self, chosen: np.ndarray) -> np.ndarray:
        """Read vectors [chosen, d]."""
        return self._of_readers("encoder", chosen)

    def read_bias(self) -> np.ndarray:
        """Biases of the encoders, of all features."""
        return self._of_readers("encoder_bias", np.arange(len(self.features)))

    def _of_readers(self, name: str, chosen: np.ndarray) -> np.ndarray:
        readers = self.transcoders.readers
        first = np.asarray(readers[0].encoder if name == "encoder" else readers[0].encoder_bias)
        result = np.zeros((len(chosen), *first.shape[1:]), first.dtype)
        for number, reader in enumerate(readers):
            mine = self.reader[chosen] == number
            array = reader.encoder if name == "encoder" else reader.encoder_bias
            result[mine] = np.asarray(array)[self.features[chosen[mine], 2]]
        return result


def _rows(
    captured: Captured,
    place: Places,
    layer: np.ndarray,
    position: np.ndarray,
    read: np.ndarray,
    batch: int,
    mesh: Mesh | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Effects [targets, features + errors + tokens] of all nodes on the targets, and those of constants [targets]."""
    rows, bias = [], []
    size = batch  # always full, so that there is one program
    for start in range(0, len(layer), size):
        part = slice(start, min(start + size, len(layer)))
        missing = size - (part.stop - part.start)
        given = (
            np.pad(layer[part], (0, missing)).astype(np.int32),
            np.pad(position[part], (0, missing)).astype(np.int32),
            np.pad(read[part], ((0, missing), (0, 0))),
        )
        arrays = [jnp.asarray(each) if mesh is None else jax.device_put(each, over_data(mesh)) for each in given]
        effects = direct_effects(captured.frozen, captured.sources, captured.transcoders, captured.writes, *arrays)
        found = jax.device_get(effects)
        flat = [found.features.reshape(size, -1)[:, place.slots], found.errors.reshape(size, -1), found.tokens]
        rows.append(np.concatenate(flat, axis=1)[: part.stop - part.start])
        bias.append(found.bias[: part.stop - part.start])
    if not rows:
        width = len(place.slots) + (place.layers + 1) * len(place.tokens)
        return np.zeros((0, width), read.dtype), np.zeros(0, read.dtype)
    return np.concatenate(rows), np.concatenate(bias)


def _ranked(rows: np.ndarray, weight: np.ndarray, visited: list[int], features: int) -> list[int]:
    """Features that have no row yet, the most influential ones (by the rows that there are) first."""
    share = shares_of_rows(rows)
    total, current = np.zeros(rows.shape[1]), np.zeros(len(rows))
    current[: len(weight)] = weight
    for _ in range(len(rows) + 1):
        reached = current @ share
        if not reached.any():
            break
        total += reached
        current = np.concatenate([np.zeros(len(weight)), reached[visited]])
    order = np.argsort(-total[:features], kind="stable")
    seen = set(visited)
    return [int(feature) for feature in order if int(feature) not in seen]


def shares_of_rows(rows: Float[np.ndarray, "rows sources"]) -> Float[np.ndarray, "rows sources"]:
    """Which share of a row's sum of sizes each source has."""
    size = np.abs(rows)
    return size / np.maximum(size.sum(axis=1, keepdims=True), 1e-10)


def _assembled(
    captured: Captured, place: Places, targets: Targets, rows: np.ndarray, bias: np.ndarray, visited: np.ndarray
) -> Graph:
    """Rows in the order of the nodes, columns of the features that are nodes."""
    kept, count, goals = np.sort(visited), len(place.features), len(targets.read)
    left = np.setdiff1d(np.arange(count), kept)
    order = np.concatenate([np.argsort(visited, kind="stable") + goals, np.arange(goals)]).astype(int)
    columns = np.concatenate([kept, np.arange(count, rows.shape[1])]).astype(int)
    size = len(columns) + goals
    where = np.concatenate([np.arange(len(kept)), np.arange(size - goals, size)])

    def at_nodes(values: np.ndarray) -> np.ndarray:
        full = np.zeros(size, rows.dtype)
        full[where] = values
        return full

    adjacency = np.zeros((size, size), rows.dtype)
    adjacency[where[:, None], np.arange(len(columns))[None, :]] = rows[order][:, columns]
    value = np.concatenate([(place.pre - place.read_bias())[kept], targets.value])
    return Graph(
        tokens=place.tokens,
        layers=place.layers,
        features=place.features[kept],
        activation=place.activation[kept],
        pre=place.pre[kept],
        target_tokens=np.asarray(targets.tokens, np.int64),
        weight=targets.weight,
        adjacency=adjacency,
        bias=at_nodes(bias[order]),
        left_out=at_nodes(rows[order][:, left].sum(axis=1)),
        value=at_nodes(value),
    )
