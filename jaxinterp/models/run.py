"""A forward pass is a value: `run(model, tokens)` returns a `Trace` with every named array.

Under `jit`, whatever the caller does not return is never computed, so asking for layer 0 of 4 costs a quarter of the
pass. Every intervention is an edit, by the name of the array that it changes: see `models.edits`, names `models.sites`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.models.edits import Edit
from jaxinterp.models.ids import check_ids
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.sites import matching, sites, why_absent

NO_LOGITS = (
    "the model has no logits and so no cross-entropy: it is an encoder and predicts no token. Its answers are the "
    "arrays 'final' and 'pooled'; the scoreboard measures the latter with effect=POOLED (jaxinterp.evaluation.effects)."
)
"""What to say where logits are asked for and there are none."""


@runtime_checkable
class LanguageModel(Protocol):
    """A callable pytree from tokens to logits that offers every named array to `tap` and goes on with the answer.

    A model that predicts no token returns None. One that takes `mask` and `positions` besides can be run on padded
    prompts.
    """

    def __call__(self, tokens: PyTree, *, tap: Any, rules: Rules) -> PyTree: ...


class Trace(eqx.Module):
    """What a forward pass computed: the logits, and every named array as it flowed on (after its edit, if any).

    A mapping from names to arrays: `trace["embed"]`, `list(trace)`, `"embed" in trace`, `trace.items()`.

    Example:
      >>> trace = run(subject.model, tokens)
      >>> trace["blocks/1/mlp/hidden"].shape, "embed" in trace
      ((1, 8, 128), True)
    """

    predicted: Float[Array, "batch seq vocab"] | None
    arrays: dict[str, Array]
    keep: tuple[str, ...] | None = eqx.field(static=True, default=None)

    @property
    def logits(self) -> Float[Array, "batch seq vocab"]:
        """The logits.

        Raises:
          UserError: the model has none.
        """
        if self.predicted is None:
            raise UserError(NO_LOGITS)
        return self.predicted

    def __getitem__(self, name: str) -> Array:
        if name not in self.arrays:
            if self.keep is not None and not keeps(self.keep, name):
                raise UserError(f"{name!r} was not kept: the run was asked to keep={self.keep!r}.")
            raise UserError(why_absent(name, self.arrays))
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __contains__(self, name: object) -> bool:
        return name in self.arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def keys(self) -> list[str]:
        """The names, in the order of the flow."""
        return list(self.arrays)

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook or IPython completes after `trace["`."""
        return list(self.arrays)

    def values(self) -> list[Array]:
        """The arrays, in the order of the flow."""
        return list(self.arrays.values())

    def items(self) -> list[tuple[str, Array]]:
        """Names and arrays."""
        return list(self.arrays.items())


class Tapping:
    """The tap of one forward pass: it applies the edits and keeps the arrays."""

    def __init__(self, edits: Mapping[str, Edit], positions: Callable[[], Array], keep: tuple[str, ...] | None):
        self.edits, self.positions, self.keep = edits, positions, keep
        self.arrays: dict[str, Array] = {}
        self.edited: set[str] = set()

    def wants(self, name: str) -> bool:
        """Whether the array is edited, has edits below it, or is kept."""
        return name in self.edits or keeps(self.keep, name)

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.edits:
            value = self._edit(name, value)
        if keeps(self.keep, name):
            self.arrays[name] = value
        return value

    def _edit(self, name: str, value: Array) -> Array:
        edit = self.edits[name]
        self.edited.add(name)
        given: dict[str, PyTree] = {}
        if takes(edit, "positions"):
            given["positions"] = self.positions()
        if takes(edit, "tap"):
            given["tap"] = self
        if takes(edit, "name"):
            given["name"] = name
        edited = edit(value, **given)
        if not isinstance(edited, jax.Array):
            raise UserError(f"the edit at {name!r} returned a {type(edited).__name__}: it must return an array.")
        if edited.shape != value.shape or edited.dtype != value.dtype:
            raise UserError(
                f"the edit at {name!r} returned {edited.dtype}{edited.shape} for {value.dtype}{value.shape}: "
                "an edit must keep shape and dtype."
            )
        return edited


