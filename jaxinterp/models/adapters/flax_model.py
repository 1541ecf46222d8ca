"""A Flax model under the names of our own models: what is the same for NNX and Linen.

Flax models differ in how they are written, so the user says by a table where the parts are:

    places = Places(block="layers_{i}", mlp="layers_{i}/mlp", final_norm="norm")

The MLPs (and attentions, where given) are taken out of the model and become leaves, `blocks/3/mlp`; the rest stays as
it is, and runs as the user's own code does. Where that code calls a module of the table, a *hook* stands: it is called
as `hook(original, x, *arguments)`, and offers what goes in and comes out to `tap` by name:

    block        embed (before block 0), resid/pre, resid/post
    attn, mlp    in, out; a leaf of ours runs in place of the module
    mlp          added: the same as out, or what `mlp_post_norm` makes of it
    gate, up, down (inside an MLP)   pre, up, hidden
    final_norm   final

There is no resid/mid, nor pattern and z of attention: user code computes them between modules, where nothing can stand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.errors import UserError
from jaxinterp.models.adapters.common import check_rules
from jaxinterp.models.layers import Tap, no_tap, under
from jaxinterp.models.mlp import MLPLeaf
from jaxinterp.models.rules import EXACT, Rules

Hook = Callable[..., Any]
Hooks = Mapping[str, Hook]
Arguments = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]
"""What a module is called with beside x: positional, and by keyword; plain values."""


class PureModule(Protocol):
    """A Flax module as a pure function of a pytree: calls it, hooks standing at the modules of these paths."""

    def call(self, hooks: Hooks, *args: Any, **keywords: Any) -> Any: ...
    def run(self, function: Callable[[Any, Any], Any], hooks: Hooks, tokens: Any) -> Any: ...


@dataclass(frozen=True)
class Places:
    """Where a Flax model keeps its parts: paths of modules, `{i}` for the number of a block, as in `layers_{i}/mlp`.

    Attributes:
      mlp: the MLP; called with the array that it reads (and at most with values that are no arrays).
      block: the block; its first argument and its (first) result are the residual stream.
      attn: the attention sublayer; like `mlp`: where it takes masks or positions as arguments, leave it out.
      mlp_post_norm: a norm between the MLP and the residual stream, as Gemma 2 has it.
      final_norm: the norm before the unembedding.
      up, down, gate: inside the MLP, from there: its projections, where its inside shall be seen. `gate` is None for a
        dense MLP.
    """

    mlp: str
    block: str | None = None
    attn: str | None = None
    mlp_post_norm: str | None = None
    final_norm: str | None = None
    up: str | None = None
    down: str | None = None
    gate: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError where a path cannot be told apart by blocks, or an MLP's inside is told by half."""
        for name in ("mlp", "block", "attn", "mlp_post_norm"):
            path = getattr(self, name)
            if path is not None and "{i}" not in path:
                raise UserError(
                    f"{name}={path!r} does not say where the block's number stands: write it as 'layers_{{i}}/...'; "
                    "blocks that are scanned over as one module have no names of their own."
                )
        if (self.up is None) != (self.down is None) or (self.gate is not None and self.up is None):
            raise UserError(f"up={self.up!r}, down={self.down!r}, gate={self.gate!r}: give up and down together.")

    def of_block(self, index: int) -> dict[str, str]:
        """The paths of one block's parts, by their names here."""
        names = ("block", "attn", "mlp", "mlp_post_norm")
        paths = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: path.replace("{i}", str(index)) for name, path in paths.items()}

    def leaves(self, index: int) -> dict[str, str]:
        """The paths of one block's leaves, by the names of ours."""
        return {name: path for name, path in self.of_block(index).items() if name in ("mlp", "attn")}


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
    def hook(_: Hook, x: Array, *rest: Any, **keywords: Any) -> Array:
        x = tap("in", x)
        y = tap("out", leaf(x, tap=tap, rules=EXACT) if isinstance(leaf, MLPLeaf) else leaf(x))
        return tap("added", y) if added else y

    return hook


def _block_hook(tap: Tap, outer: Tap | None) -> Hook:
    def hook(call: Hook, x: Array, *rest: Any, **keywords: Any) -> Any:
        x = x if outer is None else outer("embed", x)
        result = call(tap("pre", x), *rest, **keywords)
        if isinstance(result, tuple):
            return tap("post", result[0]), *result[1:]
        return tap("post", result)

    return hook


