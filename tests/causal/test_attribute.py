"""Patching and attribution: the identities that hold whatever the model, and the variants that break them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.attribute import attribute, check_metric, summed
from jaxinterp.causal.measure import Divergence, LogitDifference, LogProbability, normalised, pearson, spearman
from jaxinterp.causal.patch import Patch, mean_fill, patch_effects, path_effect, resample_fill
from jaxinterp.core.errors import UserError
from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
from jaxinterp.models.run import run
from tests.causal.toys import TOKENS, affine_stack, curved_stack, gated_stack, normal, small_transformer

CLEAN, CORRUPTED = TOKENS, jnp.asarray([[0, 5, 2], [3, 2, 4]])
METRIC = LogitDifference(jnp.asarray([1, 2]), jnp.asarray([3, 0]))
AT_ONE = LogitDifference(METRIC.answer, METRIC.other, jnp.asarray([1, 1]))
"""For models that do not mix positions: the two runs differ at position 1."""

NAMES = ("embed", "maps/0/out", "maps/1/out")


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def clean_fills(model, names=NAMES):
    trace = run(model, CLEAN)
    return {name: trace[name] for name in names}


@pytest.mark.parametrize("method", ["gradient", "relevance", "integrated"])
def test_in_an_affine_model_every_estimate_is_the_effect(method):
    model = affine_stack()
    fills = clean_fills(model)
    truth = patch_effects(model, CORRUPTED, METRIC, fills, each=(1, 2))
    found = attribute(model, CORRUPTED, METRIC, fills, method=method, steps=3)
    for name in NAMES:
        assert float(jnp.abs(truth[name]).max()) > 0.1
        np.testing.assert_allclose(found[name], truth[name], atol=1e-12)
    by_position = patch_effects(model, CORRUPTED, METRIC, fills)
    np.testing.assert_allclose(summed(found)["embed"], by_position["embed"], atol=1e-12)


def test_effects_by_way_of_the_inputs_agree_too():
    model = affine_stack()
    fills = clean_fills(model)
    truth = patch_effects(model, CORRUPTED, METRIC, fills, each=(1, 2))
    found = attribute(model, CORRUPTED, METRIC, fills, method="integrated_inputs", steps=2)
    np.testing.assert_allclose(found["maps/1/out"], truth["maps/1/out"], atol=1e-12)


def test_a_curved_model_tells_the_estimates_apart():
    """The broken variant of the test above: with a curve, the gradient is not the effect."""
    model = curved_stack()
    fills = clean_fills(model, ("embed",))
    truth = patch_effects(model, CORRUPTED, AT_ONE, fills)["embed"]
    found = summed(attribute(model, CORRUPTED, AT_ONE, fills, method="gradient"))["embed"]
    assert float(jnp.abs(truth).max()) > 0.1
    assert float(jnp.abs(found - truth).max()) > 0.05 * float(jnp.abs(truth).max())


def test_patching_against_runs_by_hand():
    """Every (site, position) patched in an independent NumPy forward pass."""
    model = affine_stack()
    fills = clean_fills(model, ("maps/0/out", "maps/1/out"))
    mixes = [(np.asarray(f.mix), np.asarray(f.weight), np.asarray(f.bias)) for f in model.maps]

    def by_hand(site, position, row):
        x = np.asarray(model.embedding)[np.asarray(CORRUPTED[row])]
        for index, (mix, weight, bias) in enumerate(mixes):
            y = mix @ x @ weight + bias
            if index == site:
                y[position] = np.asarray(fills[f"maps/{site}/out"])[row, position]
            x = x + y
        logits = x[-1] @ np.asarray(model.readout)
        return logits[int(METRIC.answer[row])] - logits[int(METRIC.other[row])]

    effects = patch_effects(model, CORRUPTED, METRIC, fills, chunk=2)
    for site in (0, 1):
        for row in (0, 1):
            base = by_hand(None, 0, row)
            expected = [by_hand(site, position, row) - base for position in range(3)]
            np.testing.assert_allclose(effects[f"maps/{site}/out"][row], expected, atol=1e-12)


def test_effects_keep_their_names_in_any_order_of_the_fills():
    """A dict leaves jit in the order of its sorted keys: `blocks/10` before `blocks/2`."""
    model = curved_stack(depth=3)
    names = [f"maps/{index}/out" for index in (2, 0, 1)]
    fills = {name: run(model, CLEAN)[name] for name in names}
    together = patch_effects(model, CORRUPTED, AT_ONE, fills)
    for name in names:
        alone = patch_effects(model, CORRUPTED, AT_ONE, {name: fills[name]})[name]
        np.testing.assert_allclose(together[name], alone, atol=1e-12)
    assert not np.allclose(together[names[0]], together[names[1]])


def test_relevance_is_conserved_and_needs_every_rule():
    """Sum of a * coefficient = M in a bias-free network, at every layer's input (arXiv 2508.21258)."""
    model = gated_stack(d=6, m=8, depth=1)
    value = METRIC(run(model, CLEAN))
    fills = {"embed": jnp.zeros(())}

    def total(**how):
        return -summed(attribute(model, CLEAN, METRIC, fills, **how), keep=(0,))["embed"]

    np.testing.assert_allclose(total(method="relevance"), value, rtol=1e-12)
    for broken in (
        Rules(norm=False, activation=True, gate=True),
        Rules(norm=True, activation=True, gate=False),
        EXACT,
    ):
        assert float(jnp.abs(total(method="relevance", rules=broken) - value).max()) > 0.02 * float(
            jnp.abs(value).max()
        )
    assert Rules(norm=True, activation=True, gate=True) == RELEVANCE


