"""Activation patching: what a metric does when an array of one run is put into another run.

    effect(place) = M(run with a[place] <- fill[place]) - M(run)

    denoise   the run is the corrupted one, `fills` are the clean run's arrays      what restores the answer
    noise     the run is the clean one, `fills` are the corrupted run's arrays      what breaks it
    ablate    the run is the clean one, `fills` are zeros, means, or other prompts' arrays

A *place* is a combination of indices along the axes `each` of an array: `(1,)` every position, `(2,)` every head of
`attn/z` or every neuron of `mlp/hidden`, `(1, 2)` every pair, `()` the whole array.

Prompts of a pair must have equal numbers of tokens: positions are matched by number. Position 0 of many models holds
activations of extreme size: leave it out of means, and report it apart.

Sources: Vig et al. 2020, arXiv 2004.12265; Wang et al. 2022, arXiv 2211.00593 (path patching); Zhang and Nanda 2023,
arXiv 2309.16042 (fills).
"""

import math
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.causal.measure import Metric
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.models.edits import Edit
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.run import run


class Patch(eqx.Module):
    """The edit that puts `fill` where `where` is true; both are broadcast to the array."""

    fill: Float[Array, "..."]
    where: Bool[Array, "..."]

    def __call__(self, x: Array) -> Array:
        return jnp.where(self.where, self.fill, x).astype(x.dtype)


def mean_fill(
    array: Float[Array, "batch seq *rest"],
    *,
    weight: Float[Array, "batch seq"] | None = None,
    first: int = 1,
    per_position: bool = False,
) -> Float[Array, "1 positions *rest"]:
    """The mean over prompts, and over positions from `first` on unless `per_position`.

    Args:
      weight: 1 for a token that counts, 0 for padding; default: all count.
      per_position: a mean for every position of its own; the prompts must be aligned. `first` then does not matter.
    Raises:
      UserError: no token counts, or with `per_position` none at some position (not seen under a jit of your own).
    """
    batch, seq = array.shape[:2]
    weight = jnp.ones((batch, seq)) if weight is None else weight
    if not per_position:
        if not 0 <= first < seq:
            raise UserError(f"first={first} leaves no position of {seq}: give a smaller one.")
        weight = weight * (jnp.arange(seq) >= first)
    counted = jnp.sum(weight, axis=0) if per_position else jnp.sum(weight)
    if not isinstance(counted, jax.core.Tracer) and not bool(jnp.all(counted > 0)):
        raise UserError("weight leaves no token that counts" + (" at some position." if per_position else "."))
    weight = weight.reshape(batch, seq, *(1,) * (array.ndim - 2)).astype(jnp.promote_types(array.dtype, jnp.float32))
    axes = (0,) if per_position else (0, 1)
    total, count = jnp.sum(array * weight, axis=axes, keepdims=True), jnp.sum(weight, axis=axes, keepdims=True)
    return (total / count).astype(array.dtype)


def resample_fill(array: Float[Array, "batch ..."], key: PRNGKeyArray) -> Float[Array, "batch ..."]:
    """The array of another prompt for every prompt: a random cycle, so that none keeps its own.

    Raises:
      UserError: there is one prompt only.
    """
    batch = array.shape[0]
    if batch < 2:
        raise UserError("resampling needs at least two prompts: give more, or another fill.")
    order = jax.random.permutation(key, batch)
    return jnp.zeros_like(array).at[order].set(array[jnp.roll(order, 1)])


def patch_effects(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    fills: Mapping[str, Array],
    *,
    each: tuple[int, ...] = (1,),
    where: Mapping[str, Array] | None = None,
    edits: Mapping[str, Edit] | None = None,
    chunk: int = 8,
) -> dict[str, Float[Array, "batch ..."]]:
    """The effect of patching every place of every named array, one after another: the ground truth of attribution.

    effect[name][b, place] = M_b(run with a[place] <- fill[place]) - M_b(run)

    Args:
      model, tokens: of the run that is patched.
      metric: trace -> one number a prompt.
      fills: by array name, what is put in; broadcast to the array `[batch, ...]`.
      each: axes of the arrays that are enumerated, batch (0) excluded; see the module's docstring.
      where: by array name, a mask (broadcast to the array) of entries that may be patched; default: all.
      edits: held in both runs, for names that are not patched.
      chunk: forward passes at once.
    Returns:
      By array name `[batch, *sizes of the axes `each`]`. One program runs for all places of all names.
    Raises:
      UserError: an unknown array name, an axis that an array does not have, an edit on a patched array, a fill or a
        metric of a wrong shape, or a chunk that is not positive.
    """
    edits = dict(edits or {})
    if chunk < 1 or not fills:
        raise UserError(f"chunk={chunk} must be positive, and fills must name an array: {list(fills)}.")
    shapes = array_shapes(model, tokens, fills, metric, edits)
    for name, shape in shapes.items():
        if any(not 1 <= axis < len(shape) for axis in each):
            raise UserError(f"each={each} names an axis that {name!r} with shape {shape} does not have (0 is prompts).")
        if name in edits:
            raise UserError(f"{name!r} is patched and edited: remove it from edits.")
    places = [
        (number, *index)
        for number, shape in enumerate(shapes.values())
        for index in np.ndindex(*(shape[axis] for axis in each))
    ]
    names = tuple(shapes)  # a dict comes out of jit in the order of its sorted keys, which is not that of `places`
    order = tuple(fills[name] for name in names)
    effects = _effects(model, tokens, metric, names, order, where or {}, edits, jnp.asarray(places), each, chunk)
    found, start = {}, 0
    for name, shape in shapes.items():
        sizes = tuple(shape[axis] for axis in each)
        count = math.prod(sizes)
        found[name] = effects[start : start + count].T.reshape(tokens.shape[0], *sizes)
        start += count
    return found


