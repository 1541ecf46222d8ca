"""Self-attention, with grouped keys and values, windows, chunks, soft caps, sinks, gates and query/key norms.

    pattern = softmax(cap(q k^T * scale) + mask),   z = pattern v,   out = z W_out

A query sees what came before it and itself (all positions where attention is not causal), and no padding but itself;
at most `window` positions in all, or those of its own chunk of `chunk` positions.

    sinks     a number s_h a head takes its share: pattern = exp(score) / (exp(s_h) + sum exp(score))
    gate      z = pattern v * sigmoid(x W_gate)
    sharing   without `k_proj`, keys and values are those of the last layer before that has its own, of the same kind
              (with or without a window); without `v_proj` alone, values are the projected keys before their norm

Named arrays: `pattern` [batch, heads, seq, seq] (query, key) and `z` [batch, seq, heads, head_dim], what `o_proj`
reads; `gate`, of the same shape, where there is one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.kernels.platforms import current
from jaxinterp.models.layers import (
    Linear,
    Norm,
    Tap,
    UnitNorm,
    no_tap,
    project,
    soft_cap,
    wants,
)
from jaxinterp.models.rotary import RopeScaling, rotary_frequencies, rotate
from jaxinterp.models.rules import EXACT, Rules, gate_product, hold

LONG, BLOCKS = 128, 4
"""From so many tokens on attention goes in so many blocks on a CPU: more blocks save little and compile longer."""


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position p: times log(1 + floor((p + 1) / floor_scale)) * scale + 1 (Llama 4)."""

    floor_scale: int
    scale: float


def clipped(x: Float[Array, "*axes"], limit: float, rules: Rules = EXACT) -> Float[Array, "*axes"]:
    """x within +-limit; with the attention rule the factor by which it shrinks is a constant for the derivative."""
    y = jnp.clip(x, -limit, limit)
    if not rules.attention:
        return y
    factor = jax.lax.stop_gradient(jnp.where(x == 0, 1.0, y / jnp.where(x == 0, 1.0, x)).astype(x.dtype))
    return jax.lax.stop_gradient(y) + factor * (x - jax.lax.stop_gradient(x))


