"""A Flax NNX model under the names of our own models.

    model = from_nnx(nnx_model, Places(block="layers/{i}", mlp="layers/{i}/mlp", final_norm="norm"))

`nnx.split` makes a pytree of the model and `nnx.merge` a model of the pytree inside each call, so that the forward pass
is a pure function and the weights are leaves. Paths are attribute names, keys and indices: `layers/{i}/mlp` is
`model.layers[i].mlp`. What a forward pass changes (statistics, caches, random counters) is not kept.

Facts: Flax 0.12.8, flax/nnx (graph.py, helpers.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
from flax import nnx

from jaxinterp.core.errors import UserError
from jaxinterp.models.adapters.flax_model import FlaxModel, assemble
from jaxinterp.models.adapters.flax_places import Hook, Hooks, Places, call_itself, count_blocks, look


class NNXModule(eqx.Module):
    """An NNX module as a pytree: its state, and its structure as a static value."""

    state: nnx.State
    graph: nnx.GraphDef = eqx.field(static=True)

    def call(self, hooks: Hooks, *args: Any, **keywords: Any) -> Any:
        return self._hooked(hooks)(*args, **keywords)

    def run(self, function: Callable[[Any, Any], Any], hooks: Hooks, tokens: Any) -> Any:
        return function(self._hooked(hooks), tokens)

    def _hooked(self, hooks: Hooks) -> Any:
        module = nnx.merge(self.graph, self.state)
        for path in sorted(hooks, key=lambda path: -path.count("/")):  # what is inside first
            _put(module, path, _Hooked(_get(module, path), hooks[path]))
        return module


class _Hooked(nnx.Module):
    """Stands where a module stood: a call goes through the hook, everything else to the module."""

    def __init__(self, module: Any, hook: Hook):
        self.hooked_module, self.hook = module, hook

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.hook(self.hooked_module, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.hooked_module, name)


class _Hole(nnx.Module):
    """Stands in the body where a leaf was taken out."""


def from_nnx(model: nnx.Module, places: Places, *, call: Callable[[Any, Any], Any] = call_itself) -> FlaxModel:
    """An NNX model under the names of our own models; the given model stays as it is.

    The model is put into evaluation mode (`eval()`: no dropout, running statistics).

    Args:
      call: `call(model, tokens) -> logits`, a named function; default `model(tokens)`.
    Raises:
      UserError: there is no module at a place, or it is not called once with one array; or the model gives no logits.
    """
    model = nnx.clone(model)
    model.eval()
    count = count_blocks(places, ("/".join(map(str, path)) for path, _ in nnx.iter_modules(model) if path))
    paths = [path for index in range(count) for path in places.leaves(index).values()]
    parts = look(_split(model), places, count, call)
    taken = {path: _split(_get(model, path)) for path in paths}
    for path in paths:
        _put(model, path, _Hole())
    return assemble(_split(model), taken, parts, places, count, call)


def _split(module: Any) -> NNXModule:
    graph, state = nnx.split(module)
    return NNXModule(state, graph)


def _get(module: Any, path: str) -> Any:
    """The module at the path; None where there is none."""
    for name in path.split("/"):
        if name.isdigit() and not isinstance(module, Mapping):
            module = module[int(name)] if hasattr(module, "__getitem__") and int(name) < len(module) else None
        else:
            module = module.get(name) if isinstance(module, Mapping) else getattr(module, name, None)
        if module is None:
            return None
    return module


def _put(module: Any, path: str, value: Any) -> None:
    parent, _, name = path.rpartition("/")
    holder = _get(module, parent) if parent else module
    if isinstance(holder, tuple):
        raise UserError(f"module {parent!r} is a tuple, in which nothing can be replaced: make it an nnx.List.")
    if name.isdigit() and hasattr(holder, "__setitem__"):
        holder[int(name)] = value
    elif isinstance(holder, Mapping):
        holder[name] = value  # type: ignore[index]
    else:
        setattr(holder, name, value)
