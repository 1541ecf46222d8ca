"""The MLP sublayer: the leaf that this framework takes apart.

    dense     hidden = f(x W_up + b_up)
    gated     hidden = f(x W_gate + b_gate) * (x W_up + b_up)      SwiGLU: f = SiLU; GeGLU: f = GELU; bilinear: f(z) = z
    out       = hidden W_down + b_down

Its named arrays, below the leaf's own name: `pre` (what enters f), `up` (the other branch of a gated MLP), `hidden`
(what the down projection reads). The block around it names `in`, `out` and `added`.
"""

from typing import Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from jaxinterp.models.layers import Linear, Tap, no_tap, project
from jaxinterp.models.rules import EXACT, Activation, Rules, activate, gate_product


@runtime_checkable
class MLPLeaf(Protocol):
    """An MLP whose inside can be seen: it offers its arrays to `tap`, obeys `rules`, and splits at `hidden`.

    Less will do to replace an MLP: any callable pytree that keeps the shape. One that takes `tap` (`layers.Tapped`)
    offers what it wants to; of others the trace has `in`, `out` and `added` only, and their derivative is their own.
    """

    def __call__(self, x: PyTree, *, tap: Tap = no_tap, rules: Rules = EXACT) -> PyTree: ...
    def hidden(self, x: PyTree, *, tap: Tap = no_tap, rules: Rules = EXACT) -> PyTree: ...
    def write(self, hidden: PyTree) -> PyTree: ...


class MLP(eqx.Module):
    """A dense MLP, or a gated one where `gate_proj` is given."""

    gate_proj: Linear | None
    up_proj: Linear
    down_proj: Linear
    activation: Activation = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "*axes d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_model"]:
        return self.write(self.hidden(x, tap=tap, rules=rules), tap=tap, rules=rules)

    def hidden(
        self, x: Float[Array, "*axes d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_mlp"]:
        """What the down projection reads."""
        if self.gate_proj is None:
            pre = tap("pre", project(self.up_proj, "up_proj", x, tap, rules))
            return tap("hidden", activate(self.activation, pre, rules))
        pre = tap("pre", project(self.gate_proj, "gate_proj", x, tap, rules))
        up = tap("up", project(self.up_proj, "up_proj", x, tap, rules))
        return tap("hidden", gate_product(activate(self.activation, pre, rules), up, rules))

    @property
    def gate(self) -> Linear | None:
        """`gate_proj`, by its shorter name, which older scripts use."""
        return self.gate_proj

    @property
    def up(self) -> Linear:
        """`up_proj`, likewise."""
        return self.up_proj

    @property
    def down(self) -> Linear:
        """`down_proj`, likewise."""
        return self.down_proj

    def projections(self) -> tuple[str, ...]:
        """The fields of its linear maps."""
        return ("up_proj", "down_proj") if self.gate_proj is None else ("gate_proj", "up_proj", "down_proj")

    def write(
        self, hidden: Float[Array, "*axes d_mlp"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_model"]:
        """The down projection."""
        return project(self.down_proj, "down_proj", hidden, tap, rules)
