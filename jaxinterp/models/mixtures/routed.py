"""A published mixture of experts: a router with weights, experts that only their tokens visit, perhaps a shared expert.

    z = x W_r (+ b_r)                                   `router`, float32
    index = the k largest of z,  weight by `scores`     `experts/index`, `experts/weight`, [..., k]
    y = sum_k weight_k E_index_k(x) + s(x) S(x)         E_e, S: gated MLPs;  s = sigmoid(x w_s), or 1

    scores    softmax   weight = softmax(z) at index; divided by their sum where `renormalise` (Mixtral, OLMoE, Qwen)
              chosen    weight = softmax over the k chosen z (gpt-oss)
              sigmoid   weight = sigmoid(z); it multiplies what the expert reads, not what it writes (Llama 4)

An expert computes out = (f(x G) * (x U)) D; with `limit`, f and the product are gpt-oss's: g = min(x G, limit),
u = clip(x U, -limit, limit), hidden = (u + 1) g sigmoid(alpha g). Biases where the family has them.

Tokens are sorted by expert and multiplied in groups (`grouped.py`): work and memory grow with the experts that a token
visits, not with all of them.

Edits. -inf at `router` switches an expert off and the next best is chosen instead (*replace*). -1 at `experts/index`
switches it off and chooses none instead; the weights of the others are scaled to the sum that all had (*renormalise*):
`SwitchOff`. An *opened* expert (`open_experts`) is computed on every token and offers `experts/5/in`, `experts/5/out`
and `experts/5/routed` ([..., 1], 1 where the router chose it). So does a replaced one, which offers its own arrays
besides: `replace(model, {"blocks/3/mlp/experts/5": f})`; f reads the tokens of all experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear, Tap, call_leaf, no_tap, random_linear, under
from jaxinterp.models.mixtures.grouped import grouped_matmul, sorted_by_group
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import EXACT, Activation, Rules, activate, gate_product

Scores = Literal["softmax", "chosen", "sigmoid"]


@dataclass(frozen=True)
class RoutedConfig:
    """The sizes and choices of a mixture; `hidden` and `shared` count the neurons of one expert and the shared one."""

    experts: int
    active: int
    hidden: int
    scores: Scores = "softmax"
    renormalise: bool = False
    router_bias: bool = False
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    activation: Activation = "silu"
    limit: float | None = None
    alpha: float = 1.702

    def __post_init__(self) -> None:
        """Raises UserError if more experts are active than there are."""
        if not 1 <= self.active <= self.experts:
            raise UserError(f"active={self.active} must be from 1 to experts={self.experts}.")


class Stacked(eqx.Module):
    """One linear map an expert. `cut` as in `Linear`: over devices, neurons are cut, not experts."""

    weight: Float[Array, "experts d_in d_out"]
    bias: Float[Array, "experts d_out"] | None
    cut: Literal["out", "in"] = eqx.field(static=True)

    def cuts(self) -> dict[str, int | None]:
        """The axes of weight and bias that are cut."""
        weight, bias = (2, 1) if self.cut == "out" else (1, None)
        return {"weight": weight, "bias": bias}

    def one(self, expert: int) -> Linear:
        """The map of one expert."""
        return Linear(self.weight[expert], None if self.bias is None else self.bias[expert], self.cut)

    def grouped(
        self, x: Float[Array, "rows d_in"], experts: Int[Array, " rows"], sizes: Int[Array, " experts"]
    ) -> Float[Array, "rows d_out"]:
        """The maps of rows that are sorted by expert."""
        y = grouped_matmul(x, self.weight, sizes)
        return y if self.bias is None else y + self.bias[experts]


class Experts(eqx.Module):
    """Gated MLPs, one an expert."""

    gate_proj: Stacked
    up_proj: Stacked
    down_proj: Stacked


class Expert(eqx.Module):
    """One expert: a gated MLP with the mixture's activation."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    config: RoutedConfig = eqx.field(static=True)

    def projections(self) -> tuple[str, ...]:
        """The fields of its linear maps."""
        return ("gate_proj", "up_proj", "down_proj")

    def hidden(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes hidden"]:
        """What the down projection reads."""
        pre, up = tap("pre", self.gate_proj(x)), tap("up", self.up_proj(x))
        return tap("hidden", _gated(self.config, pre, up, rules))

    def write(self, hidden: Float[Array, "*axes hidden"]) -> Float[Array, "*axes d"]:
        """The down projection."""
        return self.down_proj(hidden)

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        return self.write(self.hidden(x, tap=tap, rules=rules))


def _gated(config: RoutedConfig, pre: Array, up: Array, rules: Rules) -> Array:
    """hidden of the module's equations."""
    if config.limit is None:
        return gate_product(activate(config.activation, pre, rules), up, rules)
    pre, up = jnp.minimum(pre, config.limit), jnp.clip(up, -config.limit, config.limit)
    return gate_product(activate("silu", config.alpha * pre, rules) / config.alpha, up + 1, rules)


class RoutedMLP(eqx.Module):
    """The mixture of the module's equations."""

    router: Linear
    experts: Experts
    shared: MLP | None
    shared_gate: Linear | None
    config: RoutedConfig = eqx.field(static=True)
    opened: tuple[int, ...] = eqx.field(static=True, default=())
    replaced: Mapping[str, PyTree] = eqx.field(default_factory=dict)

    def expert(self, number: int) -> Callable[..., Any]:
        """One expert, or what replaced it: a callable `[..., d] -> [..., d]`.

        Raises:
          UserError: there is no such expert.
        """
        if not 0 <= number < self.config.experts:
            raise UserError(f"expert {number} does not exist: there are {self.config.experts}, from 0.")
        maps = self.experts
        own = Expert(maps.gate_proj.one(number), maps.up_proj.one(number), maps.down_proj.one(number), self.config)
        return self.replaced.get(str(number), own)

    def weights(self, logits: Float[Array, "*axes experts"], index: Int[Array, "*axes k"]) -> Float[Array, "*axes k"]:
        """How much each chosen expert counts; 0 for index -1, and the others are scaled to the sum with it."""
        chosen = jnp.take_along_axis(logits, jnp.maximum(index, 0), axis=-1)
        if self.config.scores == "chosen":
            weight = jax.nn.softmax(jnp.where(index < 0, -jnp.inf, chosen), axis=-1)
            return jnp.where(jnp.all(index < 0, axis=-1, keepdims=True), 0.0, weight)
        if self.config.scores == "sigmoid":
            return jnp.where(index < 0, 0.0, jax.nn.sigmoid(chosen))
        probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), jnp.maximum(index, 0), axis=-1)
        kept = jnp.where(index < 0, 0.0, probability)
        sum_of_kept = jnp.sum(kept, axis=-1, keepdims=True)
        if self.config.renormalise:
            return kept / jnp.maximum(sum_of_kept, 1e-30)
        best = jnp.sum(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.active)[0], axis=-1, keepdims=True)
        off = jnp.any(index < 0, axis=-1, keepdims=True)
        return jnp.where(off, kept * best / jnp.maximum(sum_of_kept, 1e-30), kept)

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        router = self.router
        logits = wide @ router.weight.astype(wide.dtype)
        logits = tap("router", logits if router.bias is None else logits + router.bias.astype(wide.dtype))
        index = tap("experts/index", jax.lax.top_k(logits, self.config.active)[1])
        weight = tap("experts/weight", self.weights(logits, index))
        apart = sorted({*self.opened, *map(int, self.replaced)})
        alone = jnp.isin(index, jnp.asarray(apart, index.dtype)) if apart else jnp.zeros(index.shape, bool)
        y = self._dispatched(x, index, jnp.where(alone, 0.0, weight), rules)
        for number in apart:
            mine = jnp.sum(jnp.where(index == number, weight, 0.0), axis=-1, keepdims=True)
            name = f"experts/{number}"
            read = tap(f"{name}/in", (x * mine).astype(x.dtype) if self.config.scores == "sigmoid" else x)
            tap(f"{name}/routed", jnp.any(index == number, axis=-1, keepdims=True).astype(x.dtype))
            out = tap(f"{name}/out", call_leaf(self.expert(number), read, tap=under(tap, name), rules=rules))
            counted = jnp.any(index == number, axis=-1, keepdims=True) if self.config.scores == "sigmoid" else mine
            y = y + (out * counted).astype(x.dtype)
        if self.shared is None:
            return y
        out = call_leaf(self.shared, tap("shared/in", x), tap=under(tap, "shared"), rules=rules)
        if self.shared_gate is not None:
            out = gate_product(out, jnp.broadcast_to(jax.nn.sigmoid(self.shared_gate(x)), out.shape), rules)
        return y + tap("shared/out", out)

    def _dispatched(
        self, x: Float[Array, "*axes d"], index: Int[Array, "*axes k"], weight: Float[Array, "*axes k"], rules: Rules
    ) -> Float[Array, "*axes d"]:
        """The sum over the chosen experts; those of weight 0 add nothing."""
        k = index.shape[-1]
        flat, tokens = jnp.maximum(index, 0).reshape(-1), x.reshape(-1, x.shape[-1])
        order, inverse, sizes = sorted_by_group(flat, self.config.experts)
        rows, of = tokens[order // k], flat[order]
        counts = weight.reshape(-1)[order][:, None]
        if self.config.scores == "sigmoid":
            rows = (rows * counts).astype(x.dtype)
        maps = self.experts
        pre, up = maps.gate_proj.grouped(rows, of, sizes), maps.up_proj.grouped(rows, of, sizes)
        y = maps.down_proj.grouped(_gated(self.config, pre, up, rules), of, sizes)
        if self.config.scores != "sigmoid":
            y = y * counts
        return jnp.sum(y[inverse].reshape(*x.shape[:-1], k, x.shape[-1]), axis=-2).astype(x.dtype)

    def with_expert(self, number: int, leaf: Callable[..., Any]) -> "RoutedMLP":
        """The mixture with another callable in one expert's place.

        Raises:
          UserError: there is no such expert.
        """
        self.expert(number)
        return RoutedMLP(
            *(self.router, self.experts, self.shared, self.shared_gate, self.config, self.opened),
            {**self.replaced, str(number): leaf},
        )

    def opening(self, *numbers: int) -> "RoutedMLP":
        """The mixture with some experts opened.

        Raises:
          UserError: there is no such expert.
        """
        for number in numbers:
            self.expert(number)
        opened = tuple(sorted({*self.opened, *numbers}))
        return RoutedMLP(
            *(self.router, self.experts, self.shared, self.shared_gate, self.config, opened), dict(self.replaced)
        )


class SwitchOff(eqx.Module):
    """The edit of `experts/index` that switches experts off without another in their place.

    The weights of a token's other experts are scaled to the sum that all had; a token with none left gets 0 from the
    mixture (MoTE, arXiv 2502.11096, "renormalise"). To let the next best take their place, edit `router` by
    `Replaced(experts)`.
    """

    experts: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, index: Int[Array, "*axes k"]) -> Int[Array, "*axes k"]:
        return jnp.where(jnp.isin(index, jnp.asarray(self.experts, index.dtype)), -1, index)


