"""What the features of a graph are about: where they fire in a text, and which logits they write to.

One pass over the text serves chosen features of all layers. Positions of weight 0 (attention sinks, special tokens)
count nowhere. Logits are those of the direct path (`evaluation.features.vectors`), summed over the layers that a
feature writes to.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.features.vectors import direct_logits
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer

Place = tuple[int, int]
"""(layer, index)."""


@dataclass(frozen=True)
class Context:
    """A stretch of text around a peak: token ids, the feature's activations, and where the peak is."""

    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class About:
    """What is known of a feature: share of tokens it fires on, its highest peaks, (token, logit) pairs it moves."""

    density: float
    contexts: tuple[Context, ...]
    raised: tuple[tuple[int, float], ...]
    lowered: tuple[tuple[int, float], ...]

    def label(self, token_text: Callable[[int], str]) -> str:
        """A short name: the token that it peaks on most often."""
        if not self.contexts:
            return ""
        peaks = Counter(context.tokens[context.peak] for context in self.contexts)
        return f"on “{token_text(peaks.most_common(1)[0][0]).strip() or '␣'}”"


def about_features(
    model: Transformer,
    transcoders: Transcoders,
    chosen: Sequence[Place],
    windows: Sequence[Mapping[str, np.ndarray]],
    *,
    count: int = 6,
    radius: int = 12,
    logits: int = 8,
    batch: int = 16,
) -> dict[Place, About]:
    """Contexts and logits of the chosen features.

    Args:
      windows: of one length, each with "tokens" and "weight" [seq].
      count: contexts a feature, at most one a window; radius: tokens on each side of a peak.
      logits: how many raised and lowered ones.
      batch: windows in one forward pass.
    Raises:
      UserError: there are no windows.
    """
    if not windows:
        raise UserError("there is no text to look for features in: give at least one window.")
    places = sorted(set(chosen))
    if not places:
        return {}
    tokens = np.stack([np.asarray(window["tokens"]) for window in windows])
    weight = np.stack([np.asarray(window["weight"]) for window in windows]) > 0
    by_layer = {layer: [index for own, index in places if own == layer] for layer in transcoders.layers}
    indices = tuple(jnp.asarray(by_layer[layer], jnp.int32) for layer in transcoders.layers)
    found = []
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
        found.append(np.asarray(_codes(model, transcoders, jnp.asarray(filled), indices))[: len(part)])
    codes = np.where(weight[..., None], np.concatenate(found), 0.0)
    moved = _moved_logits(model, transcoders, by_layer, logits)
    ordered = [(layer, index) for layer in transcoders.layers for index in by_layer[layer]]
    return {
        place: About(
            float((codes[..., number] != 0).sum() / max(int(weight.sum()), 1)),
            _peaks(tokens, codes[..., number], count, radius),
            *moved[place],
        )
        for number, place in enumerate(ordered)
    }


@eqx.filter_jit
def _codes(
    model: Transformer, transcoders: Transcoders, tokens: Int[Array, "batch seq"], indices: tuple[Array, ...]
) -> Float[Array, "batch seq chosen"]:
    trace = run(model, tokens)
    parts = [
        reader.activate(reader.pre(trace[f"blocks/{layer}/mlp/in"].astype(reader.encoder.dtype)))[..., chosen]
        for layer, reader, chosen in zip(transcoders.layers, transcoders.readers, indices, strict=True)
    ]
    return jnp.concatenate(parts, axis=-1)


def _peaks(tokens: np.ndarray, codes: np.ndarray, count: int, radius: int) -> tuple[Context, ...]:
    places = codes.argmax(axis=1)
    heights = codes[np.arange(len(codes)), places]
    contexts = []
    for window in np.argsort(-heights, kind="stable")[:count]:
        if heights[window] <= 0:
            break
        peak = int(places[window])
        start, stop = max(0, peak - radius), min(tokens.shape[1], peak + radius + 1)
        contexts.append(
            Context(
                tuple(int(id) for id in tokens[window, start:stop]),
                tuple(float(value) for value in codes[window, start:stop]),
                peak - start,
            )
        )
    return tuple(contexts)


def _moved_logits(
    model: Transformer, transcoders: Transcoders, by_layer: Mapping[int, list[int]], count: int
) -> dict[Place, tuple[Any, Any]]:
    moved = {}
    for number, (layer, reader) in enumerate(zip(transcoders.layers, transcoders.readers, strict=True)):
        chosen = by_layer[layer]
        if not chosen:
            continue
        rows = np.asarray(reader.decoder[jnp.asarray(chosen)], np.float32)
        total = np.zeros((len(chosen), model.config.vocab_size), np.float32)
        for step in range(rows.shape[1]):
            target = transcoders.layers[number + step]
            own = direct_logits(model, f"blocks/{target}/mlp/out", rows[:, step])
            total += 0 if own is None else own
        for index, row in zip(chosen, total, strict=True):
            order = np.argsort(-row, kind="stable")
            raised, lowered = (
                tuple((int(id), float(row[id])) for id in ids) for ids in (order[:count], order[::-1][:count])
            )
            moved[layer, index] = (raised, lowered)
    return moved
