"""Greedy paths through features and heads of one prompt: weights times what the text adds, source by source.

A *reading* is a vector v that reads the residual stream x at a position, before a sublayer. Every source adds its own
part to x . v, and a source is read in its turn, along a vector of its own:

    feature i of layer m, active with z_i       z_i (D_i . v)                 reads on with (D_i . v) σ_m(p) C(g_m E_i)
    head h of layer m, from position q          A^h(p, q) (σ^a_m(q) x(q) . w) reads on with A^h(p, q) σ^a_m(q) w at q,
                                                                              w = C(a_m W_OV^h v)
    token                                       embed(p) . v                  ends
    rest of layer m                             what its attention's or MLP's output has besides: errors, biases, skips

so that all sources of a reading add up to x(p) . v. σ = the inverse scale of the norm that stands before an MLP (σ^a:
before attention), A = the attention pattern, C and g as in `weights_circuits`. The factors in v come from the weights
alone (input-invariant), z, A and σ from the text.

Greedy: of all extensions of all kept paths the `width` largest by |effect| are kept, `steps` times.

Source: Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944, section 4.2 and appendix (attribution through heads).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.causal.weights_circuits import read_vector, through_norm
from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Norm
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer


class PromptRun(NamedTuple):
    """What one prompt adds to the weights; `codes` by transcoded layer."""

    embed: Float[np.ndarray, "seq d"]
    pre: Float[np.ndarray, "layers seq d"]
    attention_scale: Float[np.ndarray, "layers seq"]
    mlp_scale: Float[np.ndarray, "layers seq"]
    pattern: Float[np.ndarray, "layers heads seq seq"]
    attention_out: Float[np.ndarray, "layers seq d"]
    mlp_out: Float[np.ndarray, "layers seq d"]
    codes: tuple[Float[np.ndarray, "seq _"], ...]
    final_scale: Float[np.ndarray, " seq"]


class Reading(NamedTuple):
    """A vector that reads the residual stream at a position, before a layer's attention or MLP, or at the end."""

    vector: Float[np.ndarray, " d"]
    layer: int
    before: Literal["attn", "mlp", "end"]
    position: int


@dataclass(frozen=True)
class Source:
    """One part of what is read: a feature (`index`), a head (`index`; `position` is where it looks), token or rest."""

    kind: Literal["feature", "head", "token", "attention rest", "mlp rest"]
    layer: int
    index: int
    position: int
    effect: float
    onward: Reading | None


class WeightsPath(NamedTuple):
    """Sources from the last one (nearest to what is explained) to the first, and the effect that comes along them."""

    sources: tuple[Source, ...]
    effect: float


def prompt_run(model: Transformer, transcoders: Transcoders, tokens: Int[Array | np.ndarray, " seq"]) -> PromptRun:
    """One forward pass, as NumPy arrays.

    Raises:
      UserError: the model norms sums or what sublayers write, or a transcoder writes to several layers.
    """
    config = model.config
    if config.post_norms or config.sum_norms or config.parallel:
        raise UserError("paths from weights need a model that norms only what sublayers read: take a graph instead.")
    plain = (b.attn.gate_proj is None and b.attn.value_norm is None and b.attn.clip is None for b in model.blocks)
    if config.residual_scale != 1 or not all(plain):
        raise UserError(
            "paths from weights need heads that move values as they are (no gate, norm, clip): take a graph."
        )
    if any(reader.decoder.shape[1] != 1 for reader in transcoders.readers):
        raise UserError("paths from weights need transcoders of one layer each: take a graph for cross-layer ones.")
    return PromptRun(**jax.tree.map(np.asarray, _forward(model, transcoders, jnp.asarray(tokens))))


@eqx.filter_jit
def _forward(model: Transformer, transcoders: Transcoders, tokens: Array) -> dict[str, PyTree]:
    names = ("resid/pre", "resid/mid", "attn/pattern", "attn/out", "mlp/in", "mlp/out")
    trace = run(model, tokens[None], keep=("embed", *(f"blocks/*/{name}" for name in names)))
    of = {name: jnp.stack([trace[f"blocks/{n}/{name}"][0] for n in range(len(model.blocks))]) for name in names}
    blocks, last = model.blocks, of["resid/mid"][-1] + of["mlp/out"][-1]
    return dict(
        embed=trace["embed"][0],
        pre=of["resid/pre"],
        attention_scale=jnp.stack([_scale(b.attn_norm, x) for b, x in zip(blocks, of["resid/pre"], strict=True)]),
        mlp_scale=jnp.stack([_scale(b.mlp_norm, x) for b, x in zip(blocks, of["resid/mid"], strict=True)]),
        pattern=of["attn/pattern"],
        attention_out=of["attn/out"],
        mlp_out=of["mlp/out"],
        codes=tuple(
            reader.activate(reader.pre(of["mlp/in"][layer]))
            for layer, reader in zip(transcoders.layers, transcoders.readers, strict=True)
        ),
        final_scale=_scale(model.final_norm, last),
    )


def _scale(norm: Norm | None, x: Array) -> Array:
    """The inverse scale of a norm at every position."""
    if norm is None:
        return jnp.ones(x.shape[:-1], x.dtype)
    x = x - jnp.mean(x, axis=-1, keepdims=True) if norm.kind == "layer" else x
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + norm.epsilon)


