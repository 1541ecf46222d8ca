"""A model built with Penzai's own layers, under the names of our own models.

    model = from_penzai(penzai_model)     then: run, sites, replace, fit, score as with any other model

The model is taken apart at its seams: every `TransformerBlock` becomes a `PenzaiBlock` with the leaves `attn` and
`mlp`, and the flow between them, which is sums only, is written out, so that every array on the way has its name:

    resid/pre -> attn_norm -> attn -> (attn_post_norm) -> + -> resid/mid -> mlp_norm -> mlp -> (mlp_post_norm) -> +
    parallel blocks: both sublayers read resid/pre, and there is no resid/mid

The layers themselves stay Penzai's own, their parameters frozen: leaves of the pytree. Named arrays stay inside;
what is traced, edited and replaced are plain arrays in our layouts.

Facts: Penzai 0.2.5, penzai/models/transformer (variants llama, mistral, gemma, gpt_neox).
"""

from typing import Any

import equinox as eqx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int
from penzai import pz
from penzai.models.transformer.model_parts import TransformerBlock, TransformerFeedForward, TransformerLM

from jaxinterp.core.errors import UserError
from jaxinterp.models.adapters.common import check_rules
from jaxinterp.models.layers import Tap, call_leaf, no_tap, under
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.transformer import RESIDUAL

HEAD_AXES = ("heads", "head_groups", "query_heads")
"""Penzai's names for axes of attention heads, in the order of ours."""


class PenzaiLayers(eqx.Module):
    """Penzai layers, one after the other, on a plain array; without any, the array as it is."""

    layers: tuple[Any, ...]

    def __call__(self, x: Float[Array, "*axes d_model"]) -> Float[Array, "*axes d_model"]:
        return _plain(_through(self.layers, _named(x)))


