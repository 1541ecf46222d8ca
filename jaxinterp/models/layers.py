"""The parts that every sublayer is made of: linear maps and norms.

Weights are stored `(d_in, d_out)`, so that a forward pass reads `x @ weight`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.callables import takes
from jaxinterp.core.trees import path_name
from jaxinterp.models.rules import EXACT, Rules, hold

Tap = Callable[[str, Any], Any]
"""Called with the name and the value of every named array; what it returns flows on."""


def no_tap(name: str, value: PyTree) -> PyTree:
    """The tap that only looks away: every value flows on as it is."""
    return value


@runtime_checkable
class ChoosyTap(Protocol):
    """A tap that says beforehand which names it looks at, so that an array nobody wants is not made.

    `wants(name)` is False where `tap(name, value)` would give the value back and keep nothing.
    """

    def __call__(self, name: str, value: PyTree) -> PyTree: ...
    def wants(self, name: str) -> bool: ...


def wants(tap: Tap, name: str) -> bool:
    """Whether the tap looks at this array. Ask before making an array that only a tap would read."""
    return tap.wants(name) if isinstance(tap, ChoosyTap) else tap is not no_tap


@dataclass(frozen=True)
class Below:
    """A tap whose names are below a prefix."""

    tap: Tap
    prefix: str

    def __call__(self, name: str, value: PyTree) -> PyTree:
        return self.tap(f"{self.prefix}/{name}", value)

    def wants(self, name: str) -> bool:
        """Whether the tap above looks at this array."""
        return wants(self.tap, f"{self.prefix}/{name}")


def under(tap: Tap, prefix: str) -> Tap:
    """A tap whose names are below `prefix`; without a tap above, none."""
    return no_tap if tap is no_tap else Below(tap, prefix)


class Tapped(Protocol):
    """A callable pytree that offers arrays of its own to `tap` and obeys `rules`: what a block looks for in a leaf.

    Args:
      x: [..., d_in].
      tap: `tap(name, value)` is called with each named array; what it returns must flow on. Names are relative:
        "codes" of the leaf `blocks/3/mlp` is `blocks/3/mlp/codes`. Where the same object comes back, nothing was
        edited. `wants(tap, name)` says whether anybody looks.
      rules: which derivatives are replaced; values never are.
    Returns:
      [..., d_out].

    Called by blocks, by adapted models, and by sublayers for their projections. A leaf that takes no `tap` is called
    with x alone (`call_leaf`).
    """

    def __call__(self, x: PyTree, *, tap: Tap, rules: Rules) -> PyTree: ...


def project(linear: Callable[..., Any], name: str, x: PyTree, tap: Tap, rules: Rules) -> PyTree:
    """What a projection makes of x; arrays of its own are below its name."""
    return call_leaf(linear, x, tap=under(tap, name), rules=rules)


def call_leaf(leaf: Callable[..., Any], x: PyTree, *, tap: Tap = no_tap, rules: Rules = EXACT, **others: Any) -> PyTree:
    """The leaf of x: with those of `tap`, `rules` and the others that it takes."""
    given = {"tap": tap, "rules": rules, **others}
    return leaf(x, **{name: value for name, value in given.items() if takes(leaf, name)})


@runtime_checkable
class Cuttable(Protocol):
    """A module that says how its matrices are cut over several devices.

    `cuts()` maps the name of each of its matrices (and of each vector that is cut) to the axis that is cut, or to None
    for an array that lies whole on every device. `training.mesh` places the model by it.
    """

    def cuts(self) -> Mapping[str, int | None]: ...


@runtime_checkable
class HasProjections(Protocol):
    """A sublayer whose linear maps are sites: `projections()` names their fields in the order of the flow.

    Each is a callable pytree `[..., d_in] -> [..., d_out]`; `sites` lists it, `select` and `replace` reach it.
    """

    def projections(self) -> tuple[str, ...]: ...


@runtime_checkable
class HasExperts(Protocol):
    """A sublayer whose experts can be opened and replaced one by one; each gives a new sublayer."""

    def opening(self, *numbers: int) -> PyTree: ...
    def with_expert(self, number: int, leaf: Callable[..., Any]) -> PyTree: ...


def cut_axes(model: PyTree) -> dict[str, int | None]:
    """By name, the axis along which each matrix of a model is cut; without arrays of modules that are not Cuttable."""
    axes: dict[str, int | None] = {}
    for path, node in jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, Cuttable))[0]:
        if isinstance(node, Cuttable):
            axes |= {f"{path_name(path)}/{field}": axis for field, axis in node.cuts().items()}
    return axes


class Linear(eqx.Module):
    """y = x W (+ b).

    `cut` says which side of W is cut over several devices: "out", its outputs (and the bias), or "in", its inputs;
    None: it lies whole on every device. Heads and neurons are cut, so that a sublayer needs one sum at its end.
    """

    weight: Float[Array, "d_in d_out"]
    bias: Float[Array, " d_out"] | None
    cut: Literal["out", "in"] | None = eqx.field(static=True, default=None)

    def cuts(self) -> dict[str, int | None]:
        """The axes of weight and bias that are cut."""
        weight, bias = {"out": (1, 0), "in": (0, None), None: (None, None)}[self.cut]
        return {"weight": weight, "bias": bias}

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Norm(eqx.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32.

    y = (x - m) / sqrt(mean((x - m)^2) + epsilon) * (weight + offset) + bias,   m = mean(x) for "layer", 0 for "rms".
    Gemma stores weight - 1 and so has offset 1. A weight `[heads, d]` has a row for each head of `[..., heads, d]`.
    """

    weight: Float[Array, "*heads d"]
    bias: Float[Array, " d"] | None
    kind: Literal["rms", "layer"] = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    offset: float = eqx.field(static=True)

    def cuts(self) -> dict[str, int | None]:
        """Weights of heads lie with their heads; others whole on every device."""
        return {"weight": 0} if self.weight.ndim > 1 else {}

    def __call__(self, x: Float[Array, "*axes d"], rules: Rules = EXACT) -> Float[Array, "*axes d"]:
        return _scaled(x, self.weight, self.bias, self.kind, self.epsilon, self.offset, rules.norm)


