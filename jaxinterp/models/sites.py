"""Names for what happens inside a forward pass: list them, look, replace, edit.

A *site* is a name. `blocks/3/mlp` is a leaf, the sublayer itself; so are its linear maps, the *projections*
`blocks/3/mlp/{gate_proj,up_proj,down_proj}` and `blocks/3/attn/{q_proj,k_proj,v_proj,o_proj}`. A leaf can be selected
and replaced. `blocks/3/mlp/{in,pre,up,hidden,out,added}`, `blocks/3/attn/{in,pattern,z,out}`,
`blocks/3/resid/{pre,mid,post}`, `embed` and `final` are arrays; an encoder has `pooled` besides, [batch, d_model].

A forward pass is a value: `run(model, tokens)` returns a `Trace` with every named array. Under `jit`, whatever the
caller does not return is never computed, so asking for layer 0 of 4 costs a quarter of the pass. Every intervention is
an edit: a callable pytree `Array -> Array` by the name of the array that it changes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from penzai import pz

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.trees import path_name
from jaxinterp.models.layers import HasProjections, Linear
from jaxinterp.models.rules import EXACT, Rules

Edit = Callable[[Array], Array]

NO_LOGITS = (
    "the model has no logits and so no cross-entropy: it is an encoder and predicts no token. Its answers are the "
    "arrays 'final' and 'pooled'; the scoreboard measures the latter with effect=POOLED (jaxinterp.evaluation.effects)."
)
"""What to say where logits are asked for and there are none."""

LEAVES = ("/mlp", "/attn")
"""How the name of a sublayer ends."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
"""What linear maps inside a sublayer are called."""


@runtime_checkable
class LanguageModel(Protocol):
    """A callable pytree from tokens to logits that offers every named array to `tap` and goes on with the answer.

    A model that predicts no token returns None.
    """

    def __call__(self, tokens: Any, *, tap: Any, rules: Rules) -> Any: ...


class SetTo(eqx.Module):
    """The edit that puts `value` where the array was: ablate with 0, patch with another run's array.

    The value is broadcast; one with as many entries as the array is reshaped.
    """

    value: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        if self.value.size == x.size:
            return self.value.reshape(x.shape).astype(x.dtype)
        return jnp.broadcast_to(self.value, x.shape).astype(x.dtype)


class Add(eqx.Module):
    """The edit that adds `delta` (broadcast): steer with a direction, or differentiate by a zero."""

    delta: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        return (x + self.delta).astype(x.dtype)


class Trace(eqx.Module):
    """What a forward pass computed: the logits, and every named array as it flowed on (after its edit, if any)."""

    predicted: Float[Array, "batch seq vocab"] | None
    arrays: dict[str, Array]

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
            raise UserError(_why_absent(name, self.arrays))
        return self.arrays[name]


def run(
    model: Any, tokens: Int[Array, "batch seq"], *, edits: Mapping[str, Edit] | None = None, rules: Rules = EXACT
) -> Trace:
    """Run the model and keep every named array.

    Args:
      model: a callable pytree `model(tokens, *, tap, rules) -> logits`, or None where it has none.
      tokens: token ids.
      edits: by array name, a callable pytree that maps the array to the one that flows on. The names are static, the
        edits may be traced.
      rules: which derivatives are replaced (values never are). A replaced leaf that knows no rules keeps its own.
    Raises:
      UserError: an edit's name is no array of this model, or an edit changes shape or dtype.
    """
    edits = dict(edits or {})
    arrays: dict[str, Array] = {}

    def tap(name: str, value: Array) -> Array:
        if name in edits:
            edited = edits[name](value)
            if edited.shape != value.shape or edited.dtype != value.dtype:
                raise UserError(
                    f"the edit at {name!r} returned {edited.dtype}{edited.shape} for {value.dtype}{value.shape}: "
                    "an edit must keep shape and dtype."
                )
            value = edited
        arrays[name] = value
        return value

    logits = model(tokens, tap=tap, rules=rules)
    for name in edits:
        if name not in arrays:
            raise UserError(_why_absent(name, arrays))
    return Trace(logits, arrays)