class PenzaiMLP(eqx.Module):
    """A feed-forward layer whose inside can be seen: gated where `gate_proj` is given, dense elsewhere.

    hidden = f(gate_proj(x)) * up_proj(x)   or   f(up_proj(x)),   out = down_proj(hidden)
    """

    gate_proj: Any
    up_proj: Any
    activation: Any
    down_proj: Any

    def __call__(
        self, x: Float[Array, "*axes d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_model"]:
        return self.write(self.hidden(x, tap=tap, rules=rules))

    def hidden(
        self, x: Float[Array, "*axes d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_mlp"]:
        """What the down projection reads."""
        check_rules(rules, "Penzai")
        first = self.up_proj if self.gate_proj is None else self.gate_proj
        pre = tap("pre", _projected(first, x, "embedding", "neurons"))
        hidden = _plain(self.activation(_named(pre, "neurons")), "neurons")
        if self.gate_proj is not None:
            hidden = hidden * tap("up", _projected(self.up_proj, x, "embedding", "neurons"))
        return tap("hidden", hidden)

    def write(self, hidden: Float[Array, "*axes d_mlp"]) -> Float[Array, "*axes d_model"]:
        """The down projection."""
        return _projected(self.down_proj, hidden, "neurons", "embedding")

    def projections(self) -> tuple[str, ...]:
        """The fields of its linear maps; those of attention work on axes of heads and stay inside."""
        return ("up_proj", "down_proj") if self.gate_proj is None else ("gate_proj", "up_proj", "down_proj")


class PenzaiAttention(eqx.Module):
    """An attention layer whose pattern and heads can be seen; `combine` mixes values.

    Named arrays: `pattern` [batch, heads, seq, seq] (query, key) and `z` [batch, seq, heads, head_dim].
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    compare: Any
    combine: Any
    o_proj: Any

    def __call__(self, x: Float[Array, "batch seq d_model"], *, tap: Tap = no_tap) -> Float[Array, "batch seq d_model"]:
        value = _named(x)
        side = _side_inputs(value)
        query, key, values = (layer(value, **side) for layer in (self.q_proj, self.k_proj, self.v_proj))
        named_pattern = self.compare((query, key), **side)
        heads = {axis: named_pattern.named_shape[axis] for axis in HEAD_AXES if axis in named_pattern.named_shape}
        batch, seq = x.shape[:2]

        pattern = named_pattern.unwrap("batch", *heads, "seq", "kv_seq").reshape(batch, -1, seq, seq)
        pattern = tap("pattern", pattern).reshape(batch, *heads.values(), seq, seq)
        named_pattern = pz.nx.wrap(pattern).tag("batch", *heads, "seq", "kv_seq")

        named_z = self.combine((named_pattern, values), **side)
        z = named_z.unwrap("batch", "seq", *heads, "projection")
        z = tap("z", z.reshape(batch, seq, -1, z.shape[-1])).reshape(z.shape)
        return _plain(self.o_proj(pz.nx.wrap(z).tag("batch", "seq", *heads, "projection"), **side))


class PenzaiBlock(eqx.Module):
    """One transformer block. `mlp` and `attn` are leaves: any callable pytree that keeps the shape may stand there."""

    attn_norm: PenzaiLayers
    attn: Any
    attn_post_norm: PenzaiLayers
    mlp_norm: PenzaiLayers
    mlp: Any
    mlp_post_norm: PenzaiLayers
    parallel: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "batch seq d_model"], tap: Tap) -> Float[Array, "batch seq d_model"]:
        x = tap("resid/pre", x)
        attn_in = tap("attn/in", self.attn_norm(x))
        attn_out = call_leaf(self.attn, attn_in, tap=under(tap, "attn"))
        attn_added = self.attn_post_norm(tap("attn/out", attn_out))
        middle = x if self.parallel else tap("resid/mid", x + attn_added)

        mlp_in = tap("mlp/in", self.mlp_norm(middle))
        mlp_out = call_leaf(self.mlp, mlp_in, tap=under(tap, "mlp"))
        mlp_added = tap("mlp/added", self.mlp_post_norm(tap("mlp/out", mlp_out)))
        return tap("resid/post", checkpoint_name((x + attn_added if self.parallel else middle) + mlp_added, RESIDUAL))


class PenzaiModel(eqx.Module):
    """A language model made of Penzai's layers: tokens -> logits, every array on the way offered to `tap` by name."""

    embedding: tuple[Any, ...]
    blocks: tuple[PenzaiBlock, ...]
    final_norm: PenzaiLayers
    head: tuple[Any, ...]  # a parameter that the embedding holds is an empty slot here

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq vocab"]:
        check_rules(rules, "Penzai")
        x = tap("embed", _plain(_through(self.embedding, pz.nx.wrap(tokens).tag("batch", "seq"))))
        for index, block in enumerate(self.blocks):
            x = block(x, under(tap, f"blocks/{index}"))
        final = tap("final", self.final_norm(x))
        shared = pz.select(self.embedding).at_instances_of(pz.ParameterValue).get_sequence()
        head = pz.bind_variables(self.head, shared, allow_unused=True)
        return _plain(_through(head, _named(final)), "vocabulary")


def from_penzai(model: Any) -> PenzaiModel:
    """A model built with Penzai's layers, under the names of our own models; it shares the given model's arrays.

    Raises:
      UserError: the model is not a `TransformerLM`, its blocks are one `LayerStack`, a parameter has no value, or it is
        put together in another way than Penzai's variants are.
    """
    if not isinstance(model, TransformerLM):
        raise UserError(f"a {type(model).__name__} is not a penzai TransformerLM: give the whole language model.")
    if pz.select(model).at_instances_of(pz.nn.LayerStack).count():
        raise UserError(
            "the blocks of this Penzai model are one LayerStack: a single feed-forward layer with an axis of layers, "
            "so that no layer has a name of its own: build the model with use_layer_stack=False."
        )
    slots = pz.select(model).at_instances_of(pz.ParameterSlot).get_sequence()
    if slots:
        raise UserError(f"parameter {slots[0].label!r} of this Penzai model has no value: initialise or bind it first.")
    layers = getattr(model.body, "sublayers", [])
    places = [index for index, layer in enumerate(layers) if isinstance(layer, TransformerBlock)]
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise UserError(
            f"the body of this Penzai model holds {_kinds(layers)}: embedding, TransformerBlocks in a row, final norm "
            "and head are understood."
        )
    before, blocks, behind = layers[: places[0]], layers[places[0] : places[-1] + 1], layers[places[-1] + 1 :]
    if not before or len(behind) < 2 or not isinstance(behind[0], pz.nn.RMSLayerNorm | pz.nn.LayerNorm):
        raise UserError(
            f"around its blocks this Penzai model has {_kinds(before)} and {_kinds(behind)}: an embedding before, and "
            "a final norm and a head behind them are understood."
        )
    _, embedded = pz.unbind_variables(before)
    labels = {variable.label for variable in embedded}
    head, _ = pz.unbind_variables(behind[1:], lambda variable: variable.label in labels)
    return PenzaiModel(
        embedding=_frozen(before),
        blocks=tuple(_block(block, f"block {index}") for index, block in enumerate(blocks)),
        final_norm=PenzaiLayers(_frozen(behind[:1])),
        head=_frozen(head),
    )


def _block(block: TransformerBlock, where: str) -> PenzaiBlock:
    match block.sublayers:
        case [pz.nn.Residual(delta=attention), pz.nn.Residual(delta=feed_forward)]:
            parallel = False
        case [pz.nn.BranchAndAddTogether(branches=[pz.nn.Identity(), attention, feed_forward])]:
            parallel = True
        case _:
            raise UserError(
                f"{where} of this Penzai model holds {_kinds(block.sublayers)}: two Residuals, or one "
                "BranchAndAddTogether of Identity, attention and feed-forward, are understood."
            )
    attn_norm, attn, attn_post_norm = _split(attention, pz.nn.Attention, where)
    mlp_norm, mlp, mlp_post_norm = _split(feed_forward, TransformerFeedForward, where)
    return PenzaiBlock(attn_norm, _attention(attn), attn_post_norm, mlp_norm, _mlp(mlp), mlp_post_norm, parallel)


def _split(branch: Any, kind: type, where: str) -> tuple[PenzaiLayers, Any, PenzaiLayers]:
    """What stands before the sublayer in a branch of a block, the sublayer, and what stands behind it."""
    layers = (
        list(branch.sublayers) if isinstance(branch, pz.nn.Sequential) and not isinstance(branch, kind) else [branch]
    )
    places = [index for index, layer in enumerate(layers) if isinstance(layer, kind)]
    if len(places) != 1:
        raise UserError(
            f"{where} of this Penzai model has a branch of {_kinds(layers)}, in which one {kind.__name__} was expected."
        )
    (place,) = places
    before, layer, behind = _frozen(layers[:place]), pz.freeze_variables(layers[place]), _frozen(layers[place + 1 :])
    return PenzaiLayers(before), layer, PenzaiLayers(behind)


def _mlp(layer: TransformerFeedForward) -> PenzaiMLP | PenzaiLayers:
    """The feed-forward layer; one that is put together in an unknown way keeps its inside to itself."""
    match layer.sublayers:
        case [
            pz.nn.BranchAndMultiplyTogether(
                branches=[pz.nn.NamedGroup(sublayers=[gate, pz.nn.Elementwise() as activation]), up]
            ),
            down,
        ]:
            return PenzaiMLP(gate, up, activation, down)
        case [up, pz.nn.Elementwise() as activation, down]:
            return PenzaiMLP(None, up, activation, down)
    return PenzaiLayers((layer,))


def _attention(layer: pz.nn.Attention) -> PenzaiAttention | PenzaiLayers:
    match layer.attn_value_to_output:
        case pz.nn.Sequential(sublayers=[pz.nn.NamedEinsum() as combine, out]):
            return PenzaiAttention(
                layer.input_to_query,
                layer.input_to_key,
                layer.input_to_value,
                layer.query_key_to_attn,
                combine,
                out,
            )
    return PenzaiLayers((layer,))


def _frozen(layers: Any) -> tuple[Any, ...]:
    return tuple(pz.freeze_variables(layer) for layer in layers)


def _kinds(layers: Any) -> str:
    return ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers)) or "nothing"