def _offer(tap: Tap, name: str) -> Hook:
    return lambda call, x, *rest, **keywords: tap(name, call(x, *rest, **keywords))


def _call(module: Any, hooks: Hooks, x: Array, arguments: Arguments) -> Array:
    positional, by_keyword = arguments
    return module.call(hooks, x, *positional, **dict(by_keyword))


@dataclass(frozen=True)
class Part:
    """What one abstract pass saw of a module that is to be a leaf."""

    shape: tuple[int, ...]
    arguments: Arguments


def count_blocks(places: Places, has: Callable[[str], bool], known: str) -> int:
    """How many blocks the model has at these places.

    Args:
      has: whether there is a module at a path.
      known: what there is, for the message.
    Raises:
      UserError: there is no block, or a part of a block or the final norm is not where the table says.
    """
    count = 0
    while has(places.leaves(count)["mlp"]):
        count += 1
    if not count:
        raise UserError(f"mlp={places.mlp!r}: the model has no module {places.leaves(0)['mlp']!r}; it has {known}.")
    wanted = {"final_norm": places.final_norm} if places.final_norm is not None else {}
    for index in range(count):
        wanted |= {f"{name} of block {index}": path for name, path in places.of_block(index).items()}
    for name, path in wanted.items():
        if not has(path):
            raise UserError(f"{name}: the model has no module {path!r}; it has {known}.")
    return count


def look(whole: PureModule, places: Places, count: int, function: Callable[[Any, Any], Any]) -> dict[str, Part]:
    """One abstract pass of the whole model: how each leaf is called, and that every place is passed once.

    Raises:
      UserError: a module of the table is never called, or more than once, or in a way that no leaf can be called; or
        the model does not give logits.
    """
    seen: dict[str, int] = {}
    parts: dict[str, Part] = {}

    def note(path: str, leaf: bool) -> Hook:
        def hook(call: Hook, *rest: Any, **keywords: Any) -> Any:
            seen[path] = seen.get(path, 0) + 1
            if not rest:
                raise UserError(f"module {path!r} is called with keywords only: its input must be the first argument.")
            x, *others = rest
            result = call(*rest, **keywords)
            if leaf:
                parts[path] = Part(x.shape, _plain_arguments(path, others, keywords))
                if getattr(result, "shape", None) != x.shape:
                    shape = getattr(result, "shape", type(result).__name__)
                    raise UserError(f"module {path!r} maps {x.shape} to {shape}: a leaf must keep the shape.")
            return result

        return hook

    paths = {path: name in ("mlp", "attn") for index in range(count) for name, path in places.of_block(index).items()}
    if places.final_norm is not None:
        paths[places.final_norm] = False
    hooks = {path: note(path, leaf) for path, leaf in paths.items()}
    tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    logits = eqx.filter_eval_shape(lambda whole, tokens: whole.run(function, hooks, tokens), whole, tokens)
    for path in paths:
        if seen.get(path, 0) != 1:
            raise UserError(f"module {path!r} is called {seen.get(path, 0)} times in a forward pass, not once.")
    shape = getattr(logits, "shape", ())
    if len(shape) != 3 or shape[:2] != (2, 3):
        raise UserError(
            f"the model maps tokens of shape (2, 3) to {shape or type(logits).__name__}: give call=function(model, "
            "tokens) that returns logits [batch, seq, vocab]."
        )
    return parts


def _plain_arguments(path: str, others: list[Any], keywords: dict[str, Any]) -> Arguments:
    for name, value in [*enumerate(others, 1), *keywords.items()]:
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise UserError(
                f"module {path!r} takes argument {name!r}, a {type(value).__name__}, beside its input: a leaf is called "
                "with its input alone; leave the place out of the table, or compute the argument inside the module."
            )
    return tuple(others), tuple(sorted(keywords.items()))


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
    return FlaxModel(
        tuple(FlaxBlock(block.get("attn"), block["mlp"]) for block in blocks), body, places, function
    )


def call_itself(model: Any, tokens: Any) -> Any:
    """The usual way to call a language model."""
    return model(tokens)