def logit_reading(model: Transformer, text: PromptRun, direction: Float[np.ndarray, " vocab"]) -> Reading:
    """What reads a weighted sum of the last position's logits (before a soft cap), the last norm's scale in it."""
    vector = np.asarray(through_norm(model.final_norm, jnp.asarray(np.asarray(model.output_matrix()) @ direction)))
    return Reading(vector * text.final_scale[-1], len(model.blocks), "end", len(text.embed) - 1)


def feature_reading(
    model: Transformer, transcoders: Transcoders, text: PromptRun, layer: int, index: int, position: int
) -> Reading:
    """What reads a feature's pre-activation at a position, without the encoder's and the norm's bias.

    Raises:
      UserError: as `read_vector`.
    """
    vector = np.asarray(read_vector(model, transcoders, layer, index))
    return Reading(vector * text.mlp_scale[layer, position], layer, "mlp", position)


def sources(model: Transformer, transcoders: Transcoders, text: PromptRun, reading: Reading) -> list[Source]:
    """Every part of what a reading reads; their effects add up to x(position) . vector."""
    v, p = reading.vector, reading.position
    found = [Source("token", -1, -1, p, float(text.embed[p] @ v), None)]
    for layer in range(min(reading.layer + (reading.before == "mlp"), len(model.blocks))):
        found += _heads(model, text, layer, v, p)
    for layer in range(min(reading.layer, len(model.blocks))):
        found += _features(model, transcoders, text, layer, v, p)
    return found


def _heads(model: Transformer, text: PromptRun, layer: int, v: np.ndarray, p: int) -> list[Source]:
    w = head_reads(model, layer, v)
    scale = text.pattern[layer, :, p] * text.attention_scale[layer]
    parts = scale * (text.pre[layer] @ w.T).T
    found = [
        Source("head", layer, head, q, float(parts[head, q]), Reading(scale[head, q] * w[head], layer, "attn", q))
        for head in range(w.shape[0])
        for q in range(p + 1)
    ]
    rest = float(text.attention_out[layer, p] @ v) - float(parts[:, : p + 1].sum())
    return [*found, Source("attention rest", layer, -1, p, rest, None)]


def _features(
    model: Transformer, transcoders: Transcoders, text: PromptRun, layer: int, v: np.ndarray, p: int
) -> list[Source]:
    total = float(text.mlp_out[layer, p] @ v)
    if layer not in transcoders.layers:
        return [Source("mlp rest", layer, -1, p, total, None)]
    place = transcoders.layers.index(layer)
    reader, code = transcoders.readers[place], text.codes[place][p]
    active = np.flatnonzero(code)
    strength = np.asarray(reader.decoder)[active, 0] @ v
    reads = _through(model.blocks[layer].mlp_norm, np.asarray(reader.encoder)[active]) * text.mlp_scale[layer, p]
    found = [
        Source("feature", layer, int(i), p, float(code[i]) * float(s), Reading(s * read, layer, "mlp", p))
        for i, s, read in zip(active, strength, reads, strict=True)
    ]
    return [*found, Source("mlp rest", layer, -1, p, total - sum(source.effect for source in found), None)]


def _through(norm: Norm | None, vectors: Float[np.ndarray, "*rows d"]) -> Float[np.ndarray, "*rows d"]:
    """`through_norm` for rows, in NumPy."""
    if norm is None:
        return vectors
    vectors = vectors * (np.asarray(norm.weight) + norm.offset)
    return vectors - vectors.mean(axis=-1, keepdims=True) if norm.kind == "layer" else vectors


def head_reads(model: Transformer, layer: int, vector: Float[np.ndarray | Array, " d"]) -> Float[np.ndarray, "heads d"]:
    """C(a_m W_OV^h v): what v reads through each head of a layer, per unit of the norm's inverse scale."""
    attention, v = model.blocks[layer].attn, np.asarray(vector)
    value = np.asarray(attention.v_proj.weight).reshape(len(v), attention.kv_heads, -1).transpose(1, 2, 0)
    out = (np.asarray(attention.o_proj.weight) @ v).reshape(attention.kv_heads, -1, value.shape[1])
    return _through(model.blocks[layer].attn_norm, (out @ value).reshape(attention.heads, len(v)))


def weights_paths(
    model: Transformer,
    transcoders: Transcoders,
    text: PromptRun,
    start: Reading,
    *,
    width: int = 10,
    steps: int = 4,
) -> list[WeightsPath]:
    """The strongest paths that end in a reading, of all lengths up to `steps` sources, strongest first.

    Args:
      start: `logit_reading` or `feature_reading`.
      width: extensions kept at every step.
    Raises:
      UserError: width or steps is not positive.
    """
    if width < 1 or steps < 1:
        raise UserError(f"width={width} and steps={steps} must be positive.")
    found: list[WeightsPath] = []
    kept: list[tuple[tuple[Source, ...], Reading]] = [((), start)]
    for _ in range(steps):
        longer = [
            ((*path, source), source) for path, reading in kept for source in sources(model, transcoders, text, reading)
        ]
        longer.sort(key=lambda pair: -abs(pair[1].effect))
        found += [WeightsPath(path, source.effect) for path, source in longer[:width]]
        kept = [(path, source.onward) for path, source in longer[:width] if source.onward is not None]
    return sorted(found, key=lambda path: -abs(path.effect))