def _named(x: Array, axis: str = "embedding") -> pz.nx.NamedArray:
    """A plain array as Penzai's layers take it: the last axis called `axis`, those before it batch and seq."""
    return pz.nx.wrap(x).tag(*_leading(x.ndim - 1), axis)


def _plain(value: pz.nx.NamedArray, axis: str = "embedding") -> Array:
    return value.unwrap(*_leading(len(value.named_shape) - 1), axis)


def _leading(count: int) -> tuple[str, ...]:
    names = (*(f"axis_{index}" for index in range(count - 2)), "batch", "seq")
    return names[len(names) - count :]


def _projected(layer: Any, x: Array, reads: str, writes: str) -> Array:
    """A projection of x: a layer of Penzai's, between the named axes, or what replaced it, on plain arrays."""
    return _plain(layer(_named(x, reads)), writes) if isinstance(layer, pz.nn.Layer) else layer(x)


def _side_inputs(value: pz.nx.NamedArray) -> dict[str, Any]:
    return {"token_positions": pz.nx.arange("seq", value.named_shape["seq"])} if "seq" in value.named_shape else {}


def _through(layers: tuple[Any, ...], value: pz.nx.NamedArray) -> pz.nx.NamedArray:
    side = _side_inputs(value)
    for layer in layers:
        value = layer(value, **side)
    return value
