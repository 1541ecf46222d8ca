"""Self-attention, with grouped keys and values, windows, soft caps and query/key norms.

    pattern = softmax(cap(q k^T * scale) + mask),   z = pattern v,   out = z W_out

A query sees what came before it and itself (all positions where attention is not causal), and no padding but itself.

Named arrays: `pattern` [batch, heads, seq, seq] (query, key) and `z` [batch, seq, heads, head_dim].
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.models.layers import (
    Linear,
    Norm,
    RopeScaling,
    Tap,
    no_tap,
    project,
    rotary_frequencies,
    rotate,
    soft_cap,
)
from jaxinterp.models.rules import EXACT, Rules, hold


class Attention(eqx.Module):
    """One attention sublayer. `heads` must be a multiple of `kv_heads`: each key serves heads / kv_heads queries.

    Query and key norms are taken over as many dimensions as they have weights: a head, or the whole projection.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    heads: int = eqx.field(static=True)
    kv_heads: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    causal: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    cap: float | None = eqx.field(static=True)
    rotary_dimensions: int = eqx.field(static=True)
    rotary_base: float = eqx.field(static=True)
    rotary_scaling: RopeScaling | None = eqx.field(static=True)

    def projections(self) -> tuple[str, ...]:
        """The fields of its linear maps."""
        return ("q_proj", "k_proj", "v_proj", "o_proj")

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        real: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """The sublayer's output.

        Args:
          real: False for padding, which no other token looks at.
          positions: of every token, for rotary embeddings; default: 0, 1, 2, ...
        """
        query, key, value = self.project(x, positions, tap=tap, rules=rules)
        visible = _visible(x.shape[1], self.causal, self.window)
        if real is not None:  # padding sees itself, so that its row does not divide by zero
            visible = visible & (real[:, None, :] | jnp.eye(x.shape[1], dtype=bool))
        return self.write(self.attend(query, key, value, visible, tap=tap, rules=rules), tap=tap, rules=rules)

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
        query = _heads(project(self.q_proj, "q_proj", x, tap, rules), self.heads, self.query_norm, rules)
        key = _heads(project(self.k_proj, "k_proj", x, tap, rules), self.kv_heads, self.key_norm, rules)
        value = _heads(project(self.v_proj, "v_proj", x, tap, rules), self.kv_heads, None, rules)
        if self.rotary_dimensions:
            frequencies = rotary_frequencies(self.rotary_dimensions, self.rotary_base, self.rotary_scaling)
            query, key = rotate(query, frequencies, positions), rotate(key, frequencies, positions)
        return query, key, value

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys kv_heads head_dim"],
        value: Float[Array, "batch keys kv_heads head_dim"],
        visible: Bool[Array, "queries keys"] | Bool[Array, "batch queries keys"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
    ) -> Float[Array, "batch queries heads head_dim"]:
        """z of the module's equation: `visible` says which keys each query sees, at least one."""
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        grouped = query.reshape(batch, queries, self.kv_heads, self.heads // self.kv_heads, -1)
        wide = jnp.promote_types(query.dtype, jnp.float32)
        scores = jnp.einsum("bqngd,bknd->bngqk", grouped, key, preferred_element_type=wide) * self.scale
        if visible.ndim == 3:
            visible = visible[:, None, None]
        scores = jnp.where(visible, soft_cap(scores, self.cap), -jnp.inf)
        pattern = jax.nn.softmax(scores, axis=-1).astype(query.dtype).reshape(batch, self.heads, queries, keys)
        pattern = tap("pattern", hold(pattern, rules.attention))

        grouped_pattern = pattern.reshape(batch, self.kv_heads, -1, queries, keys)
        mixed = jnp.einsum("bngqk,bknd->bqngd", grouped_pattern, value)
        return tap("z", mixed.reshape(batch, queries, self.heads, -1))

    def write(
        self, z: Float[Array, "batch seq heads head_dim"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq d_model"]:
        """z W_out + b_out."""
        return project(self.o_proj, "o_proj", z.reshape(*z.shape[:2], -1), tap, rules)


def _heads(
    projected: Float[Array, "batch seq outputs"], heads: int, norm: Norm | None, rules: Rules
) -> Float[Array, "batch seq heads head_dim"]:
    """A projection cut into heads, normed before or after the cut, whichever the norm has weights for."""
    batch, seq, _ = projected.shape
    if norm is not None:
        projected = norm(projected.reshape(batch, seq, -1, norm.weight.shape[0]), rules)
    return projected.reshape(batch, seq, heads, -1)


def _visible(seq: int, causal: bool, window: int | None) -> Bool[Array, "seq seq"]:
    """Which keys a query sees: itself and what came before, at most `window` positions in all; or all keys."""
    distance = jnp.arange(seq)[:, None] - jnp.arange(seq)[None, :]
    if not causal:
        return jnp.ones((seq, seq), bool)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