def sites(model: Any, pattern: str = "**") -> list[str]:
    """Every site of the model in the order of the flow: leaves (each before its projections) and arrays.

    Args:
      pattern: a glob; `*` stands for one component or a part of it (`blocks/*/mlp`), `**` for any number of them.
    """
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    arrays: list[str] = []

    def note(name: str, value: Array) -> Array:
        arrays.append(name)
        return value

    eqx.filter_eval_shape(lambda model, tokens: model(tokens, tap=note, rules=EXACT), model, tokens)
    projections = _projections(model)
    names: list[str] = []
    for name in arrays:
        leaf, _, port = name.rpartition("/")
        if port == "in" and leaf.endswith(LEAVES):
            names += [leaf, *projections.get(leaf, ())]
        names.append(name)
    matches = _glob(pattern)
    return [name for name in names if matches(name)]


def _projections(model: Any) -> dict[str, list[str]]:
    """The names of the projections inside each leaf that shows them."""
    shows = lambda node: isinstance(node, HasProjections)
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=shows)[0]
    inside = {path_name(path): node.projections() for path, node in nodes if shows(node)}
    return {leaf: [f"{leaf}/{field}" for field in fields] for leaf, fields in inside.items()}


def check_site(model: Any, name: str) -> str:
    """`name`, if it is a site of the model.

    Raises:
      UserError: it is not; the message suggests the nearest names or says why it cannot be had.
    """
    known = sites(model)
    if name not in known:
        raise UserError(_why_absent(name, known))
    return name


def select(model: Any, pattern: str) -> Any:
    """Penzai's selection of the subtrees whose name matches a glob: `select(model, "blocks/*/mlp").get_sequence()`.

    Raises:
      UserError: nothing matches.
    """
    matches = _glob(pattern)
    selection = pz.select(model).at_subtrees_where(lambda path, _: matches(path_name(path)), with_keypath=True)
    if selection.count() == 0:
        raise UserError(f"no part of the model matches {pattern!r}.{suggest(pattern, sites(model))}")
    return selection


def replace(model: Any, leaves: Mapping[str, Any]) -> Any:
    """A new model with other callables at the named leaves: `replace(model, {"blocks/3/mlp": transcoder})`.

    A projection is replaced in the same way: `replace(model, {"blocks/3/mlp/up_proj": linear})`.

    Raises:
      UserError: a name is not a leaf of the model, a replacement is not callable or has another shape than the
        projection, or its `sites` are not what the leaf reads and writes.
    """
    every = sites(model)
    known = [name for name in every if name.endswith(LEAVES) or name.rpartition("/")[2] in PROJECTIONS]
    for name, leaf in leaves.items():
        if name not in known:
            raise UserError(_why_not_a_leaf(name, known, every))
        if not callable(leaf):
            raise UserError(f"the replacement for {name!r} is a {type(leaf).__name__}, which is not callable.")
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
        model = select(model, name).set(leaf)
    return model


def _why_not_a_leaf(name: str, known: list[str], every: list[str]) -> str:
    """One sentence on why a name is not a leaf, and what is."""
    leaf, _, port = name.rpartition("/")
    if port in PROJECTIONS and leaf in known:
        return _why_absent(name, every)
    if name in every:
        return f"{name!r} is an array, not a leaf: change it by an edit of run(...), or replace {leaf!r}."
    return f"{name!r} is not a leaf of this model.{suggest(name, known)}"


def _check_projection(name: str, linear: Any, replacement: Any) -> None:
    """Raises UserError where the replacement of a linear map has another output shape."""
    if not isinstance(linear, Linear):
        return
    d_in, d_out = linear.weight.shape
    given = eqx.filter_eval_shape(replacement, jax.ShapeDtypeStruct((1, 1, d_in), linear.weight.dtype)).shape
    if given != (1, 1, d_out):
        raise UserError(f"the replacement for {name!r} maps (1, 1, {d_in}) to {given}, not to (1, 1, {d_out}).")


def _glob(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches; `/` is crossed by `**` only."""
    escaped = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    expression = re.compile(escaped)
    return lambda name: expression.fullmatch(name) is not None


def _why_absent(name: str, known: Any) -> str:
    """One sentence on why a name cannot be had, and what can."""
    leaf, _, port = name.rpartition("/")
    if f"{leaf}/in" in known and leaf.endswith("/mlp"):
        if port in ("pre", "up", "hidden") and f"{leaf}/pre" not in known:
            return (
                f"{name!r} cannot be seen: {leaf!r} was replaced, or is of an adapted model whose Places do not say "
                "where it is: there are in, out and added only."
            )
        if port == "up" and f"{leaf}/pre" in known:
            return f"{name!r} does not exist: the MLP at {leaf!r} is dense and has no second branch; take {leaf}/pre."
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
    return f"no site {name!r} in this model.{suggest(name, known)}"
