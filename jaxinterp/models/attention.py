"""Self-attention, with grouped keys and values, windows, soft caps and query/key norms.

    pattern = softmax(cap(q k^T * scale) + mask),   z = pattern v,   out = z W_out

A query sees what came before it and itself (all positions where attention is not causal), and no padding but itself.

Named arrays: `pattern` [batch, heads, seq, seq] (query, key) and `z` [batch, seq, heads, head_dim].
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxinterp.models.layers import Linear, Norm, RopeScaling, Tap, no_tap, rotary_frequencies, rotate, soft_cap
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
    ) -> Float[Array, "batch seq d_model"]:
        batch, seq, _ = x.shape
        query = _heads(self.q_proj(x), self.heads, self.query_norm, rules)
        key = _heads(self.k_proj(x), self.kv_heads, self.key_norm, rules)
        value = _heads(self.v_proj(x), self.kv_heads, None, rules)
        if self.rotary_dimensions:
            frequencies = rotary_frequencies(self.rotary_dimensions, self.rotary_base, self.rotary_scaling)
            query, key = rotate(query, frequencies), rotate(key, frequencies)

        grouped = query.reshape(batch, seq, self.kv_heads, self.heads // self.kv_heads, -1)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqngd,bknd->bngqk", grouped, key, preferred_element_type=wide) * self.scale
        visible = _visible(seq, self.causal, self.window)
        if real is not None:  # padding sees itself, so that its row is no division by zero
            visible = (visible & (real[:, None, :] | jnp.eye(seq, dtype=bool)))[:, None, None]
        scores = jnp.where(visible, soft_cap(scores, self.cap), -jnp.inf)
        pattern = jax.nn.softmax(scores, axis=-1).astype(x.dtype).reshape(batch, self.heads, seq, seq)
        pattern = tap("pattern", hold(pattern, rules.attention))

        grouped_pattern = pattern.reshape(batch, self.kv_heads, -1, seq, seq)
        z = tap("z", jnp.einsum("bngqk,bknd->bqngd", grouped_pattern, value).reshape(batch, seq, self.heads, -1))
        return self.o_proj(z.reshape(batch, seq, -1))


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