@eqx.filter_jit
def _effects(
    model: PyTree,
    tokens: Array,
    metric: Metric,
    names: tuple[str, ...],
    fills: tuple[Array, ...],
    where: Mapping[str, Array],
    edits: dict[str, Edit],
    places: Array,
    each: tuple[int, ...],
    chunk: int,
) -> Float[Array, "places batch"]:
    class Place(eqx.Module):
        """Patch where the array's number and indices are those of the place."""

        fill: Array
        number: int
        mask: Array
        place: Array

        def __call__(self, x: Array) -> Array:
            here = jnp.broadcast_to(self.mask, x.shape) & (self.place[0] == self.number)
            for axis, index in zip(each, self.place[1:], strict=True):
                along = jnp.arange(x.shape[axis]) == index
                here = here & along.reshape((-1,) + (1,) * (x.ndim - axis - 1))
            return jnp.where(here, self.fill, x).astype(x.dtype)

    def after(place: Array) -> Array:
        patches: dict[str, Edit] = {
            name: Place(fill, number, where.get(name, jnp.ones((), bool)), place)
            for number, (name, fill) in enumerate(zip(names, fills, strict=True))
        }
        return metric(run(model, tokens, edits={**edits, **patches}))

    return jax.lax.map(after, places, batch_size=chunk) - metric(run(model, tokens, edits=edits))


def path_effect(
    model: PyTree,
    clean: Int[Array, "batch seq"],
    metric: Metric,
    senders: Mapping[str, Patch],
    receivers: Sequence[str],
    *,
    frozen: Sequence[str],
    rules: Rules = EXACT,
) -> Float[Array, " batch"]:
    """Path patching: what senders do to the metric by way of the receivers alone.

    1. run clean;  2. run clean with the senders patched and every frozen array held at its clean value (outside the
    senders' own places), and take what arrives at the receivers;  3. run clean with the receivers set to that.
    effect = M(third run) - M(first run).

    Args:
      senders: by array name, what is put where: one head of `attn/z` from the corrupted run.
      receivers: array names, `blocks/9/attn/in` or `final` (the direct effect on the logits).
      frozen: array names that must not carry the effect: every `attn/z`, and every `mlp/out` where paths through MLPs
        do not count.
    Raises:
      UserError: an unknown array name.
    Source: Wang et al. 2022, arXiv 2211.00593, section 3.1; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
    """
    array_shapes(model, clean, (*senders, *receivers, *frozen), metric)
    return _path_effect(model, clean, metric, dict(senders), tuple(receivers), tuple(frozen), rules)


@eqx.filter_jit
def _path_effect(
    model: PyTree,
    clean: Array,
    metric: Metric,
    senders: dict[str, Patch],
    receivers: tuple[str, ...],
    frozen: tuple[str, ...],
    rules: Rules,
) -> Array:
    first = run(model, clean, rules=rules)
    everywhere = jnp.ones((), bool)
    held: dict[str, Edit] = {name: Patch(first[name], everywhere) for name in frozen if name not in senders}
    for name, patch in senders.items():
        value = jnp.where(patch.where, patch.fill, first[name]).astype(first[name].dtype)
        held[name] = Patch(value, everywhere) if name in frozen else patch
    second = run(model, clean, edits=held, rules=rules)
    arrived: dict[str, Edit] = {name: Patch(second[name], everywhere) for name in receivers}
    return metric(run(model, clean, edits=arrived, rules=rules)) - metric(first)


def array_shapes(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    names: Mapping[str, PyTree] | Sequence[str],
    metric: Metric | None = None,
    edits: Mapping[str, Edit] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The shapes of the named arrays, without running the model.

    Args:
      names: of arrays; where they are fills, these must broadcast to the arrays.
      metric: is checked, too, where given.
      edits: of the run; arrays that they offer are known.
    Raises:
      UserError: an unknown name, a fill that does not broadcast to its array, or a metric that is not [batch].
    """

    def forward(model: PyTree, tokens: Array) -> tuple[dict[str, Array], Array | None]:
        trace = run(model, tokens, edits=edits)
        return trace.arrays, None if metric is None else metric(trace)

    found, number = eqx.filter_eval_shape(forward, model, tokens)
    if metric is not None and jnp.shape(number) != tokens.shape[:1]:
        raise UserError(
            f"the metric gives shape {jnp.shape(number)}: it must be one number a prompt, {tokens.shape[:1]}."
        )
    for name in names:
        if name not in found:
            raise UserError(f"no array {name!r} in this model.{suggest(name, found)}")
        fill = names[name] if isinstance(names, Mapping) else None
        shape = found[name].shape
        if isinstance(fill, jax.Array | np.ndarray) and not _fits(fill.shape, shape):
            raise UserError(f"the fill of {name!r} has shape {fill.shape}, which does not broadcast to {shape}.")
    return {name: found[name].shape for name in names}


def _fits(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array of shape `own` broadcasts to `shape`."""
    pairs = zip(own[::-1], shape[::-1], strict=False)
    return len(own) <= len(shape) and all(one in (1, size) for one, size in pairs)