def test_integrated_gradients_are_complete_in_the_limit():
    """The gap to M(fill) - M(run) falls as 1/K for left points and as 1/K^2 for midpoints."""
    model = curved_stack()
    fills = clean_fills(model, ("embed",))
    whole = patch_effects(model, CORRUPTED, AT_ONE, fills, each=())["embed"]

    def gap(points, steps):
        found = attribute(model, CORRUPTED, AT_ONE, fills, method="integrated", points=points, steps=steps)
        return float(jnp.abs(summed(found, keep=(0,))["embed"] - whole).max())

    left, middle = ([gap(points, steps) for steps in (20, 80)] for points in ("left", "midpoint"))
    assert 3.3 < left[0] / left[1] < 4.7
    assert 12 < middle[0] / middle[1] < 20
    assert middle[1] < left[1] / 20


def test_a_metric_without_slope_is_refused():
    model = affine_stack()
    fills = clean_fills(model)
    logits = run(model, CLEAN).logits[:, -1]
    with pytest.raises(UserError, match="derivative vanishes at this run"):
        attribute(model, CLEAN, Divergence(logits), {"embed": jnp.zeros(())}, method="gradient")
    zeros = attribute(model, CLEAN, Divergence(logits), {"embed": jnp.zeros(())}, method="gradient", guard=False)
    assert float(jnp.abs(zeros["embed"]).max()) < 1e-12, "without the guard: exact zeros, silently"
    attribute(model, CORRUPTED, Divergence(logits), fills, method="gradient")  # from the other run there is a slope
    check_metric(model, CLEAN, LogProbability(jnp.asarray([1, 2])))
    scaled = lambda trace: 1e-9 * METRIC(trace)
    check_metric(model, CLEAN, scaled)


def test_the_guard_works_in_float32():
    with jax.enable_x64(False):
        model, tokens = gated_stack(d=6, m=8, depth=1), TOKENS
        logits = run(model, tokens).logits[:, -1]
        with pytest.raises(UserError, match="derivative vanishes"):
            check_metric(model, tokens, Divergence(logits))
        check_metric(model, tokens, METRIC)


