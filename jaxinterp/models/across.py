"""One forward pass in which arrays are replaced by what was read before, at the same place or in earlier layers.

    at reads[i]     c_i = offer(i, x_i, tap)                 arrays of its own below the leaf: `blocks/0/mlp/codes`
    at writes[l]    y_l <- write(l, (c_0 ... c_l), x_l, y_l, tap)

What a source layer wrote is kept until its target layer is reached: a cross-layer transcoder in the model, with errors
that travel on. Every intervention is an edit as in `run`; an edit at an array that is read comes before the reading,
one at an array that is written after the writing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Edit
from jaxinterp.models.layers import Tap, under
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.run import Trace, run

Offer = Callable[[int, Array, Tap], Any]
"""(layer, what it reads, tap below the leaf it reads) -> whatever `Write` wants of it."""

Write = Callable[[int, Sequence[Any], Array, Array, Tap], Array]
"""(layer, what the layers up to it offered, what it reads, the array as it is, tap below the leaf it writes) -> what
replaces the array."""


def run_across(
    model: PyTree,
    tokens: object,
    reads: Sequence[str],
    writes: Sequence[str],
    offer: Offer,
    write: Write,
    *,
    edits: Mapping[str, Edit] | None = None,
    rules: Rules = EXACT,
    mask: object = None,
    positions: object = None,
    keep: str | Sequence[str] | None = None,
    where: Array | None = None,
) -> Trace:
    """Run the model with its arrays `writes` replaced: the module's equations.

    Args:
      reads, writes: one name a layer, in the order of the flow.
      offer, write: see the module's docstring; called once a layer.
      edits, rules, mask, positions, keep: as in `run`.
      where: [batch, seq]; where it is 0 the model keeps its own array.
    Raises:
      UserError: as `run`; or a layer is written before it is read.
    """
    read: dict[int, tuple[Any, Array]] = {}
    own = dict(edits or {})

    def reading(name: str) -> Edit:
        def edit(x: Array, *, tap: Tap, name: str, positions: Array) -> Array:
            x = _edited(own, name, x, tap, positions) if name not in writes else x
            for layer, each in enumerate(reads):
                if each == name:
                    read[layer] = offer(layer, _flat(x), under(tap, _leaf(name))), _flat(x)
            return writing(name)(x, tap=tap, name=name, positions=positions) if name in writes else x

        return edit

    def writing(name: str) -> Edit:
        def edit(y: Array, *, tap: Tap, name: str, positions: Array) -> Array:
            layer = list(writes).index(name)
            for earlier in range(layer + 1):
                if earlier not in read:
                    raise UserError(
                        f"{name!r} is written before {reads[earlier]!r} is read: it cannot be replaced on the way."
                    )
            offers = [read[earlier][0] for earlier in range(layer + 1)]
            written = write(layer, offers, read[layer][1], _flat(y), under(tap, _leaf(name)))
            written = written.reshape(y.shape).astype(y.dtype)
            if where is not None:
                written = jnp.where(where.reshape(*y.shape[:2], *[1] * (y.ndim - 2)) > 0, written, y)
            return _edited(own, name, written, tap, positions)

        return edit

    merged = own | {name: writing(name) for name in writes} | {name: reading(name) for name in reads}
    return run(model, tokens, edits=merged, rules=rules, mask=mask, positions=positions, keep=keep)


def _edited(edits: Mapping[str, Edit], name: str, x: Array, tap: Tap, positions: Array) -> Array:
    """The array after the user's own edit of it, if there is one."""
    if name not in edits:
        return x
    given = {"tap": tap, "name": name, "positions": positions}
    return edits[name](x, **{key: value for key, value in given.items() if takes(edits[name], key)})


def _leaf(name: str) -> str:
    return name.rpartition("/")[0]


def _flat(x: Array) -> Array:
    """Heads beside each other."""
    return x.reshape(*x.shape[:2], -1)
