"""Gated DeltaNet: a sublayer in attention's place with a state of fixed size instead of keys of all tokens.

    u = SiLU(conv(x W_qkv))                      `conv`, causal, by channel, over `width` tokens; cut into q, k, v
    q, k = q / |q| / sqrt(d_k), k / |k|          each key head serves value_heads / key_heads value heads
    g = exp(-exp(A) softplus(x W_a + c))         `decay` [batch, seq, value_heads]
    b = sigmoid(x W_b)                           `beta`, likewise
    S_t = g_t S_t-1 + k_t (b_t (v_t - (g_t S_t-1)^T k_t))^T,    o_t = S_t^T q_t         `recalled`
    z = RMSNorm(o) * SiLU(x W_z)                 `gate` is the second factor; `z` is what `out_proj` reads
    out = z W_out

`conv`, `decay`, `beta`, `recalled`, `gate` and `z` are named arrays. There is no `pattern`: no score for each pair of
tokens is made. Under `rules.attention` q, k, g and b are constants for derivatives, as the pattern of attention is.

The state is computed in chunks (the WY form of DeltaNet, arXiv 2406.06484, section 3; with decay arXiv 2412.06464,
section 3.3): within a chunk the corrections of all tokens solve one triangular system.
"""

from dataclasses import dataclass
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear, Norm, Tap, no_tap, project, random_linear
from jaxinterp.models.rules import EXACT, Activation, Rules, activate, gate_product, hold

CHUNK = 64
"""Tokens whose corrections are solved for together."""