def test_every_granularity_of_an_attention_array():
    """A head's effect over all positions is that of its z patched whole; zero, mean and resample fills."""
    with jax.enable_x64(False):
        model = small_transformer()
        clean, corrupted = TOKENS + 60, TOKENS + 90
        z, name = run(model, clean)["blocks/0/attn/z"], "blocks/0/attn/z"
        by_head = patch_effects(model, corrupted, METRIC, {name: z}, each=(2,))[name]
        assert by_head.shape == (2, 4)
        edit = Patch(z, (jnp.arange(4) == 2)[:, None])
        by_hand = METRIC(run(model, corrupted, edits={name: edit})) - METRIC(run(model, corrupted))
        np.testing.assert_allclose(by_head[:, 2], by_hand, atol=1e-5)
        late = {name: (jnp.arange(3) >= 1)[:, None, None]}
        part = patch_effects(model, corrupted, METRIC, {name: z}, where=late)[name]
        assert (part[:, 0] == 0).all() and float(jnp.abs(part[:, 1:]).max()) > 0


def test_path_patching_separates_paths():
    """In the affine stack, map 0's direct effect on `final` is its own output, and the rest goes through the others."""
    model = affine_stack()
    name = "maps/0/out"
    corrupted = run(model, CORRUPTED)[name]
    sender = {name: Patch(corrupted, jnp.ones((), bool))}
    others = ("maps/1/out", "maps/2/out")
    direct = path_effect(model, CLEAN, METRIC, sender, ("final",), frozen=others)
    change = (corrupted - run(model, CLEAN)[name])[:, -1] @ model.readout
    by_hand = change[jnp.arange(2), METRIC.answer] - change[jnp.arange(2), METRIC.other]
    np.testing.assert_allclose(direct, by_hand, atol=1e-12)
    through = [
        path_effect(model, CLEAN, METRIC, sender, receivers, frozen=frozen)
        for receivers, frozen in ((("maps/1/out",), ()), (("maps/2/out",), ("maps/1/out",)))
    ]
    whole = patch_effects(model, CLEAN, METRIC, {name: corrupted}, each=())[name]
    np.testing.assert_allclose(direct + through[0] + through[1], whole, atol=1e-12)
    assert float(jnp.abs(path_effect(model, CLEAN, METRIC, sender, ("final",), frozen=()) - direct).max()) > 1e-3


def test_fills():
    array = normal(0, 4, 5, 3)
    np.testing.assert_allclose(mean_fill(array)[0, 0], np.asarray(array)[:, 1:].mean((0, 1)))
    assert mean_fill(array, per_position=True).shape == (1, 5, 3)
    weight = jnp.ones((4, 5)).at[:, 3:].set(0)
    np.testing.assert_allclose(mean_fill(array, weight=weight)[0, 0], np.asarray(array)[:, 1:3].mean((0, 1)))
    for seed in range(5):
        other = resample_fill(array, jax.random.key(seed))
        assert not any((other[row] == array[row]).all() for row in range(4))
        assert sorted(other.reshape(-1).tolist()) == sorted(array.reshape(-1).tolist())
    with pytest.raises(UserError, match="at least two prompts"):
        resample_fill(array[:1], jax.random.key(0))


def test_measures():
    x, y = np.asarray(normal(1, 50)), np.asarray(normal(2, 50))
    np.testing.assert_allclose(pearson(jnp.asarray(x), jnp.asarray(x + y)), np.corrcoef(x, x + y)[0, 1], rtol=1e-12)
    np.testing.assert_allclose(spearman(jnp.asarray(x), jnp.asarray(np.exp(x))), 1.0)
    assert float(normalised(jnp.asarray(3.0), jnp.asarray(5.0), jnp.asarray(1.0))) == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "gradiant"}, "Did you mean 'gradient'"),
        ({"points": "right"}, "points='right' must be one of midpoint, left"),
        ({"steps": 0}, "steps=0 must be positive"),
        ({"fills": {"maps/7/out": jnp.zeros(())}}, "no array 'maps/7/out'"),
        ({"fills": {"final": jnp.zeros(())}, "method": "integrated_inputs"}, "give its fill in fills"),
    ],
)
def test_bad_input_is_refused(change, words):
    how = {"fills": {"embed": jnp.zeros(())}} | change
    with pytest.raises(UserError, match=words):
        attribute(affine_stack(), CLEAN, METRIC, how.pop("fills"), **how)


def test_an_axis_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="does not have"):
        patch_effects(affine_stack(), CLEAN, METRIC, {"embed": jnp.zeros(())}, each=(3,))