@ordinary()
def run(
    model: PyTree,
    tokens: object,
    *,
    edits: Mapping[str, Edit] | None = None,
    rules: Rules = EXACT,
    mask: object = None,
    positions: object = None,
    keep: str | Sequence[str] | None = None,
) -> Trace:
    """Run the model and keep every named array.

    Args:
      model: a callable pytree `model(tokens, *, tap, rules) -> logits`, or None where it has none.
      tokens: Int [batch, seq]: token ids.
      edits: by array name, a callable pytree that maps the array to the one that flows on (see `Edit`). The names are
        static, the edits may be traced. As an argument of a jitted function an edit must be a pytree: `Apply(f)`.
      rules: which derivatives are replaced (values never are). A replaced leaf that knows no rules keeps its own.
      mask: Bool [batch, seq], False for padding: no other token looks at it. Positions then count the tokens that are
        not padding, so that a prompt padded on the left gives the numbers of the prompt alone.
      positions: Int [batch, seq]: the position of every token; default: 0, 1, 2, ... in every row, or by `mask`.
      keep: a glob or several: which arrays the trace has. Default: all. Arrays that only the trace would hold (dense
        codes of a replaced leaf) are not made where they are not kept; under `jit` they never are.

    Example:
      clean = run(model, tokens)
      ablated = run(model, tokens, edits={"blocks/3/mlp/out": SetTo(0.0)}).logits
      padded = run(model, tokens, mask=tokens != padding)["final"][:, -1]

    Raises:
      UserError: tokens are not ids [batch, seq]; an id has no row in the embedding (under `jit`, where ids have no
        values yet, its row is NaN); an edit's name is not that of an array, or an edit changes shape or dtype; the
        model takes no mask or positions.
    """
    ids = check_tokens(tokens)
    for name, edit in (edits or {}).items():
        if not callable(edit):
            kind = type(edit).__name__
            raise UserError(f"the edit at {name!r} is a {kind}: give a callable, as Add(...) or SetTo(...).")
    real = None if mask is None else _rows("mask", mask, ids, jnp.bool_)
    if real is not None:  # whatever id padding has
        ids = jnp.where(real, ids, 0)
    check_ids(model, ids)
    places = None if positions is None else _rows("positions", positions, ids, jnp.int32)
    if real is not None and places is None:
        places = jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, -1)
    others = {name: value for name, value in (("mask", real), ("positions", places)) if value is not None}
    for name in others:
        if not takes(model, name):
            raise UserError(f"a {type(model).__name__} takes no {name}: give prompts of one length, without padding.")
    kept = (keep,) if isinstance(keep, str) else None if keep is None else tuple(keep)

    def counted() -> Array:
        return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape) if places is None else places

    tap = Tapping(dict(edits or {}), counted, kept)
    logits = model(ids, tap=tap, rules=rules, **others)
    for name in tap.edits:
        if name not in tap.edited:
            raise UserError(why_absent(name, tap.arrays if kept is None else sites(model)))
    return Trace(logits, tap.arrays, kept)


def check_tokens(tokens: object) -> Int[Array, "batch seq"]:
    """The tokens as an array of ids [batch, seq].

    Raises:
      UserError: they are text, a list, of another number of axes, or not whole numbers.
    """
    if isinstance(tokens, str):
        raise UserError("tokens is text: give ids, jnp.asarray([subject.tokenizer.encode(text)]).")
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise UserError(f"tokens is a {type(tokens).__name__}: give an array of ids [batch, seq], jnp.asarray([ids]).")
    if tokens.ndim != 2:
        way_out = ": give tokens[None] for a batch of one" if tokens.ndim == 1 else ""
        raise UserError(f"tokens has shape {tokens.shape}, not [batch, seq]{way_out}.")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens has dtype {tokens.dtype}: ids are whole numbers.")
    return jnp.asarray(tokens)


def _rows(name: str, value: object, tokens: Array, dtype: DTypeLike) -> Array:
    """One number a token, [batch, seq]."""
    if not isinstance(value, jax.Array | np.ndarray) or value.shape != tokens.shape:
        given = value.shape if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
        raise UserError(f"{name} is {given}: give an array {tokens.shape}, one number a token.")
    if dtype == jnp.int32 and not jnp.issubdtype(value.dtype, jnp.integer):
        raise UserError(f"{name} has dtype {value.dtype}: positions are whole numbers.")
    return jnp.asarray(value).astype(dtype)


def keeps(keep: tuple[str, ...] | None, name: str) -> bool:
    """Whether a name matches one of the globs; None matches all."""
    return keep is None or any(matching(pattern)(name) for pattern in keep)
