"""A Flax Linen model, module and variables, under the names of our own models.

    model = from_linen(module, variables, Places(block="layers_{i}", mlp="layers_{i}/mlp", final_norm="norm"))

Paths are those of the parameters: `layers_{i}/mlp` is `variables["params"]["layers_3"]["mlp"]`. Hooks stand by
`nn.intercept_methods`, which sees every call of a submodule. Where a leaf was taken out, zeros stand among the
variables: modules that declare parameters in `setup` look for them, but nothing reads them.

Facts: Flax 0.12.8, flax/linen/module.py (`_call_wrapped_method`, `unbind`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxinterp.core.errors import UserError
from jaxinterp.models.adapters.flax_model import FlaxModel, assemble
from jaxinterp.models.adapters.flax_places import Hooks, Places, call_itself, count_blocks, look

Holes = tuple[tuple[str, tuple[int, ...], Any], ...]
"""Name, shape and dtype of variables that were taken out."""


class LinenModule(eqx.Module):
    """A Linen module and its variables: a pytree with the module as a static value."""

    variables: dict[str, Any]
    module: nn.Module = eqx.field(static=True)
    holes: Holes = eqx.field(static=True, default=())

    def call(self, hooks: Hooks, *args: Any, **keywords: Any) -> Any:
        with nn.intercept_methods(_interceptor(hooks)):
            return self.module.apply(self._filled(), *args, **keywords)

    def run(self, function: Callable[[Any, Any], Any], hooks: Hooks, tokens: Any) -> Any:
        with nn.intercept_methods(_interceptor(hooks)):
            return nn.apply(function, self.module)(self._filled(), tokens)

    def _filled(self) -> dict[str, Any]:
        zeros = {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape, dtype in self.holes}
        return unflatten_dict({**flatten_dict(self.variables, sep="/"), **zeros}, sep="/")


def _interceptor(hooks: Hooks) -> Any:
    """Calls hooks by the path of the module; not for modules that run inside a hook, which are another model's."""
    inside = False

    def interceptor(call: Any, args: Any, keywords: Any, context: Any) -> Any:
        nonlocal inside
        hook = None
        if not inside and context.method_name == "__call__":
            hook = hooks.get("/".join(context.module.path))
        if hook is None:
            return call(*args, **keywords)

        def original(*args: Any, **keywords: Any) -> Any:
            nonlocal inside
            inside = False
            try:
                return call(*args, **keywords)
            finally:
                inside = True

        inside = True
        try:
            return hook(original, *args, **keywords)
        finally:
            inside = False

    return interceptor


def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    places: Places,
    *,
    call: Callable[[Any, Any], Any] = call_itself,
) -> FlaxModel:
    """A Linen model under the names of our own models.

    Args:
      variables: as `module.apply` takes them: {"params": ...} and further collections, which are not updated.
      call: `call(module, tokens) -> logits`, a named function of the bound module; default `module(tokens)`.
    Raises:
      UserError: there is no module at a place, or it is not called once with one array; or the model gives no logits.
    """
    flat = {
        name: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        for name, leaf in flatten_dict(nn.meta.unbox(dict(variables)), sep="/").items()
    }
    if not any(name.startswith("params/") for name in flat):
        raise UserError(f"variables has the collections {', '.join(variables)}: give {{'params': parameters}}.")
    count = count_blocks(places, {owner for name in flat for owner in _owners(name.partition("/")[2])})
    whole = LinenModule(unflatten_dict(flat, sep="/"), module)
    parts = look(whole, places, count, call)
    paths = [path for index in range(count) for path in places.leaves(index).values()]
    definitions = _definitions(whole, paths, call)

    taken: dict[str, LinenModule] = {}
    body = dict(flat)
    for path in paths:
        own = {}
        for name in flat:
            collection, _, place = name.partition("/")
            if place.startswith(f"{path}/"):
                own[f"{collection}/{place.removeprefix(f'{path}/')}"] = body.pop(name)
        taken[path] = LinenModule(unflatten_dict(own, sep="/"), definitions[path])
    holes = tuple((name, tuple(leaf.shape), leaf.dtype) for name, leaf in flat.items() if name not in body)
    return assemble(LinenModule(unflatten_dict(body, sep="/"), module, holes), taken, parts, places, count, call)


def _owners(name: str) -> Iterator[str]:
    """The paths of the modules around a variable, from the inside out."""
    while name := name.rpartition("/")[0]:
        yield name


def _definitions(whole: LinenModule, paths: list[str], function: Callable[[Any, Any], Any]) -> dict[str, nn.Module]:
    """The modules at these paths, unbound."""
    found: dict[str, nn.Module] = {}

    def note(call: Any, args: Any, keywords: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if path in paths and context.method_name == "__call__":
            found[path], _ = context.module.unbind()
        return call(*args, **keywords)

    def forward(whole: LinenModule, tokens: Any) -> Any:
        with nn.intercept_methods(note):
            return whole.run(function, {}, tokens)

    eqx.filter_eval_shape(forward, whole, jax.ShapeDtypeStruct((2, 3), np.int32))
    return found
