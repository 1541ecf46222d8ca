"""Names for what happens inside a forward pass: list them, look, replace, edit.

A *site* is a name. `blocks/3/mlp` is a leaf, the sublayer itself; so are its linear maps, the *projections*
`blocks/3/mlp/{gate_proj,up_proj,down_proj}` and `blocks/3/attn/{q_proj,k_proj,v_proj,o_proj}`. A leaf can be selected
and replaced. `blocks/3/mlp/{in,pre,up,hidden,out,added}`, `blocks/3/attn/{in,pattern,z,out}`,
`blocks/3/resid/{pre,mid,post}`, `embed` and `final` are arrays; an encoder has `pooled` besides, [batch, d_model]. A
Gated DeltaNet at `blocks/3/attn` has projections and arrays of its own (`delta_net`).

A forward pass is a value: `run(model, tokens)` returns a `Trace` with every named array. Under `jit`, whatever the
caller does not return is never computed, so asking for layer 0 of 4 costs a quarter of the pass. Every intervention is
an edit: a callable pytree `Array -> Array` by the name of the array that it changes.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree
from penzai import pz

from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.trees import path_name
from jaxinterp.models.dialects import near, understood
from jaxinterp.models.ids import check_ids
from jaxinterp.models.layers import HasExperts, HasProjections, Linear
from jaxinterp.models.rules import EXACT, Rules

Edit = Callable[..., Array]
"""A callable pytree that maps an array to the one that flows on: `edit(x)`, of the same shape and dtype.

An edit that takes `positions`, `tap` or `name` by keyword gets them from `run`:

    positions  Int [batch, seq]: the position of every token, -1 for padding
    tap        offers arrays of the edit's own by their whole name, `blocks/1/resid/post/codes`
    name       the name of the edited array
"""

NO_LOGITS = (
    "the model has no logits and so no cross-entropy: it is an encoder and predicts no token. Its answers are the "
    "arrays 'final' and 'pooled'; the scoreboard measures the latter with effect=POOLED (jaxinterp.evaluation.effects)."
)
"""What to say where logits are asked for and there are none."""

LEAVES = ("/mlp", "/attn")
"""How the name of a sublayer ends."""

PARTS = re.compile(r"(.+/mlp)/(?:shared|experts/(\d+))")
"""Leaves inside a mixture of experts: the shared expert, and each expert that was opened or replaced."""

PROJECTIONS = (
    *("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    *("qkv_proj", "z_proj", "b_proj", "a_proj", "out_proj"),
)
"""What linear maps inside a sublayer are called."""


CODES = ("codes", "codes_pre", "gate_pre", "error", "components")
"""What arrays of a decomposition are called."""


@runtime_checkable
class LanguageModel(Protocol):
    """A callable pytree from tokens to logits that offers every named array to `tap` and goes on with the answer.

    A model that predicts no token returns None. One that takes `mask` and `positions` besides can be run on padded
    prompts.
    """

    def __call__(self, tokens: PyTree, *, tap: Any, rules: Rules) -> PyTree: ...


def _as_array(value: object) -> object:
    """A number or a NumPy array as a JAX array; a number in JAX's default float."""
    if isinstance(value, bool | int | float):
        return jnp.asarray(value, jnp.result_type(float))
    return jnp.asarray(value) if isinstance(value, np.ndarray | np.generic) else value


class SetTo(eqx.Module):
    """The edit that puts `value` where the array was: ablate with 0, patch with another run's array.

    The value is broadcast; one with as many entries as the array is reshaped. `SetTo(0.0)` sets all to zero.

    Example:
      >>> ablated = run(subject.model, tokens, edits={"blocks/1/mlp/out": SetTo(0.0)})
      >>> float(jnp.abs(ablated["blocks/1/mlp/out"]).max())
      0.0
    """

    value: Float[Array, "..."] = eqx.field(converter=_as_array)

    def __call__(self, x: Array) -> Array:
        if self.value.size == x.size:
            return self.value.reshape(x.shape).astype(x.dtype)
        return jnp.broadcast_to(self.value, x.shape).astype(x.dtype)


class Add(eqx.Module):
    """The edit that adds `delta` (broadcast): steer with a direction, or differentiate by a zero.

    Example:
      >>> steered = run(subject.model, tokens, edits={"blocks/1/resid/post": Add(jnp.ones(64))})
    """

    delta: Float[Array, "..."] = eqx.field(converter=_as_array)

    def __call__(self, x: Array) -> Array:
        return (x + self.delta).astype(x.dtype)


class Apply(eqx.Module):
    """The edit `function(x)`: makes an edit that can be an argument of `jax.jit` of any function.

    `edits={name: lambda x: 2 * x}` works in a call of `run`; as an *argument* of a jitted function an edit must be a
    pytree, which a lambda is not: `{name: Apply(lambda x: 2 * x)}`.
    """

    function: Callable[..., Array] = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.function(x)


