"""Attribution: estimates of patching effects from a few backward passes. One contraction, three coefficients.

    estimate[name] = (fill - a) * coefficient[name]           entry by entry; sum over the axes that you do not need

    "gradient"            dM/da at the run                                        AtP     one backward pass
    "relevance"           dM/da at the run, derivatives replaced by RELEVANCE     RelP    one backward pass
    "integrated"          mean of dM/da on the way a -> fill, one array moved at a time    IG      steps x names
    "integrated_inputs"   mean of dM/da while only `embed` moves to its fill      EAP-IG's coefficient   steps

One backward pass gives the coefficients of every named array: the derivative by a zero that is added to each.
Points of integration: "midpoint", alpha = (k + 1/2) / K, error O(1/K^2); "left", alpha = k / K, error O(1/K), as in
the published code of sparse feature circuits and EAP-IG.

A metric whose derivative vanishes at the run, such as the KL divergence from that run itself, makes every estimate zero
whatever the model does: it is refused.

Sources: Nanda 2023 (AtP, neelnanda.io/mechanistic-interpretability/attribution-patching); RelP, arXiv 2508.21258;
Marks et al. 2024, arXiv 2403.19647 (IG at activations); Hanna et al. 2024, arXiv 2403.17806 (EAP-IG).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.causal.measure import Metric
from jaxinterp.causal.patch import array_shapes
from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.models.edits import Add, Edit
from jaxinterp.models.layers import Tap
from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
from jaxinterp.models.run import Trace, run

Method = Literal["gradient", "relevance", "integrated", "integrated_inputs"]
Points = Literal["midpoint", "left"]
Arrays = dict[str, Array]


def attribute(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    fills: Mapping[str, Array],
    *,
    method: str = "relevance",
    rules: Rules | None = None,
    steps: int = 10,
    points: str = "midpoint",
    edits: Mapping[str, Edit] | None = None,
    guard: bool = True,
) -> Arrays:
    """Estimated effects of patching `fills` into the run on `tokens`, entry by entry: (fill - a) * coefficient.

    Args:
      model, tokens: the run that is patched: the corrupted one for denoising, the clean one for noising.
      metric: trace -> one number a prompt; prompts must not influence each other's number.
      fills: by array name, what would be put in; broadcast to the array. "integrated_inputs" needs "embed" among them.
      method: see the module's docstring.
      rules: of the derivative; default: RELEVANCE for "relevance", EXACT else.
      steps, points: of the two integrated methods.
      edits: of the run, for example what a graph freezes.
      guard: refuse a metric whose derivative vanishes at the run. Has no effect under a jit of your own.
    Returns:
      By array name, estimates in the shape of the array; `summed` contracts them.
    Raises:
      UserError: an unknown array or method, a fill or metric of a wrong shape, or a metric whose derivative vanishes.
    """
    if method not in get_args(Method):
        raise UserError(f"method={method!r} is unknown.{suggest(method, get_args(Method))}")
    if points not in get_args(Points):
        raise UserError(f"points={points!r} must be one of {', '.join(get_args(Points))}.")
    if steps < 1:
        raise UserError(f"steps={steps} must be positive.")
    if method == "integrated_inputs" and "embed" not in fills:
        raise UserError("method='integrated_inputs' moves the array 'embed': give its fill in fills.")
    if not fills:
        raise UserError("fills is empty: name at least one array.")
    array_shapes(model, tokens, fills, metric, edits)
    if guard and method in ("gradient", "relevance") and not isinstance(tokens, jax.core.Tracer):
        check_metric(model, tokens, metric, edits=edits)
    rules = (RELEVANCE if method == "relevance" else EXACT) if rules is None else rules
    return _attribute(model, tokens, metric, dict(fills), method, rules, steps, points, dict(edits or {}))


@eqx.filter_jit
def _attribute(
    model: PyTree,
    tokens: Array,
    metric: Metric,
    fills: Arrays,
    method: str,
    rules: Rules,
    steps: int,
    points: str,
    edits: dict[str, Edit],
) -> Arrays:
    base = run(model, tokens, edits=edits)
    changes = {name: jnp.broadcast_to(fill, base[name].shape) - base[name] for name, fill in fills.items()}
    if method == "integrated":
        found = integrated(model, tokens, metric, changes, steps=steps, points=points, rules=rules, edits=edits)
    elif method == "integrated_inputs":
        change = changes["embed"]
        found = integrated_inputs(
            model, tokens, metric, tuple(fills), change, steps=steps, points=points, rules=rules, edits=edits
        )
    else:
        found = coefficients(model, tokens, metric, tuple(fills), rules=rules, edits=edits)
    return {name: changes[name] * found[name] for name in fills}


def summed(estimates: Mapping[str, Array], keep: tuple[int, ...] = (0, 1)) -> Arrays:
    """Estimates summed over all axes but `keep`: (0, 1) a number a prompt and position, (0, 2) a prompt and head."""
    return {
        name: jnp.sum(value, axis=tuple(axis for axis in range(value.ndim) if axis not in keep))
        for name, value in estimates.items()
    }


def coefficients(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    names: Sequence[str],
    *,
    rules: Rules = EXACT,
    edits: Mapping[str, Edit] | None = None,
) -> Arrays:
    """dM/da of every named array in one backward pass, each in the shape of its array, under `rules`."""
    edits = dict(edits or {})

    def total(deltas: Arrays) -> Array:
        adding: dict[str, Edit] = {name: Then(edits.get(name), Add(delta)) for name, delta in deltas.items()}
        return jnp.sum(metric(run(model, tokens, edits=edits | adding, rules=rules)))

    return jax.grad(total)(_zeros(model, tokens, names, edits))


def integrated(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    changes: Mapping[str, Array],
    *,
    steps: int,
    points: str = "midpoint",
    rules: Rules = EXACT,
    edits: Mapping[str, Edit] | None = None,
) -> Arrays:
    """(1/K) sum_k dM/da at a + alpha_k change, one array moved at a time and everything behind it computed again."""
    names, edits = tuple(changes), dict(edits or {})
    zeros = {name: jnp.zeros_like(change) for name, change in changes.items()}

    def gradient(number: Array, alpha: Array) -> Arrays:
        def total(deltas: Arrays) -> Array:
            moved: dict[str, Edit] = {
                name: Then(edits.get(name), Add((number == place) * alpha * changes[name] + deltas[name]))
                for place, name in enumerate(names)
            }
            return jnp.sum(metric(run(model, tokens, edits=edits | moved, rules=rules)))

        found = jax.grad(total)(zeros)
        return {name: jnp.where(number == place, found[name], 0) for place, name in enumerate(names)}

    alphas = _alphas(steps, points, changes[names[0]].dtype)
    pairs = (jnp.repeat(jnp.arange(len(names)), steps), jnp.tile(alphas, len(names)))
    return _mean_over(lambda pair: gradient(*pair), pairs, zeros, steps)


def integrated_inputs(
    model: PyTree,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    names: Sequence[str],
    change: Float[Array, "batch seq d_model"],
    *,
    steps: int,
    points: str = "midpoint",
    rules: Rules = EXACT,
    edits: Mapping[str, Edit] | None = None,
) -> Arrays:
    """(1/K) sum_k dM/da of every named array while `embed` is moved by alpha_k change."""
    edits = dict(edits or {})

    def gradient(alpha: Array) -> Arrays:
        moved: dict[str, Edit] = {"embed": Then(edits.get("embed"), Add(alpha * change))}
        return coefficients(model, tokens, metric, names, rules=rules, edits=edits | moved)

    return _mean_over(gradient, _alphas(steps, points, change.dtype), _zeros(model, tokens, names, edits), steps)


def check_metric(
    model: PyTree, tokens: Int[Array, "batch seq"], metric: Metric, *, edits: Mapping[str, Edit] | None = None
) -> None:
    """Raises UserError if the metric's derivative by what it reads vanishes at this run, for some prompt.

    It vanishes where its length is under a thousandth of what it is after a change of the trace by one percent: so for
    KL(reference || run) at the reference, and not for a logit difference, however it is scaled.
    """
    here, near = _slopes(model, tokens, metric, dict(edits or {}))
    bad = jnp.flatnonzero(here < 1e-3 * near)
    if bad.size:
        raise UserError(
            f"the metric's derivative vanishes at this run (prompt {int(bad[0])} of {tokens.shape[0]}), so that every "
            "estimate would be zero: KL from the run itself does that. Take a logit difference, or attribute from the "
            "other run, or use method='integrated'."
        )


@eqx.filter_jit
def _slopes(model: PyTree, tokens: Array, metric: Metric, edits: dict[str, Edit]) -> tuple[Array, Array]:
    trace = run(model, tokens, edits=edits)
    key = jax.random.key(0)

    def shifted(value: Any) -> PyTree:
        if not eqx.is_inexact_array(value):
            return value
        noise = jax.random.normal(jax.random.fold_in(key, value.size), value.shape, value.dtype)
        return value + 0.01 * noise * (jnp.std(value) + 1e-3)

    def length(trace: Trace) -> Array:
        slope = eqx.filter_grad(lambda trace: jnp.sum(metric(trace)))(trace)
        squares = [jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(slope)]
        return jnp.sqrt(jnp.sum(jnp.stack(squares), axis=0))

    return length(trace), length(jax.tree.map(shifted, trace))


class Then(eqx.Module):
    """One edit, if any, and another one after it."""

    first: Edit | None
    second: Edit

    def __call__(self, x: Array, *, positions: Array, tap: Tap, name: str) -> Array:
        given = {"positions": positions, "tap": tap, "name": name}
        for edit in (self.first, self.second):
            if edit is not None:
                x = edit(x, **{key: value for key, value in given.items() if takes(edit, key)})
        return x


def _zeros(model: PyTree, tokens: Array, names: Sequence[str], edits: Mapping[str, Edit]) -> Arrays:
    shapes = eqx.filter_eval_shape(lambda model, tokens: run(model, tokens, edits=edits).arrays, model, tokens)
    return {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in names}


def _alphas(steps: int, points: str, dtype: DTypeLike) -> Float[Array, " steps"]:
    return ((jnp.arange(steps) + (0.5 if points == "midpoint" else 0.0)) / steps).astype(dtype)


def _mean_over(gradient: PyTree, xs: PyTree, zeros: Arrays, steps: int) -> Arrays:
    """The sum of gradient(x) over the rows of xs, divided by `steps`; one at a time, to save memory."""

    def add(total: Arrays, x: Any) -> tuple[Arrays, None]:
        return jax.tree.map(jnp.add, total, gradient(x)), None

    total, _ = jax.lax.scan(add, zeros, xs)
    return jax.tree.map(lambda value: value / steps, total)