class UnitNorm(eqx.Module):
    """RMSNorm without a weight: y = x / sqrt(mean(x^2) + epsilon) over the last axis, computed in float32."""

    epsilon: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*axes d"], rules: Rules = EXACT) -> Float[Array, "*axes d"]:
        return _scaled(x, None, None, "rms", self.epsilon, 0.0, rules.norm)


# Inside `jax.jit` they are inlined; outside they are one program, not one for each operation.
@partial(jax.jit, static_argnames=("kind", "epsilon", "offset", "held"), inline=True)
def _scaled(
    x: Float[Array, "*axes d"],
    weight: Float[Array, "*heads d"] | None,
    bias: Float[Array, " d"] | None,
    kind: Literal["rms", "layer"],
    epsilon: float,
    offset: float,
    held: bool,
) -> Float[Array, "*axes d"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse_scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    y = wide * hold(inverse_scale, held)
    if weight is not None:
        y = y * (weight.astype(wide.dtype) + offset)
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype)


def normed(norm: Norm | None, x: Float[Array, "*axes d"], rules: Rules = EXACT) -> Float[Array, "*axes d"]:
    """The norm of x; x itself where there is none."""
    return x if norm is None else norm(x, rules)


def soft_cap(x: Float[Array, "*axes"], cap: float | None) -> Float[Array, "*axes"]:
    """cap * tanh(x / cap), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@partial(jax.jit, inline=True)
def rows_of_ids(token: Float[Array, "vocab d"], ids: Int[Array, "*axes"]) -> Float[Array, "*axes d"]:
    """The rows of an embedding; NaN for an id that has none, negative ids among them."""
    return token.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def random_linear(
    key: PRNGKeyArray,
    d_in: int,
    d_out: int,
    bias: bool,
    scale: float = 1.0,
    *,
    cut: Literal["out", "in"] | None = None,
) -> Linear:
    """A linear map with entries of standard deviation scale / sqrt(d_in) and a zero bias."""
    weight = scale * jax.random.normal(key, (d_in, d_out), dtype=jnp.float32) / d_in**0.5
    return Linear(weight, jnp.zeros(d_out, jnp.float32) if bias else None, cut)
