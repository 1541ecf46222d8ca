"""Names for what happens inside a forward pass: list them, select and replace what they name.

A *site* is a name. `blocks/3/mlp` is a leaf, the sublayer itself; so are its linear maps, the *projections*
`blocks/3/mlp/{gate_proj,up_proj,down_proj}` and `blocks/3/attn/{q_proj,k_proj,v_proj,o_proj}`. A leaf can be selected
and replaced. `blocks/3/mlp/{in,pre,up,hidden,out,added}`, `blocks/3/attn/{in,pattern,z,out}`,
`blocks/3/resid/{pre,mid,post}`, `embed` and `final` are arrays; an encoder has `pooled` besides, [batch, d_model]. A
Gated DeltaNet at `blocks/3/attn` has projections and arrays of its own (`delta_net`).
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
from penzai import pz

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.trees import path_name
from jaxinterp.models.dialects import near, understood
from jaxinterp.models.layers import HasExperts, HasProjections, Linear
from jaxinterp.models.rules import EXACT

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
    matches = matching(pattern)
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
        raise UserError(why_absent(name, known))
    return name


def select(model: PyTree, pattern: str) -> PyTree:
    """Penzai's selection of the subtrees whose name matches a glob: `select(model, "blocks/*/mlp").get_sequence()`.

    Raises:
      UserError: nothing matches.

    Example:
      >>> len(select(subject.model, "blocks/*/mlp").get_sequence())
      4
    """
    matches = matching(pattern)
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
        return why_absent(name, every)
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
def matching(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches; `/` is crossed by `**` only."""
    escaped = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    expression = re.compile(escaped)
    return lambda name: expression.fullmatch(name) is not None


def why_absent(name: str, known: Any) -> str:
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