@dataclass(frozen=True)
class DeltaConfig:
    """The sizes of a Gated DeltaNet; `width` is that of the convolution, in tokens, `activation` the one behind it."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    width: int = 4
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        """Raises UserError if value heads are not a multiple of key heads."""
        if self.value_heads % self.key_heads:
            raise UserError(f"value_heads={self.value_heads} is not a multiple of key_heads={self.key_heads}.")

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class DeltaState(eqx.Module):
    """What a Gated DeltaNet keeps of the tokens it has seen: S, and what its convolution will still look at."""

    memory: Float[Array, "batch value_heads key_dim value_dim"]
    recent: Float[Array, "batch before channels"]


class GatedDeltaNet(eqx.Module):
    """One Gated DeltaNet sublayer; see the module's equations."""

    qkv_proj: Linear
    z_proj: Linear
    b_proj: Linear
    a_proj: Linear
    out_proj: Linear
    conv: Float[Array, "channels 1 width"]
    decay_log: Float[Array, " value_heads"]  # A
    step_bias: Float[Array, " value_heads"]  # c
    norm: Norm
    config: DeltaConfig = eqx.field(static=True)

    def projections(self) -> tuple[str, ...]:
        """The fields of its linear maps."""
        return ("qkv_proj", "z_proj", "b_proj", "a_proj", "out_proj")

    def cuts(self) -> dict[str, int | None]:
        """Channels and heads are cut."""
        outs = {f"{name}/weight": 1 for name in ("qkv_proj", "z_proj", "b_proj", "a_proj")}
        return {**outs, "out_proj/weight": 0, "conv": 0, "decay_log": 0, "step_bias": 0}

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        real: Bool[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        """The sublayer's output; `real` is False for padding, wherever it lies, which no other token notices."""
        if real is None:
            return self.advance(x, self.empty(x.shape[0], x.dtype), None, tap=tap, rules=rules)[0]
        # Padding is moved behind the tokens for the two parts that look at neighbours, and back for everything named.
        order = jnp.argsort(~real, axis=1, stable=True)
        return self.advance(x, self.empty(x.shape[0], x.dtype), real, tap=tap, rules=rules, order=order)[0]

    def empty(self, batch: int, dtype: jnp.dtype) -> DeltaState:
        """The state before the first token."""
        c, wide = self.config, jnp.promote_types(dtype, jnp.float32)
        memory = jnp.zeros((batch, c.value_heads, c.key_dim, c.value_dim), wide)
        return DeltaState(memory, jnp.zeros((batch, c.width - 1, c.channels), dtype))

    def advance(
        self,
        x: Float[Array, "batch seq d_model"],
        state: DeltaState,
        real: Bool[Array, "batch seq"] | None,
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        order: Array | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], DeltaState]:
        """The output of new tokens, and the state behind them.

        Args:
          real: False for padding, which leaves the state as it is.
          order: the order in which the tokens follow each other; without it padding may lie before the first token, or
            be a row's last tokens.
        """
        c, (batch, seq, _) = self.config, x.shape

        def ordered(array: Array) -> Array:
            return array if order is None else jnp.take_along_axis(array, _rows(order, array), axis=1)

        def given(array: Array) -> Array:
            return array if order is None else jnp.take_along_axis(array, _rows(jnp.argsort(order), array), axis=1)

        def masked(array: Array) -> Array:
            return array if real is None else jnp.where(_rows(real, array), array, 0)

        qkv = ordered(masked(project(self.qkv_proj, "qkv_proj", x, tap, rules)))
        seen = jnp.concatenate([state.recent, qkv], axis=1)
        taps = [seen[:, i : i + seq] * self.conv[:, 0, i] for i in range(c.width)]
        mixed = masked(tap("conv", given(activate(c.activation, sum(taps[1:], taps[0]), rules))))
        query, key, value = jnp.split(mixed, [c.key_heads * c.key_dim, 2 * c.key_heads * c.key_dim], axis=-1)

        wide = jnp.promote_types(x.dtype, jnp.float32)
        step = project(self.a_proj, "a_proj", x, tap, rules).astype(wide) + self.step_bias
        decay = tap("decay", jnp.exp(-jnp.exp(self.decay_log.astype(wide)) * jax.nn.softplus(step)))
        beta = tap("beta", jax.nn.sigmoid(project(self.b_proj, "b_proj", x, tap, rules)).astype(wide))
        decay = decay if real is None else jnp.where(real[..., None], decay, 1)
        parts = (_unit(each.reshape(batch, seq, c.key_heads, -1).astype(wide)) for each in (query, key))
        query, key = (jnp.repeat(each, c.value_heads // c.key_heads, axis=2) for each in parts)
        value = value.reshape(batch, seq, c.value_heads, -1).astype(wide)
        scored = (query * c.key_dim**-0.5, key, decay, masked(beta))
        query, key, decay, beta = (hold(ordered(each), rules.attention) for each in scored)
        recalled, memory = gated_delta_rule(query, key, ordered(value), decay, beta, state.memory)
        recalled = tap("recalled", given(recalled).astype(x.dtype))

        gate = jax.nn.silu(project(self.z_proj, "z_proj", x, tap, rules).reshape(batch, seq, c.value_heads, -1))
        z = tap("z", gate_product(self.norm(recalled, rules), tap("gate", gate), rules))
        out = project(self.out_proj, "out_proj", z.reshape(batch, seq, -1), tap, rules)
        return out, DeltaState(memory, seen[:, seq:])


# Inside `jax.jit` it is inlined; outside it is one program, not one for each operation.
@partial(jax.jit, static_argnames="chunk", inline=True)
def gated_delta_rule(
    query: Float[Array, "batch seq heads key_dim"],
    key: Float[Array, "batch seq heads key_dim"],
    value: Float[Array, "batch seq heads value_dim"],
    decay: Float[Array, "batch seq heads"],
    beta: Float[Array, "batch seq heads"],
    memory: Float[Array, "batch heads key_dim value_dim"],
    chunk: int = CHUNK,
) -> tuple[Float[Array, "batch seq heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """o and the last S of the module's equations, `chunk` tokens at a time; S starts as `memory`.

    With G_i the product of the decays of a chunk up to token i, and C_ij = G_i / G_j k_i . k_j below the diagonal, the
    corrections w_i = b_i (v_i - (g_i S)^T k_i) solve (1 + b C) w = b (v - G k^T S_0); then o = G q^T S_0 + (G_i / G_j
    q_i . k_j, j <= i) w and S = G_last S_0 + sum_j G_last / G_j k_j w_j^T.
    """
    batch, seq, heads, _ = query.shape
    size = min(chunk, seq)
    fill = -seq % size  # behind the last token: beta 0 writes nothing, decay 1 forgets nothing

    def chunked(array: Array, filling: float = 0.0) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, fill)] + [(0, 0)] * (array.ndim - 2), constant_values=filling)
        cut = padded.reshape(batch, -1, size, *array.shape[2:])
        return jnp.moveaxis(cut, (1, 3), (0, 2))  # [chunks, batch, heads, size, ...]

    below = jnp.tril(jnp.ones((size, size), bool))
    logs = jnp.log(jnp.maximum(decay, jnp.finfo(decay.dtype).tiny))

    def step(memory: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, b, log = parts
        total = jnp.cumsum(log, axis=-1)  # log G
        between = jnp.exp(jnp.where(below, total[..., :, None] - total[..., None, :], -jnp.inf))
        system = b[..., None] * between * (k @ jnp.swapaxes(k, -1, -2))
        wanted = b[..., None] * (v - jnp.exp(total)[..., None] * (k @ memory))
        written = jax.scipy.linalg.solve_triangular(system, wanted, lower=True, unit_diagonal=True)
        out = jnp.exp(total)[..., None] * (q @ memory) + (between * (q @ jnp.swapaxes(k, -1, -2))) @ written
        left = jnp.exp(total[..., -1:] - total)[..., None] * k
        return jnp.exp(total[..., -1])[..., None, None] * memory + jnp.swapaxes(left, -1, -2) @ written, out

    chunks = (*map(chunked, (query, key, value, beta)), chunked(logs))
    with jax.default_matmul_precision("float32"):  # a state that is written again and again, also on a TPU
        memory, out = jax.lax.scan(step, memory, chunks)
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(batch, -1, heads, value.shape[-1])[:, :seq], memory


def random_delta_net(key: PRNGKeyArray, d_model: int, config: DeltaConfig, epsilon: float) -> GatedDeltaNet:
    """Random weights: exp(A) uniform in 0.01..16, as published; the convolution passes the newest token."""
    keys = jax.random.split(key, 6)
    inner = config.value_heads * config.value_dim
    newest = jnp.zeros((config.channels, 1, config.width), jnp.float32).at[..., -1].set(1.0)
    return GatedDeltaNet(
        qkv_proj=random_linear(keys[0], d_model, config.channels, False, cut="out"),
        z_proj=random_linear(keys[1], d_model, inner, False, cut="out"),
        b_proj=random_linear(keys[2], d_model, config.value_heads, False, cut="out"),
        a_proj=random_linear(keys[3], d_model, config.value_heads, False, cut="out"),
        out_proj=random_linear(keys[4], inner, d_model, False, cut="in"),
        conv=newest,
        decay_log=jnp.log(jax.random.uniform(keys[5], (config.value_heads,), jnp.float32, 0.01, 16.0)),
        step_bias=jnp.ones(config.value_heads, jnp.float32),
        norm=Norm(jnp.ones(config.value_dim, jnp.float32), None, "rms", epsilon, 0.0),
        config=config,
    )


def _unit(x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
    """x / |x|, with 1e-6 added to the squared length."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _rows(each: Array, array: Array) -> Array:
    """One entry a token, with as many axes as the array."""
    return each.reshape(*each.shape, *(1,) * (array.ndim - 2))
