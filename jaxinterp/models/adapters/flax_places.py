"""Where a Flax model keeps its parts, and whether that is so.

A table of paths is all that is asked of the user. Before anything is computed one abstract pass of the model finds out
whether every module of the table is there, is passed once, and is called in a way in which a leaf can be called.

A *hook* stands where the model's code calls a module: it is called as `hook(original, x, *arguments)`, and what it
returns goes on in the module's place.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from jaxinterp.core.errors import UserError

Hook = Callable[..., Any]
Hooks = Mapping[str, Hook]
Arguments = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]
"""What a module is called with beside x: positional, and by keyword; plain values."""

LEAVES = ("attn", "mlp")
"""The parts that become leaves."""


@runtime_checkable
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
        """Raises UserError if a path cannot be told apart by blocks, or an MLP's inside is told by half."""
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
        return {name: path for name, path in self.of_block(index).items() if name in LEAVES}

    def projections(self, index: int) -> dict[str, str]:
        """The paths of what can be seen inside one block's MLP, by their names here."""
        names = [name for name in ("gate", "up", "down") if getattr(self, name) is not None]
        return {name: f"{self.of_block(index)['mlp']}/{getattr(self, name)}" for name in names}


def call_itself(model: Any, tokens: Any) -> Any:
    """The usual way to call a language model."""
    return model(tokens)


@dataclass(frozen=True)
class Part:
    """What one abstract pass saw of a module that is to be a leaf."""

    shape: tuple[int, ...]
    arguments: Arguments


def count_blocks(places: Places, paths: Iterable[str]) -> int:
    """How many blocks the model has at these places.

    Args:
      paths: of all modules of the model.
    Raises:
      UserError: there is no block, a part of a block or the final norm is not where the table says, or there is a
        block with a higher number than one whose MLP is not where the table says.
    """
    there = set(paths)
    known = ", ".join(sorted({re.sub(r"\d+", "{i}", path) for path in there}))
    count = 0
    while places.leaves(count)["mlp"] in there:
        count += 1
    wanted = {f"mlp={places.mlp!r}": places.leaves(0)["mlp"]}
    if places.final_norm is not None:
        wanted["final_norm"] = places.final_norm
    for index in range(count):
        parts = places.of_block(index) | places.projections(index)
        wanted |= {f"{name} of block {index}": path for name, path in parts.items()}
    for name, path in wanted.items():
        if path not in there:
            raise UserError(f"{name}: the model has no module {path!r}; it has {known}.")
    for name in ("mlp", "block"):
        more = min((index for index in _numbers(getattr(places, name), there) if index >= count), default=None)
        if more is not None:
            missing = places.leaves(count)["mlp"]
            raise UserError(
                f"{name} of block {more} is there, but the model has no module {missing!r}: a model whose blocks hold "
                f"MLPs in different places cannot be told by one table; it has {known}."
            )
    return count


def _numbers(pattern: str | None, paths: Iterable[str]) -> set[int]:
    """The numbers of blocks that a path of the table has in the model."""
    if pattern is None:
        return set()
    first, *rest = map(re.escape, pattern.split("{i}"))
    whole = re.compile(first + r"(\d+)" + "\\1".join(rest))
    return {int(match[1]) for match in map(whole.fullmatch, paths) if match}


def look(whole: PureModule, places: Places, count: int, function: Callable[[Any, Any], Any]) -> dict[str, Part]:
    """One abstract pass of the whole model: how each leaf is called, and that every place is passed once.

    Raises:
      UserError: a module of the table is never called, or more than once, or in a way in which no leaf can be called,
        or under a transformation that keeps its arrays inside; or the model does not give logits.
    """
    leaves = [path for index in range(count) for path in places.leaves(index).values()]
    paths = [path for index in range(count) for path in (places.of_block(index) | places.projections(index)).values()]
    paths += [] if places.final_norm is None else [places.final_norm]
    seen = dict.fromkeys(paths, 0)
    parts: dict[str, Part] = {}
    outer: list[Any] = []

    def note(path: str) -> Hook:
        def hook(call: Hook, *rest: Any, **keywords: Any) -> Any:
            seen[path] += 1
            if get_opaque_trace_state(convention="flax") != outer[0]:
                raise UserError(
                    f"module {path!r} runs inside a transformation (remat, scan, jit, vmap), out of which no array "
                    "comes: build the model without it, its blocks one by one."
                )
            if not rest or not hasattr(rest[0], "shape"):
                raise UserError(f"module {path!r} is not called with an array as its first argument, as it must be.")
            x, *others = rest
            result = call(*rest, **keywords)
            if path in leaves:
                parts[path] = Part(x.shape, _plain_arguments(path, others, keywords))
                if getattr(result, "shape", None) != x.shape:
                    shape = getattr(result, "shape", type(result).__name__)
                    raise UserError(f"module {path!r} maps {x.shape} to {shape}: a leaf must keep the shape.")
            return result

        return hook

    def forward(whole: PureModule, tokens: Any) -> Any:
        outer.append(get_opaque_trace_state(convention="flax"))
        return whole.run(function, {path: note(path) for path in paths}, tokens)

    logits = eqx.filter_eval_shape(forward, whole, jax.ShapeDtypeStruct((2, 3), jnp.int32))
    for path, times in seen.items():
        if times != 1:
            raise UserError(f"module {path!r} is called {times} times in a forward pass, not once.")
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
                f"module {path!r} takes argument {name!r}, a {type(value).__name__}, beside its input: a leaf is "
                "called with its input alone; leave it out of the table, or compute the argument inside."
            )
    return tuple(others), tuple(sorted(keywords.items()))
