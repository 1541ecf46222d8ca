"""Coefficients, edges and circuits of whole transformers against finite differences of a NumPy forward pass."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.attribute import coefficients, integrated, integrated_inputs
from jaxinterp.causal.circuits import complement, faithfulness
from jaxinterp.causal.edges import edge_scores
from jaxinterp.causal.measure import LogitDifference
from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
from jaxinterp.models.run import run
from jaxinterp.models.transformer import initialise
from tests.causal.by_hand import ByHand
from tests.causal.small_models import GPT2, LLAMA, wide, with_random_biases

TOKENS, FILL = np.array([[3, 7, 1, 0], [2, 2, 9, 5]]), np.array([[3, 4, 1, 0], [6, 2, 9, 8]])
ANSWER, OTHER = np.array([4, 11]), np.array([10, 1])
METRIC = LogitDifference(jnp.asarray(ANSWER), jnp.asarray(OTHER))
RULES = {
    "AtP": (EXACT, ()),
    "RelP": (RELEVANCE, ("norm", "activation", "gate")),
    "norm": (Rules(norm=True), ("norm",)),
    "all": (Rules(True, True, True, True), ("norm", "activation", "gate", "attention")),
}
NAMES = (
    "embed",
    "blocks/0/attn/z",
    "blocks/0/mlp/hidden",
    "blocks/0/resid/post",
    "blocks/1/attn/out",
    "blocks/1/mlp/out",
)


def difference(row):
    return lambda logits: logits[ANSWER[row]] - logits[OTHER[row]]


@pytest.fixture(scope="module", params=["gated, rotary, grouped, scaled", "LayerNorm, learned positions, biases"])
def model(request):
    config = (
        dataclasses.replace(LLAMA, layers=2, residual_scale=0.6, logit_scale=1.5) if "gated" in request.param else GPT2
    )
    with jax.enable_x64(True):
        yield with_random_biases(wide(initialise(config, jax.random.key(5))), seed=3)


def directions(model, row, seed=0):
    """A random direction by array."""
    draw = np.random.default_rng(seed)
    arrays = ByHand(model, TOKENS[row]).arrays
    return {name: draw.normal(size=arrays[name].shape) for name in NAMES}


@pytest.mark.parametrize("rules", RULES)
def test_coefficients_are_slopes_of_a_forward_pass_with_parts_held(model, rules):
    own, held = RULES[rules]
    found = eqx.filter_jit(coefficients)(model, jnp.asarray(TOKENS), METRIC, NAMES, rules=own)
    for row in (0, 1):
        by_hand = ByHand(model, TOKENS[row], held)
        for name, direction in directions(model, row).items():
            slope = by_hand.slope(difference(row), {name: direction}, "added")
            assert np.sum(np.asarray(found[name])[row] * direction) == pytest.approx(slope, rel=1e-4, abs=1e-5)
    if held:  # the broken variant: without what is held, other slopes
        slope = ByHand(model, TOKENS[0]).slope(difference(0), {"embed": directions(model, 0)["embed"]}, "added")
        assert abs(np.sum(np.asarray(found["embed"])[0] * directions(model, 0)["embed"]) - slope) > 0.02 * abs(slope)


def test_mean_gradients_are_those_at_the_points_of_the_way(model):
    """IG at one array with the others computed again, and EAP-IG's coefficient; both sets of points."""
    name, steps = "blocks/0/mlp/hidden", 3
    here, there = (run(model, jnp.asarray(ids)) for ids in (TOKENS, FILL))
    changes = {each: there[each] - here[each] for each in ("embed", name)}
    for points, offset in (("left", 0.0), ("midpoint", 0.5)):
        alone = integrated(model, jnp.asarray(TOKENS), METRIC, changes, steps=steps, points=points)
        inputs = integrated_inputs(
            model, jnp.asarray(TOKENS), METRIC, (name,), changes["embed"], steps=steps, points=points
        )
        for row in (0, 1):
            direction = directions(model, row)[name]
            for moved, found in ((name, alone), ("embed", inputs)):
                slopes = []
                for k in range(steps):
                    shift = {moved: (k + offset) / steps * np.asarray(changes[moved])[row]}
                    by_hand = ByHand(model, TOKENS[row])
                    ends = []
                    for sign in (1e-5, -1e-5):
                        both = {
                            each: shift.get(each, 0) + (sign * direction if each == name else 0)
                            for each in {moved, name}
                        }
                        ends.append(difference(row)(by_hand(added=both)))
                    slopes.append((ends[0] - ends[1]) / 2e-5)
                mine = float(np.sum(np.asarray(found[name])[row] * direction))
                assert mine == pytest.approx(np.mean(slopes), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_edges_are_slopes_by_what_one_reader_alone_reads(model, steps):
    """EAP (one point), EAP-IG (left points from the run), every source and target; what a sublayer adds is scaled."""
    found = edge_scores(model, jnp.asarray(TOKENS), jnp.asarray(FILL), METRIC, steps=steps)
    scale = model.config.residual_scale
    for row in (0, 1):
        here, there = ByHand(model, TOKENS[row]), ByHand(model, FILL[row])
        change = {name: there.arrays[name] - here.arrays[name] for name in there.arrays}
        for s, source in enumerate(found.sources):
            if "/head/" in source:
                layer, head = int(source.split("/")[1]), int(source.split("/")[-1])
                weight = np.asarray(model.blocks[layer].attn.o_proj.weight).reshape(model.config.heads, -1, 8)[head]
                delta = scale * change[f"blocks/{layer}/attn/z"][:, head] @ weight
            else:
                delta = change["embed"] if source == "embed" else scale * change[f"{source}/out"]
            for t, target in enumerate(found.targets):
                later = target == "final" or _place(source) < _place(target)
                slope = 0.0
                for k in range(steps) if later else ():
                    moved = {"embed": k / steps * change["embed"]}
                    ends = [difference(row)(here(added=moved, read={target: sign * delta})) for sign in (1e-5, -1e-5)]
                    slope += (ends[0] - ends[1]) / 2e-5 / steps
                assert float(found.scores[row, s, t]) == pytest.approx(slope, rel=1e-4, abs=1e-6), (source, target)


def _place(name):
    """The order of the flow: attention before the MLP of its block; a head comes with its attention."""
    if name == "embed":
        return -1
    _, layer, part, *_ = name.split("/")
    return 2 * int(layer) + (part == "mlp")


def test_faithfulness_is_that_of_a_run_with_everything_else_ablated(model):
    """m(C), m(rest), m(model), m(nothing) with neurons of two layers and heads, per position; a ratio of means."""
    draw = np.random.default_rng(1)
    names = ("blocks/0/mlp/hidden", "blocks/1/mlp/hidden", "blocks/0/attn/z")
    arrays = run(model, jnp.asarray(FILL))
    fills = {name: arrays[name].mean(0, keepdims=True) for name in names}
    sizes = {name: int(np.prod(arrays[name].shape[2:])) for name in names}
    circuit = {name: jnp.asarray(draw.random((4, sizes[name])) < 0.5) for name in names}
    circuit[names[1]] = jnp.asarray(draw.random(sizes[names[1]]) < 0.5)  # one mask for all positions
    found = faithfulness(model, jnp.asarray(TOKENS), METRIC, circuit, fills)

    def mean(kept):
        total = 0.0
        for row in (0, 1):
            edit = {}
            for name in names:
                mask = np.broadcast_to(np.asarray(kept[name]), (4, sizes[name])).reshape(arrays[name].shape[1:])
                fill = np.asarray(fills[name])[0]
                edit[name] = lambda x, mask=mask, fill=fill: np.where(mask, x, fill)
            total += difference(row)(ByHand(model, TOKENS[row])(edit=edit)) / 2
        return total

    nothing = {name: np.zeros(sizes[name], bool) for name in names}
    empty, whole = mean(nothing), mean({name: ~mask for name, mask in nothing.items()})
    np.testing.assert_allclose(found[:4], [mean(circuit), mean(complement(circuit)), whole, empty], atol=1e-5)
    assert found.faithfulness == pytest.approx((mean(circuit) - empty) / (whole - empty), rel=1e-4)
    assert found.completeness == pytest.approx((mean(complement(circuit)) - empty) / (whole - empty), rel=1e-4)
    assert abs(whole - empty) > 0.01 and not 0.99 < found.faithfulness < 1.01
