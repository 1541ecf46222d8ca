"""A forward pass over new tokens only: keys and values of earlier tokens come from a cache.

`Cached` takes an attention sublayer's place for one pass. It writes the new tokens' keys and values into the cache,
offers the cache to `tap` (`blocks/3/attn/cache/key`), and lets every query see what the original would let it see. All
else in the model (blocks, MLPs, what replaced them, edits) is the model itself.

A Gated DeltaNet keeps no keys: its state takes their place (`CachedDelta`, `blocks/3/attn/cache/memory`).

A cache of keys has a *slot* for every token of the padded prompt and of what will be generated; `places` holds the
position of the token in each slot, -1 for padding and for slots that are still empty.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.models.attention import Attention
from jaxinterp.models.delta_net import DeltaState, GatedDeltaNet
from jaxinterp.models.edits import Edit
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer


class KeysValues(eqx.Module):
    """Keys and values of one attention sublayer, normed and rotated."""

    key: Float[Array, "batch slots kv_heads head_dim"]
    value: Float[Array, "batch slots kv_heads head_dim"]


class Cached(eqx.Module):
    """An attention sublayer that reads earlier keys and values from a cache."""

    attention: Attention
    cache: KeysValues
    places: Int[Array, "batch slots"]
    slot: Int[Array, ""]

    def __call__(
        self,
        x: Float[Array, "batch new d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        positions: Int[Array, "batch new"],
    ) -> Float[Array, "batch new d_model"]:
        query, key, value = self.attention.project(x, positions, tap=tap, rules=rules)
        key = jax.lax.dynamic_update_slice_in_dim(self.cache.key, key, self.slot, 1)
        value = jax.lax.dynamic_update_slice_in_dim(self.cache.value, value, self.slot, 1)
        tap("cache/key", key)
        tap("cache/value", value)
        seen = self.attention.sees(positions[:, :, None], self.places[:, None, :])
        visible = (self.places[:, None, :] >= 0) & seen
        own = (self.slot + jnp.arange(x.shape[1]))[:, None] == jnp.arange(self.places.shape[1])
        gate = self.attention.gate(x, tap=tap, rules=rules)
        z = self.attention.attend(query, key, value, visible | own, gate, tap=tap, rules=rules)
        return self.attention.write(z, tap=tap, rules=rules)


class CachedDelta(eqx.Module):
    """A Gated DeltaNet that goes on from the state behind earlier tokens."""

    net: GatedDeltaNet
    cache: DeltaState

    def __call__(
        self,
        x: Float[Array, "batch new d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        positions: Int[Array, "batch new"],
    ) -> Float[Array, "batch new d_model"]:
        out, state = self.net.advance(x, self.cache, positions >= 0, tap=tap, rules=rules)
        tap("cache/memory", state.memory)
        tap("cache/recent", state.recent)
        return out


Kept = KeysValues | DeltaState
"""What one sublayer keeps of earlier tokens."""


def can_cache(model: PyTree) -> str:
    """Why the model cannot run with a cache, in words; "" where it can."""
    if not isinstance(model, Transformer):
        return f"a {type(model).__name__} has no cache"
    if not model.config.causal or not model.config.head:
        return "an encoder predicts no next token"
    if model.config.shared_layers or model.config.per_layer is not None:
        return "a model whose layers share keys, or have vectors of their own for a token, has no cache yet"
    for index, block in enumerate(model.blocks):
        if not isinstance(block.attn, Attention | GatedDeltaNet):
            return f"'blocks/{index}/attn' was replaced by a {type(block.attn).__name__}, which has no cache"
    return ""


def empty_caches(model: Transformer, batch: int, slots: int) -> list[Kept]:
    """A cache for every block, in the dtype of its keys."""

    def empty(attention: Attention | GatedDeltaNet) -> Kept:
        if isinstance(attention, GatedDeltaNet):
            return attention.empty(batch, model.embedding.token.dtype)
        x = jax.ShapeDtypeStruct((batch, 1, model.config.d_model), model.embedding.token.dtype)
        _, key, _ = eqx.filter_eval_shape(lambda attention, x: attention.project(x), attention, x)
        zeros = jnp.zeros((batch, slots, *key.shape[2:]), key.dtype)
        return KeysValues(zeros, zeros)

    return [empty(block.attn) for block in model.blocks]


def pass_over_new(
    model: Transformer,
    tokens: Int[Array, "batch new"],
    caches: list[Kept],
    places: Int[Array, "batch slots"],
    slot: Int[Array, ""],
    edits: Mapping[str, Edit],
) -> tuple[Float[Array, "batch vocab"], list[Kept]]:
    """The logits behind the last of the new tokens, and the caches with the new tokens in them.

    Args:
      places: positions by slot, those of the new tokens included.
      slot: of the first new token.
    """
    positions = jax.lax.dynamic_slice_in_dim(places, slot, tokens.shape[1], axis=1)

    def cached(attention: Any, cache: Kept) -> Cached | CachedDelta:
        if isinstance(cache, DeltaState):
            return CachedDelta(attention, cache)
        return Cached(attention, cache, places, slot)

    ready = [cached(block.attn, cache) for block, cache in zip(model.blocks, caches, strict=True)]
    inner = eqx.tree_at(lambda model: [block.attn for block in model.blocks], model, ready)
    inner = dataclasses.replace(inner, config=dataclasses.replace(model.config, head=False))  # logits of one token only
    wanted = ("final", "blocks/*/attn/cache/*")
    trace = run(inner, jnp.where(positions >= 0, tokens, 0), edits=edits, positions=positions, keep=wanted)
    kept: list[Kept] = []
    for index, cache in enumerate(caches):
        name = f"blocks/{index}/attn/cache"
        if isinstance(cache, DeltaState):
            kept.append(DeltaState(trace[f"{name}/memory"], trace[f"{name}/recent"]))
        else:
            kept.append(KeysValues(trace[f"{name}/key"], trace[f"{name}/value"]))
    return model.unembed(trace["final"][:, -1]), kept
