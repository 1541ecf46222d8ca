"""A Flax model under the names of our own models: what is the same for NNX and Linen.

Flax models differ in how they are written, so the user says by a table where the parts are:

    places = Places(block="layers_{i}", mlp="layers_{i}/mlp", final_norm="norm")

The MLPs (and attentions, where given) are taken out of the model and become leaves, `blocks/3/mlp`; the rest stays as
it is, and runs as the user's own code does. Hooks stand at the modules of the table and offer what goes in and comes
out to `tap` by name:

    block        embed (before block 0), resid/pre, resid/post
    attn, mlp    in, out; a leaf of ours runs in place of the module
    mlp          added: the same as out, or what `mlp_post_norm` makes of it
    gate, up, down (inside an MLP)   pre, up, hidden
    final_norm   final

There is no resid/mid, nor pattern and z of attention: user code computes them between modules, where nothing can stand.
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxinterp.models.adapters.common import check_rules
from jaxinterp.models.adapters.flax_places import Arguments, Hook, Hooks, Part, Places, PureModule
from jaxinterp.models.layers import Tap, call_leaf, no_tap, under
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.transformer import RESIDUAL


class FlaxLayer(eqx.Module):
    """A Flax module that maps x to an array of the same shape."""

    module: Any
    arguments: Arguments = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*axes d_model"]) -> Float[Array, "*axes d_model"]:
        return _call(self.module, {}, x, self.arguments)


class FlaxMLP(eqx.Module):
    """A Flax module that is an MLP, with the paths of its projections: its inside can be seen."""

    module: Any
    arguments: Arguments = eqx.field(static=True)
    gate: str | None = eqx.field(static=True)
    up: str = eqx.field(static=True)
    down: str = eqx.field(static=True)
    width: int = eqx.field(static=True)  # of what it reads

    def __call__(
        self, x: Float[Array, "*axes d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_model"]:
        check_rules(rules, "Flax")

        def offer(name: str) -> Hook:
            return lambda call, x, *rest, **keywords: tap(name, call(x, *rest, **keywords))

        def down(call: Hook, hidden: Array, *rest: Any, **keywords: Any) -> Array:
            return call(tap("hidden", hidden), *rest, **keywords)

        projections = {self.up: offer("pre")} if self.gate is None else {self.gate: offer("pre"), self.up: offer("up")}
        return _call(self.module, {**projections, self.down: down}, x, self.arguments)

    def hidden(
        self, x: Float[Array, "*axes d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_mlp"]:
        """What the down projection reads."""
        found: list[Array] = []

        def catch(name: str, value: Array) -> Array:
            value = tap(name, value)
            if name == "hidden":
                found.append(value)
            return value

        self(x, tap=catch, rules=rules)
        return found[0]

    def write(self, hidden: Float[Array, "*axes d_mlp"]) -> Float[Array, "*axes d_model"]:
        """The down projection."""
        unused = jnp.zeros((*hidden.shape[:-1], self.width), hidden.dtype)
        hooks = {self.down: lambda call, _, *rest, **keywords: call(hidden, *rest, **keywords)}
        return _call(self.module, hooks, unused, self.arguments)


class FlaxBlock(eqx.Module):
    """The leaves of one block: any callable pytree that keeps the shape may stand there."""

    attn: Any
    mlp: Any


class FlaxModel(eqx.Module):
    """A Flax language model: tokens -> logits, the arrays at its `places` offered to `tap` by name."""

    blocks: tuple[FlaxBlock, ...]
    body: Any  # the model without its leaves
    places: Places = eqx.field(static=True)
    function: Callable[[Any, Any], Any] = eqx.field(static=True)

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq vocab"]:
        check_rules(rules, "Flax")
        hooks: dict[str, Hook] = {}
        for index, block in enumerate(self.blocks):
            leaves = {"attn": block.attn, "mlp": block.mlp}
            paths = self.places.of_block(index)
            for part, path in paths.items():
                name = f"blocks/{index}"
                if part in leaves:
                    added = part == "mlp" and "mlp_post_norm" not in paths
                    hooks[path] = _leaf_hook(leaves[part], under(tap, f"{name}/{part}"), added)
                elif part == "block":
                    hooks[path] = _block_hook(under(tap, f"{name}/resid"), tap if index == 0 else None)
                else:
                    hooks[path] = _offer(tap, f"{name}/mlp/added")
        if self.places.final_norm is not None:
            hooks[self.places.final_norm] = _offer(tap, "final")
        return self.body.run(self.function, hooks, tokens)


def _leaf_hook(leaf: Any, tap: Tap, added: bool) -> Hook:
    def hook(_: object, x: Array, *rest: Any, **keywords: Any) -> Array:
        x = tap("in", x)
        y = tap("out", call_leaf(leaf, x, tap=tap))
        return tap("added", y) if added else y

    return hook


def _block_hook(tap: Tap, outer: Tap | None) -> Hook:
    def hook(call: Hook, x: Array, *rest: Any, **keywords: Any) -> Any:
        x = x if outer is None else outer("embed", x)
        result = call(tap("pre", x), *rest, **keywords)
        if isinstance(result, tuple):
            return tap("post", checkpoint_name(result[0], RESIDUAL)), *result[1:]
        return tap("post", checkpoint_name(result, RESIDUAL))

    return hook


def _offer(tap: Tap, name: str) -> Hook:
    return lambda call, x, *rest, **keywords: tap(name, call(x, *rest, **keywords))


def _call(module: Any, hooks: Hooks, x: Array, arguments: Arguments) -> Array:
    positional, by_keyword = arguments
    return module.call(hooks, x, *positional, **dict(by_keyword))


def assemble(
    body: PureModule,
    modules: Mapping[str, PureModule],
    parts: Mapping[str, Part],
    places: Places,
    count: int,
    function: Callable[[Any, Any], Any],
) -> FlaxModel:
    """The model from its body and its leaves' modules, both by path."""

    def leaf(name: str, path: str) -> Any:
        part, module = parts[path], modules[path]
        if name == "mlp" and places.up is not None and places.down is not None:
            return FlaxMLP(module, part.arguments, places.gate, places.up, places.down, part.shape[-1])
        return FlaxLayer(module, part.arguments)

    blocks = [{name: leaf(name, path) for name, path in places.leaves(index).items()} for index in range(count)]
    return FlaxModel(tuple(FlaxBlock(block.get("attn"), block["mlp"]) for block in blocks), body, places, function)