class Attention(eqx.Module):
    """One attention sublayer. `heads` must be a multiple of `kv_heads`: each key serves heads / kv_heads queries.

    Query and key norms are taken over as many dimensions as they have weights: a head, or the whole projection.

    Attributes:
      value_norm: of every head's value.
      gate_proj: of the gate.
      sinks: one a head.
      clip: queries, keys and values are clipped to +-clip behind their norms.
      interleaved: rotated dimensions are paired with their neighbours.
      late_norms: query and key norms come after the rotation.
      shares: under which label keys and values are kept for later layers, or taken from earlier ones.
    """

    q_proj: Linear
    k_proj: Linear | None
    v_proj: Linear | None
    o_proj: Linear
    query_norm: Norm | UnitNorm | None
    key_norm: Norm | UnitNorm | None
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    causal: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    cap: float | None = eqx.field(static=True)
    rotary_dimensions: int = eqx.field(static=True)
    rotary_base: float = eqx.field(static=True)
    rotary_scaling: RopeScaling | None = eqx.field(static=True)
    value_norm: UnitNorm | None = None
    gate_proj: Linear | None = None
    sinks: Float[Array, " heads"] | None = None
    chunk: int | None = eqx.field(static=True, default=None)
    clip: float | None = eqx.field(static=True, default=None)
    interleaved: bool = eqx.field(static=True, default=False)
    late_norms: bool = eqx.field(static=True, default=False)
    temperature: Temperature | None = eqx.field(static=True, default=None)
    shares: str | None = eqx.field(static=True, default=None)

    def projections(self) -> tuple[str, ...]:
        """The fields of its linear maps."""
        given = {"k_proj": self.k_proj, "v_proj": self.v_proj, "gate_proj": self.gate_proj}
        return ("q_proj", *(name for name, linear in given.items() if linear is not None), "o_proj")

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        real: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """The sublayer's output.

        Args:
          real: False for padding, which no other token looks at.
          positions: of every token, for rotary embeddings and chunks; default: 0, 1, 2, ...
          shared: keys and values of earlier layers by label; those of this one are put there.
        """
        if self.k_proj is None:
            if shared is None or self.shares not in shared:
                raise UserError("this attention has no keys of its own: it runs behind the layer that it shares with.")
            query, (key, value) = self.query(x, positions, tap=tap, rules=rules), shared[self.shares]
        else:
            query, key, value = self.project(x, positions, tap=tap, rules=rules)
        if shared is not None and self.shares is not None:
            shared[self.shares] = key, value
        visible = _mask(x.shape[1], self.causal, self.window)
        if self.chunk is not None:
            rows = jnp.arange(x.shape[1]) if positions is None else positions
            visible = visible & self._together(rows[..., :, None], rows[..., None, :])
        if real is not None:  # padding sees itself, so that its row does not divide by zero
            visible = visible & (real[:, None, :] | jnp.eye(x.shape[1], dtype=bool))
        gate = self.gate(x, tap=tap, rules=rules)
        z = self.attend(query, key, value, visible, gate, tap=tap, rules=rules, in_order=True)
        return self.write(z, tap=tap, rules=rules)

    def sees(self, queries: Int[Array, "*axes"], keys: Int[Array, "*others"]) -> Bool[Array, "..."]:
        """Which keys a query sees, by their positions (broadcast): itself and what came before, or all keys."""
        visible = self._behind(queries - keys)
        return visible if self.chunk is None else visible & self._together(queries, keys)

    def _behind(self, distance: Int[Array, "*axes"]) -> Bool[Array, "*axes"]:
        return _behind(distance, self.causal, self.window)

    def _together(self, queries: Int[Array, "*axes"], keys: Int[Array, "*others"]) -> Bool[Array, "..."]:
        """Whether two positions lie in one chunk."""
        return queries // (self.chunk or 1) == keys // (self.chunk or 1)

    def project(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"] | None = None,
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
    ) -> tuple[
        Float[Array, "batch seq heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
        Float[Array, "batch seq kv_heads head_dim"],
    ]:
        """Query, key and value of every token, normed and rotated: what a cache of keys and values keeps."""
        if self.k_proj is None:
            raise UserError("this attention has no keys of its own to project.")
        query = self.query(x, positions, tap=tap, rules=rules)
        projected = project(self.k_proj, "k_proj", x, tap, rules)
        norm = None if self.late_norms else self.key_norm
        key = self._turned(self._heads(projected, self.kv_heads, norm, rules), positions)
        if self.late_norms and self.key_norm is not None:
            key = self.key_norm(key, rules)
        values = projected if self.v_proj is None else project(self.v_proj, "v_proj", x, tap, rules)
        return query, key, self._heads(values, self.kv_heads, self.value_norm, rules)

    def query(
        self,
        x: Float[Array, "batch seq d_model"],
        positions: Int[Array, "batch seq"] | None = None,
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The query of every token, normed and rotated."""
        norm = None if self.late_norms else self.query_norm
        query = self._heads(project(self.q_proj, "q_proj", x, tap, rules), self.heads, norm, rules)
        query = self._turned(query, positions)
        if self.late_norms and self.query_norm is not None:
            query = self.query_norm(query, rules)
        return self._warmed(query, positions)

    def _turned(
        self, x: Float[Array, "batch seq heads head_dim"], positions: Int[Array, "batch seq"] | None
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Queries or keys, rotated by their positions."""
        if not self.rotary_dimensions:
            return x
        length = x.shape[1] if positions is None else jnp.max(positions) + 1
        frequencies = rotary_frequencies(self.rotary_dimensions, self.rotary_base, self.rotary_scaling, length)
        amplitude = 1.0 if self.rotary_scaling is None else self.rotary_scaling.attention_factor
        return rotate(x, frequencies, positions, interleaved=self.interleaved, amplitude=amplitude)

    def _heads(
        self, projected: Float[Array, "batch seq outputs"], heads: int, norm: Norm | UnitNorm | None, rules: Rules
    ) -> Float[Array, "batch seq heads head_dim"]:
        """A projection cut into heads, normed before or after the cut, whichever the norm has weights for."""
        batch, seq, outputs = projected.shape
        if norm is not None:
            size = norm.weight.shape[-1] if isinstance(norm, Norm) else outputs // heads
            projected = norm(projected.reshape(batch, seq, -1, size), rules)
        if self.clip is not None:
            projected = clipped(projected, self.clip, rules)
        return projected.reshape(batch, seq, heads, -1)

    def _warmed(
        self, query: Float[Array, "batch seq heads head_dim"], positions: Int[Array, "batch seq"] | None
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The query times the temperature of its position."""
        if self.temperature is None:
            return query
        places = jnp.arange(query.shape[1]) if positions is None else positions
        steps = jnp.floor((places.astype(jnp.float32) + 1) / self.temperature.floor_scale)
        growth = jnp.log1p(steps) * self.temperature.scale + 1
        return (query * growth[..., None, None]).astype(query.dtype)

    def gate(
        self, x: Float[Array, "batch seq d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq heads head_dim"] | None:
        """What z is multiplied by; None without a gate."""
        if self.gate_proj is None:
            return None
        gate = jax.nn.sigmoid(project(self.gate_proj, "gate_proj", x, tap, rules))
        return tap("gate", gate.reshape(*x.shape[:2], self.heads, -1))

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        visible: Bool[Array, "queries keys"] | Bool[Array, "batch queries keys"],
        gate: Float[Array, "batch queries heads head_dim"] | None = None,
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        in_order: bool = False,
    ) -> Float[Array, "batch queries heads head_dim"]:
        """z of the module's equation: `visible` says which keys each query sees, at least one.

        `in_order`: queries and keys are those of the same tokens in their order. Where nobody looks at the pattern, a
        CPU then leaves out most pairs that a causal mask hides.
        """
        if in_order and self.causal and query.shape[1] >= LONG and not wants(tap, "pattern") and current() == "cpu":
            mixed = self._block_by_block(query, key, value, visible, rules)
        else:
            mixed = self._all_pairs(query, key, value, visible, tap, rules)
        if gate is None:
            return tap("z", mixed)
        return tap("z", mixed * hold(gate, True) if rules.attention else gate_product(mixed, gate, rules))

    def _all_pairs(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        visible: Bool[Array, "queries keys"] | Bool[Array, "batch queries keys"],
        tap: Tap,
        rules: Rules,
    ) -> Float[Array, "batch queries heads head_dim"]:
        """pattern v, with the pattern as one array."""
        pattern = _pattern(query, key, visible, self.sinks, self.scale, self.cap)
        return _mixed(tap("pattern", hold(pattern, rules.attention)), value)

    def _block_by_block(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq kv_heads head_dim"],
        value: Float[Array, "batch seq kv_heads head_dim"],
        visible: Bool[Array, "seq seq"] | Bool[Array, "batch seq seq"],
        rules: Rules,
    ) -> Float[Array, "batch seq heads head_dim"]:
        """The same, a quarter of the queries at a time with the keys up to its end; a matrix for every key head."""
        batch, seq = query.shape[:2]
        group, size = self.heads // self.kv_heads, seq // BLOCKS if seq % BLOCKS == 0 else seq
        wide = jnp.promote_types(query.dtype, jnp.float32)
        queries = query.reshape(batch, seq, self.kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
        keys, values = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        blocks = []
        for stop in range(size, seq + 1, size):
            own = queries[:, :, :, stop - size : stop].reshape(batch, self.kv_heads, group * size, -1)
            scores = jnp.einsum("bnqd,bnkd->bnqk", own, keys[:, :, :stop], preferred_element_type=wide) * self.scale
            scores = scores.reshape(batch, self.kv_heads, group, size, stop)
            pattern = _shares(scores, visible[..., stop - size : stop, :stop], self.sinks, self.cap).astype(query.dtype)
            pattern = hold(pattern, rules.attention).reshape(batch, self.kv_heads, group * size, stop)
            mixed = jnp.einsum("bnqk,bnkd->bnqd", pattern, values[:, :, :stop])
            blocks.append(mixed.reshape(batch, self.kv_heads, group, size, -1))
        return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, seq, self.heads, -1)

    def write(
        self, z: Float[Array, "batch seq heads head_dim"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq d_model"]:
        """z W_out + b_out."""
        return project(self.o_proj, "o_proj", z.reshape(*z.shape[:2], -1), tap, rules)


# Inside `jax.jit` they are inlined; outside they are one program, not one for each operation.
@partial(jax.jit, static_argnames=("size", "causal", "window"), inline=True)
def _mask(size: int, causal: bool, window: int | None) -> Bool[Array, "queries keys"]:
    """Which tokens of a text of `size` tokens each of them sees."""
    places = jnp.arange(size)
    return _behind(places[:, None] - places[None, :], causal, window)


@partial(jax.jit, static_argnames=("causal", "window"), inline=True)
def _behind(distance: Int[Array, "*axes"], causal: bool, window: int | None) -> Bool[Array, "*axes"]:
    if not causal:
        return jnp.ones(distance.shape, bool)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


@partial(jax.jit, static_argnames="cap", inline=True)
def _shares(
    scores: Float[Array, "batch kv_heads group queries keys"],
    visible: Bool[Array, "queries keys"] | Bool[Array, "batch queries keys"],
    sinks: Float[Array, " heads"] | None,
    cap: float | None,
) -> Float[Array, "batch kv_heads group queries keys"]:
    """softmax(cap(scores) + mask), sinks among what is divided by."""
    if visible.ndim == 3:
        visible = visible[:, None, None]
    scores = jnp.where(visible, soft_cap(scores, cap), -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(scores.dtype).reshape(scores.shape[1], -1, 1, 1)
    with_sinks = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    return jax.nn.softmax(with_sinks, axis=-1)[..., :-1]


@partial(jax.jit, static_argnames=("scale", "cap"), inline=True)
def _pattern(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    visible: Bool[Array, "queries keys"] | Bool[Array, "batch queries keys"],
    sinks: Float[Array, " heads"] | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "batch heads queries keys"]:
    """How much each query attends to each key."""
    (batch, queries, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, -1)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqngd,bknd->bngqk", grouped, key, preferred_element_type=wide) * scale
    pattern = _shares(scores, visible, sinks, cap).astype(query.dtype)
    return pattern.reshape(batch, heads, queries, keys)


@partial(jax.jit, inline=True)
def _mixed(
    pattern: Float[Array, "batch heads queries keys"], value: Float[Array, "batch keys kv_heads value_dim"]
) -> Float[Array, "batch queries heads value_dim"]:
    """The values of each head, mixed by its pattern."""
    (batch, heads, queries, keys), kv_heads = pattern.shape, value.shape[2]
    grouped = pattern.reshape(batch, kv_heads, -1, queries, keys)
    return jnp.einsum("bngqk,bknd->bqngd", grouped, value).reshape(batch, queries, heads, -1)
