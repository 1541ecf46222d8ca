"""One prompt, ready to be explained: what the model computes on it, what the transcoders see there, what they miss.

    e^l = y^l - (sum_{s <= l} z^s D_{s->l} + b^l + x^l S_l)        error, 0 at the first positions

A feature is a node where it is active, at positions from `first` on. At the positions before (1 by default: position 0
is an attention sink) an MLP's output is a constant, but its skip path stays linear everywhere. An MLP without a
transcoder is all error.
"""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.causal.graphs.linear import Frozen, Sources, Writes, freeze
from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Attention
from jaxinterp.models.delta_net import GatedDeltaNet
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer


class Captured(eqx.Module):
    """What is known of one prompt."""

    model: Transformer
    transcoders: Transcoders
    tokens: Int[Array, " seq"]
    frozen: Frozen
    sources: Sources
    writes: Writes
    seen: "Seen"
    first: int = eqx.field(static=True)

    @property
    def unembedding(self) -> Float[Array, "d vocab"]:
        """W_U."""
        return self.model.output_matrix()


def prompt_tokens(subject: Subject, prompt: str | Any) -> Int[Array, " seq"]:
    """Token ids of a prompt, a special token before them: at position 0 it takes the place of the attention sink.

    Args:
      prompt: a text; or token ids, which stay as they are.
    Raises:
      UserError: it is empty, an id is not in the vocabulary, or a text came without a tokenizer.
    """
    if isinstance(prompt, str):
        if subject.tokenizer is None:
            raise UserError(f"model {subject.name} has no tokenizer: give token ids instead of a text.")
        lead = subject.tokenizer.end if subject.tokenizer.begin is None else subject.tokenizer.begin
        prompt = [*([] if lead is None else [lead]), *subject.tokenizer.encode(prompt)]
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"the prompt is an array {ids.dtype}{ids.shape}: give a text, or token ids [seq].")
    return jnp.asarray(ids, jnp.int32)


def subject_of(subject: Subject | Transformer | str | Path) -> Subject:
    """A subject from itself, a bare model, or what `load` takes.

    Raises:
      UserError: its model is not a `Transformer` with logits.
    """
    if isinstance(subject, Transformer):
        subject = Subject(subject, None, "model")
    if not isinstance(subject, Subject):
        subject = load(subject)
    model = subject.model
    if not isinstance(model, Transformer):
        raise UserError(f"a graph needs a Transformer, not a {type(model).__name__}: load the model with `load`.")
    if not model.config.head or not model.config.causal:
        raise UserError(f"model {subject.name} is an encoder and predicts no token: a graph explains a prediction.")
    return subject


def capture(
    subject: Subject | Transformer | str | Path,
    prompt: str | Any,
    transcoders: Transcoders,
    *,
    first: int = 1,
) -> Captured:
    """Run the model on one prompt and encode what its MLPs read.

    Args:
      subject: a subject, a model, or what `load` takes (a model directory).
      prompt: a text (a special token is put before it) or token ids [seq].
      transcoders: see `from_arrays` and `transcoders_of`; their dtype is that of the result.
      first: features at positions before this one are not nodes.
    Raises:
      UserError: the prompt, the model or the transcoders do not belong together, or a number is not finite.
    """
    subject = subject_of(subject)
    tokens = prompt_tokens(subject, prompt)
    model: PyTree = subject.model
    _check(model, tokens, transcoders, first)
    dtype = transcoders.readers[0].encoder.dtype
    model = jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)
    seen = _forward(model, tokens, transcoders, first)
    if not bool(seen.finite):
        raise UserError("the model or a transcoder gives numbers that are not finite on this prompt.")
    skips: list[Any] = [None] * len(model.blocks)
    for layer, skip in zip(transcoders.layers, transcoders.skip, strict=True):
        skips[layer] = skip
    index, value = _active([np.asarray(code) for code in seen.codes], first)
    frozen, sources = freeze(model, tokens, seen.without_skip, skips)
    writes = Writes(jnp.asarray(index), jnp.asarray(value), seen.errors, seen.constant)
    return Captured(model, transcoders, tokens, frozen, sources, writes, seen, first)


class Seen(eqx.Module):
    """Arrays of one prompt; `pre` and `codes` per transcoded layer, at the first positions too."""

    mlp_in: Float[Array, "layers seq d"]
    without_skip: Float[Array, "layers seq d"]
    errors: Float[Array, "layers seq d"]
    constant: Float[Array, "layers seq d"]
    pre: tuple[Float[Array, "seq _"], ...]
    codes: tuple[Float[Array, "seq _"], ...]
    final: Float[Array, "seq d"]
    logits: Float[Array, "seq vocab"]
    finite: Bool[Array, ""]