class At(eqx.Module):
    """The edit `edit` at some positions only; the array is [batch, seq, ...].

    Positions are absolute: those of the prompt and of what is generated after it, without padding.
    """

    edit: Callable[..., Array]
    positions: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Array, *, positions: Int[Array, "batch seq"]) -> Array:
        if x.shape[:2] != positions.shape:
            raise UserError(f"At(...) edits arrays [batch, seq, ...], but this one is {x.shape} for {positions.shape}.")
        here = jnp.isin(positions, jnp.asarray(self.positions, jnp.int32))
        edited = self.edit(x, positions=positions) if takes(self.edit, "positions") else self.edit(x)
        return jnp.where(here.reshape(*here.shape, *[1] * (x.ndim - 2)), edited, x)


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
            raise UserError(_why_absent(name, self.arrays))
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
            raise UserError(_why_absent(name, tap.arrays if kept is None else sites(model)))
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
    return keep is None or any(_glob(pattern)(name) for pattern in keep)


@ordinary()
def sites(model: PyTree, pattern: str = "**") -> list[str]:
    """Every site of the model in the order of the flow: leaves (each before its projections) and arrays.

    Args:
      pattern: a glob; `*` stands for one component or a part of it (`blocks/*/mlp`), `**` for any number of them.

    Example:
      >>> sites(subject.model, "blocks/*/mlp")
      ['blocks/0/mlp', 'blocks/1/mlp', 'blocks/2/mlp', 'blocks/3/mlp']
    """
    leaves, structure = jax.tree.flatten(model)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves)
    try:
        arrays = _arrays(structure, shapes)
    except TypeError:  # a leaf or a static field that has no hash
        arrays = _arrays.__wrapped__(structure, shapes)
    projections = _projections(model)
    names: list[str] = []
    for name in arrays:
        leaf, _, port = name.rpartition("/")
        if port == "in" and (leaf.endswith(LEAVES) or PARTS.fullmatch(leaf)):
            names += [leaf, *projections.get(leaf, ())]
        names.append(name)
    matches = _glob(pattern)
    return [name for name in names if matches(name)]


@lru_cache(maxsize=64)
def _arrays(structure: PyTree, leaves: tuple[Any, ...]) -> tuple[str, ...]:
    """The names that a model of this structure and these shapes offers, in order: of a forward pass over one token."""
    arrays: list[str] = []

    def note(name: str, value: Array) -> Array:
        arrays.append(name)
        return value

    model, tokens = jax.tree.unflatten(structure, leaves), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    eqx.filter_eval_shape(lambda model, tokens: model(tokens, tap=note, rules=EXACT), model, tokens)
    return tuple(arrays)


def _projections(model: PyTree) -> dict[str, list[str]]:
    """The names of the projections inside each leaf that shows them."""
    shows = lambda node: isinstance(node, HasProjections)
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=shows)[0]
    inside = {path_name(path): node.projections() for path, node in nodes if shows(node)}
    return {leaf: [f"{leaf}/{field}" for field in fields] for leaf, fields in inside.items()}


@ordinary()
def check_site(model: PyTree, name: str) -> str:
    """Our name of a site of the model; `name` may be of any dialect (`jaxinterp.models.dialects`).

    Raises:
      UserError: it is not; the message suggests the nearest names or says why it is missing.
    """
    known = sites(model)
    name = understood(model, name, known)
    if name not in known:
        raise UserError(_why_absent(name, known))
    return name


def select(model: PyTree, pattern: str) -> PyTree:
    """Penzai's selection of the subtrees whose name matches a glob: `select(model, "blocks/*/mlp").get_sequence()`.

    Raises:
      UserError: nothing matches.

    Example:
      >>> len(select(subject.model, "blocks/*/mlp").get_sequence())
      4
    """
    matches = _glob(pattern)
    selection = pz.select(model).at_subtrees_where(lambda path, _: matches(path_name(path)), with_keypath=True)
    if selection.count() == 0:
        raise UserError(f"no part of the model matches {pattern!r}.{suggest(pattern, sites(model))}")
    return selection


def replace(model: PyTree, leaves: Mapping[str, PyTree]) -> PyTree:
    """A new model with other callables at the named leaves: `replace(model, {"blocks/3/mlp": transcoder})`.

    A projection is replaced in the same way: `replace(model, {"blocks/3/mlp/up_proj": linear})`.

    Raises:
      UserError: a name is not a leaf of the model, a replacement is not callable or has another shape than the
        projection, or its `sites` are not what the leaf reads and writes.

    Example:
      >>> replaced = replace(subject.model, {"blocks/1/mlp": result.decomposition})
      >>> run(replaced, tokens)["blocks/1/mlp/codes"].shape
      (1, 8, 64)
    """
    every = sites(model)
    ends = (*LEAVES, "/shared")
    known = [name for name in every if name.endswith(ends) or name.rpartition("/")[2] in PROJECTIONS]
    for name, leaf in leaves.items():
        expert = PARTS.fullmatch(name)
        mixture = select(model, expert[1]).get() if expert and expert[2] and expert[1] in known else None
        if name not in known and not isinstance(mixture, HasExperts):
            raise UserError(_why_not_a_leaf(name, known, every))
        if not callable(leaf):
            raise UserError(f"the replacement for {name!r} is a {type(leaf).__name__}, which is not callable.")
        if mixture is None:
            _check_projection(name, select(model, name).get(), leaf)
        own = getattr(leaf, "sites", None)
        if own is not None and (own.reads, own.writes) != (f"{name}/in", f"{name}/out"):
            way_out = (
                "for an array inside an MLP, wrap it in StandIn(mlp, decomposition)"
                if own.leaf == name
                else f"it belongs at {own.leaf!r}"
            )
            raise UserError(
                f"the replacement for {name!r} reads {own.reads!r} and writes {own.writes!r}, not the leaf's input and "
                f"output: {way_out}."
            )
        if expert and isinstance(mixture, HasExperts):
            model = select(model, expert[1]).set(mixture.with_expert(int(expert[2]), leaf))
        else:
            model = select(model, name).set(leaf)
    return model