class Replaced(eqx.Module):
    """The edit of `router` that switches experts off; the next best are chosen in their place (MoTE, "replace")."""

    experts: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, logits: Float[Array, "*axes experts"]) -> Float[Array, "*axes experts"]:
        off = jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(self.experts, jnp.int32))
        return jnp.where(off, -jnp.inf, logits)


def random_routed(key: PRNGKeyArray, d: int, config: RoutedConfig) -> RoutedMLP:
    """Normal start values of standard deviation 1 / sqrt(what is read), biases 0."""
    keys = jax.random.split(key, 6)

    def stacked(key: PRNGKeyArray, d_in: int, d_out: int, cut: Literal["out", "in"]) -> Stacked:
        weight = jax.random.normal(key, (config.experts, d_in, d_out), jnp.float32) / d_in**0.5
        bias = jnp.zeros((config.experts, d_out), jnp.float32) if config.bias else None
        return Stacked(weight, bias, cut)

    experts = Experts(
        stacked(keys[0], d, config.hidden, "out"),
        stacked(keys[1], d, config.hidden, "out"),
        stacked(keys[2], config.hidden, d, "in"),
    )
    shared, gate = None, None
    if config.shared:
        parts = jax.random.split(keys[3], 3)
        shared = MLP(
            random_linear(parts[0], d, config.shared, False, cut="out"),
            random_linear(parts[1], d, config.shared, False, cut="out"),
            random_linear(parts[2], config.shared, d, False, cut="in"),
            config.activation,
        )
        gate = random_linear(keys[4], d, 1, False, cut="in") if config.shared_gate else None
    router = random_linear(keys[5], d, config.experts, config.router_bias, cut="in")
    return RoutedMLP(router, experts, shared, gate, config)
