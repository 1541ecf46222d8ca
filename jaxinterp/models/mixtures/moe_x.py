"""MoE-X: experts that are one wide sparse MLP, and a router that prefers experts with few active neurons.

    y = sum_m w_m relu(x U_m + b_m) D_m                       U_m [d, hidden], D_m [hidden, d], m = 1..experts
      = (w~ * relu(x [U_1 .. U_M] + [b_1 .. b_M])) [D_1; ..; D_M]     w~: w_m repeated over the neurons of expert m

The router has no weights. It takes the entries of U_m that read coordinate i as draws from a normal distribution with
their own mean mu_i and variance s_i^2 over the neurons, so that a neuron of expert m is active with probability

    p_m(x) = (1 + erf((mu . x + mean b) / sqrt(2 (sum_i s_i^2 x_i^2 + var b)))) / 2

logits = -scale * p_m: the k experts of lowest expected activity are used, w = softmax of their logits. Gradients reach
U_m through mu and s. With `router` given, logits = x W_r: an ordinary top-k mixture (k = 1: Switch).

All experts are computed and those that a token does not use are multiplied by 0: experts / k times the work of a
program that skips them, and the exact wide MLP at every token.

Source: Yang et al. 2025 (arXiv 2503.07639), sections 4.1 and 4.2; biases in the router are ours. Load balance: Fedus,
Zoph, Shazeer 2021 (arXiv 2101.03961), equation 4.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.models.layers import Linear, Tap, no_tap
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import EXACT, Activation, Rules, activate

Kept = Literal["kept", "all"]


class MoEX(eqx.Module):
    """A mixture of MLPs. As a wide MLP it splits at `hidden`, [batch, seq, experts * hidden]."""

    up: Float[Array, "experts d hidden"]
    up_bias: Float[Array, "experts hidden"] | None
    down: Float[Array, "experts hidden d"]
    router: Linear | None
    k: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True, default="relu")
    scale: float = eqx.field(static=True, default=1.0)
    softmax_over: Kept = eqx.field(static=True, default="kept")

    def logits(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes experts"]:
        """What the experts are chosen by."""
        if self.router is not None:
            return self.router(x)
        return -self.scale * expected_activity(x, self.up, self.up_bias)

    def weights(self, logits: Float[Array, "*axes experts"]) -> tuple[Array, Array]:
        """The k experts of each token and their weights, `[*axes, k]` each."""
        values, index = jax.lax.top_k(logits, self.k)
        if self.softmax_over == "kept":
            return index, jax.nn.softmax(values, axis=-1)
        return index, jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), index, axis=-1)

    def hidden(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes neurons"]:
        """w~ * relu(..): what the neurons of all experts write, 0 for those of experts that are not used."""
        index, weight = self.weights(tap("router", self.logits(x)))
        index, weight = tap("experts/index", index), tap("experts/weight", weight)
        pre = jnp.einsum("...d,mdh->...mh", x, self.up)
        if self.up_bias is not None:
            pre = pre + self.up_bias
        pre = tap("pre", _flat(pre)).reshape(pre.shape)
        gated = spread(index, weight, self.up.shape[0])[..., None] * activate(self.activation, pre, rules)
        return tap("hidden", _flat(gated).astype(x.dtype))

    def write(self, hidden: Float[Array, "*axes neurons"]) -> Float[Array, "*axes d"]:
        """hidden [D_1; ..; D_M]."""
        return hidden @ self.down.reshape(-1, self.down.shape[2])

    def cuts(self) -> dict[str, int | None]:
        """Experts are spread over devices; the router lies on each."""
        return {"up": 0, "up_bias": 0, "down": 0, "router/weight": None, "router/bias": None}

    def writers(self) -> list[Array]:
        """What writes the output."""
        return [self.down]

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        return self.write(self.hidden(x, tap=tap, rules=rules))


def spread(
    index: Int[Array, "*axes k"], weight: Float[Array, "*axes k"], experts: int
) -> Float[Array, "*axes experts"]:
    """The weight of every expert, 0 where a token does not use it."""
    return jnp.sum(jax.nn.one_hot(index, experts, dtype=weight.dtype) * weight[..., None], axis=-2)


def expected_activity(
    x: Float[Array, "*axes d"],
    up: Float[Array, "experts d hidden"],
    bias: Float[Array, "experts hidden"] | None = None,
) -> Float[Array, "*axes experts"]:
    """p_m(x), the probability that a neuron of expert m is active: times `hidden`, its expected number of them."""
    mean, variance = jnp.mean(up, axis=2), jnp.var(up, axis=2)
    center, spread_ = x @ mean.T, (x * x) @ variance.T
    if bias is not None:
        center, spread_ = center + jnp.mean(bias, axis=1), spread_ + jnp.var(bias, axis=1)
    return (1 + jax.lax.erf(center / jnp.sqrt(2 * spread_ + 1e-30))) / 2


def load_balance(
    logits: Float[Array, "*axes experts"], index: Int[Array, "*axes k"], weight: Float[Array, "*axes"] | None = None
) -> Float[Array, ""]:
    """experts * sum_m f_m P_m: 1 where tokens are spread evenly, `experts` where one expert has them all.

    f_m: the share of all choices that are m (no gradient); P_m: the mean of softmax(logits)_m. `weight`: of tokens.
    """
    experts = logits.shape[-1]
    counts = jnp.ones(logits.shape[:-1], logits.dtype) if weight is None else weight
    total = jnp.maximum(jnp.sum(counts), 1e-9)
    chosen = jnp.sum(jax.nn.one_hot(index, experts, dtype=logits.dtype), axis=-2) / index.shape[-1]
    axes = tuple(range(logits.ndim - 1))
    share = jax.lax.stop_gradient(jnp.sum(chosen * counts[..., None], axis=axes) / total)
    probability = jnp.sum(jax.nn.softmax(logits, axis=-1) * counts[..., None], axis=axes) / total
    return experts * jnp.sum(share * probability)


def upcycled(mlp: MLP, experts: int, k: int, *, router: Linear | None = None, scale: float = 1.0) -> MoEX:
    """Every expert a copy of a dense MLP: the same function at the start, which training then lets drift apart.

    Raises:
      ValueError: the MLP is gated.
    """
    if mlp.gate_proj is not None:
        raise ValueError("the MLP is gated: MoE-X starts from a dense one (mlp='relu').")
    repeat = lambda leaf: jnp.repeat(leaf[None], experts, axis=0)
    bias = None if mlp.up_proj.bias is None else repeat(mlp.up_proj.bias)
    return MoEX(repeat(mlp.up_proj.weight), bias, repeat(mlp.down_proj.weight), router, k, mlp.activation, scale)


def random_moe_x(
    key: PRNGKeyArray, d: int, hidden: int, experts: int, k: int, *, routed: bool = False, scale: float = 1.0
) -> MoEX:
    """Normal start values of standard deviation 1/sqrt(what is read); `routed`: with an ordinary router."""
    up_key, down_key, router_key = jax.random.split(key, 3)
    up = jax.random.normal(up_key, (experts, d, hidden), jnp.float32) / d**0.5
    down = jax.random.normal(down_key, (experts, hidden, d), jnp.float32) / hidden**0.5
    router = Linear(jax.random.normal(router_key, (d, experts), jnp.float32) / d**0.5, None) if routed else None
    return MoEX(up, None, down, router, k, scale=scale)


def _flat(neurons: Float[Array, "*axes experts hidden"]) -> Float[Array, "*axes neurons"]:
    return neurons.reshape(*neurons.shape[:-2], -1)