@eqx.filter_jit
def _forward(model: Transformer, tokens: Int[Array, " seq"], transcoders: Transcoders, first: int) -> Seen:
    with jax.default_matmul_precision("highest"):
        trace = run(model, tokens[None])
        layers = range(len(model.blocks))
        mlp_in = jnp.stack([trace[f"blocks/{layer}/mlp/in"][0] for layer in layers])
        mlp_out = jnp.stack([trace[f"blocks/{layer}/mlp/out"][0] for layer in layers])
        readers = list(zip(transcoders.layers, transcoders.readers, strict=True))
        pre = tuple(reader.pre(mlp_in[layer]) for layer, reader in readers)
        codes = tuple(reader.activate(own) for (_, reader), own in zip(readers, pre, strict=True))
        without_skip, bias, errors = mlp_out, jnp.zeros_like(mlp_out), mlp_out
        parts = zip(
            transcoders.layers, transcoders.written(codes), transcoders.decoder_bias, transcoders.skip, strict=True
        )
        for layer, written, own_bias, skip in parts:
            linear = jnp.zeros_like(written) if skip is None else mlp_in[layer] @ skip
            without_skip = without_skip.at[layer].add(-linear)
            bias = bias.at[layer].add(own_bias)
            errors = errors.at[layer].add(-written - own_bias - linear)
        nodes = (jnp.arange(tokens.shape[0]) >= first)[:, None]
        return Seen(
            mlp_in=mlp_in,
            without_skip=without_skip,
            errors=jnp.where(nodes, errors, 0.0),
            constant=jnp.where(nodes, bias, without_skip),
            pre=pre,
            codes=codes,
            final=trace["final"][0],
            logits=trace.logits[0],
            finite=jnp.isfinite(trace.logits).all() & jnp.isfinite(errors).all(),
        )


def _active(codes: list[np.ndarray], first: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values of active features, [readers, seq, most]; `most` is a multiple of 8, to reuse programs."""
    counts = [(code[first:] != 0).sum(axis=1).max(initial=0) for code in codes]
    most = max(8, -(-int(max(counts, default=0)) // 8) * 8)
    shape = (len(codes), codes[0].shape[0], most)
    index, value = np.zeros(shape, np.int32), np.zeros(shape, codes[0].dtype)
    for number, code in enumerate(codes):
        for position in range(first, code.shape[0]):
            (found,) = np.nonzero(code[position])
            index[number, position, : found.size] = found
            value[number, position, : found.size] = code[position, found]
    return index, value


def _check(model: Transformer, tokens: Int[Array, " seq"], transcoders: Transcoders, first: int) -> None:
    seq, vocabulary, ids = tokens.shape[0], model.config.vocab_size, np.asarray(tokens)
    if model.config.padding is not None and (ids == model.config.padding).any():
        raise UserError(
            f"the prompt has the padding token {model.config.padding}, which no token looks at: leave it out."
        )
    for id in (int(ids.min()), int(ids.max())):
        if not 0 <= id < vocabulary:
            raise UserError(f"the prompt has token id {id}, but the vocabulary has ids 0 to {vocabulary - 1}.")
    if not 0 <= first < seq:
        raise UserError(f"first={first} leaves no position of a prompt of {seq} tokens: give a longer prompt.")
    if model.config.context < seq and model.config.learned_positions:
        raise UserError(f"the prompt has {seq} tokens, but the model learned {model.config.context} positions.")
    if not transcoders.layers or transcoders.layers[-1] >= len(model.blocks):
        raise UserError(f"transcoders of layers {transcoders.layers} for a model with {len(model.blocks)} layers.")
    _check_linear(model)
    width = transcoders.readers[0].encoder.shape[1]
    if width != model.config.d_model:
        raise UserError(f"the transcoders read {width} dimensions, but the model has d_model={model.config.d_model}.")


def _check_linear(model: Transformer) -> None:
    """Raises UserError if something other than norms, patterns and MLPs is not linear in the residual stream.

    Gates on heads and clips of values are: the rule that holds patterns holds them, too.
    """
    others = [block.attn for block in model.blocks if not isinstance(block.attn, Attention | GatedDeltaNet)]
    curved = {
        "vectors of a token for every layer (per_layer)": model.per_layer is not None,
        "a Gated DeltaNet": any(isinstance(block.attn, GatedDeltaNet) for block in model.blocks),
        f"a {type(others[0]).__name__} in attention's place" if others else "": bool(others),
    }
    found = [name for name, there in curved.items() if there]
    if found:
        raise UserError(
            f"the model has {' and '.join(found)}: with patterns and norms held it is not linear, and effects in a "
            "graph would not add up. Take attribute(...) or patch_effects(...) instead."
        )