@ordinary()
def open_experts(model: PyTree, site: str, *numbers: int) -> PyTree:
    """A new model in which some experts of the mixture at `site` are sites of their own.

    `open_experts(model, "blocks/3/mlp", 5)` has `blocks/3/mlp/experts/5`, a leaf that reads and writes
    `experts/5/{in,out}`, and `experts/5/routed`: 1 where the router chose it. Values stay as they are. A method fitted
    at an expert learns from the tokens that are routed to it.

    Raises:
      UserError: the site is not a mixture of experts, or has no such expert.
    """
    check_site(model, site)
    mixture = select(model, site).get()
    if not isinstance(mixture, HasExperts):
        raise UserError(f"{site!r} is a {type(mixture).__name__}: it has no experts to open.")
    return select(model, site).set(mixture.opening(*numbers))


def _why_not_a_leaf(name: str, known: list[str], every: list[str]) -> str:
    """One sentence on why a name is not a leaf, and what is."""
    leaf, _, port = name.rpartition("/")
    if port in PROJECTIONS and leaf in known:
        return _why_absent(name, every)
    if name in every:
        return f"{name!r} is an array, not a leaf: change it by an edit of run(...), or replace {leaf!r}."
    return f"{name!r} is not a leaf of this model.{suggest(name, known)}"


def _check_projection(name: str, linear: PyTree, replacement: PyTree) -> None:
    """Raises UserError if the replacement of a linear map has another output shape."""
    if not isinstance(linear, Linear):
        return
    d_in, d_out = linear.weight.shape
    given = eqx.filter_eval_shape(replacement, jax.ShapeDtypeStruct((1, 1, d_in), linear.weight.dtype)).shape
    if given != (1, 1, d_out):
        raise UserError(f"the replacement for {name!r} maps (1, 1, {d_in}) to {given}, not to (1, 1, {d_out}).")


@lru_cache(maxsize=256)
def _glob(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches; `/` is crossed by `**` only."""
    escaped = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    expression = re.compile(escaped)
    return lambda name: expression.fullmatch(name) is not None


def _why_absent(name: str, known: Any) -> str:
    """One sentence on why a name is missing, and which names exist."""
    leaf, _, port = name.rpartition("/")
    expert = re.fullmatch(r"(.+/mlp)/experts/(\d+)(/.+)?", name)
    if expert and f"{expert[1]}/experts/index" in known:
        return (
            f"{name!r} does not exist: open the expert first, open_experts(model, {expert[1]!r}, {expert[2]}), or "
            "replace it."
        )
    if f"{leaf}/in" in known and leaf.endswith("/mlp"):
        if port in ("pre", "up", "hidden") and f"{leaf}/pre" not in known:
            return (
                f"{name!r} cannot be seen: {leaf!r} was replaced, or is of an adapted model whose Places do not say "
                "where it is: there are in, out and added, and what the replacement offers."
            )
        if port == "up" and f"{leaf}/pre" in known:
            return f"{name!r} does not exist: the MLP at {leaf!r} is dense and has no second branch; take {leaf}/pre."
    if port in CODES:
        return (
            f"{name!r} does not exist: codes are sites where a decomposition replaces the leaf (or is put at the array "
            "by an edit, Through), 'error' where it keeps what it misses (keep_error=True), and 'codes_pre' where its "
            f"activation can go on from it (it has from_pre).{suggest(name, known)}"
        )
    if port in PROJECTIONS and f"{leaf}/in" in known:
        if own := [known_name for known_name in known if known_name.startswith(f"{leaf}/") and "_proj" in known_name]:
            return f"{name!r} does not exist: {leaf!r} has {', '.join(own)}."
        return (
            f"{name!r} is not a site: {leaf!r} was replaced, or is of an adapted model: projections are inside the "
            "module."
        )
    if port == "mid" and f"{leaf}/pre" in known:
        return (
            f"{name!r} does not exist: attention and MLP of this model both read {leaf}/pre, in parallel, or it was "
            "adapted from Flax, where nothing stands between the two sublayers."
        )
    return f"no site {name!r} in this model.{suggest(near(name) if '.' in name else name, known)}"
