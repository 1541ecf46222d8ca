"""VPD's own terms, its adversary against NumPy's Adam, and APD's attributions against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.evaluation.planted.superposition import IN, OUT
from jaxinterp.methods.factor import attribution_parameters as apd
from jaxinterp.methods.factor import parameters as p
from jaxinterp.methods.factor import vpd
from tests.methods.factor.planted_parts import masked_by, problem


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_terms():
    model, parts, *_ = problem()
    rest = {
        n: np.asarray(w) - np.asarray(parts[n].read).T @ np.asarray(parts[n].write) for n, w in model.weights().items()
    }
    wanted = np.mean([np.sum(rest[n] ** 2) / np.sum(np.asarray(w) ** 2) for n, w in model.weights().items()])
    np.testing.assert_allclose(vpd.relative_faithfulness(model.weights(), parts), wanted, rtol=1e-12)
    g = jnp.asarray([0.0, 0.1, 1.0])
    np.testing.assert_allclose(vpd.smooth_l0(g, 0.1), [0, 0.5, 1 / 1.01])
    np.testing.assert_allclose(vpd.smooth_l0(g, 0.1, at_one=True), [0, 0.505, 1])
    np.testing.assert_allclose(vpd.frequency_penalty(jnp.asarray([0.5, 0.25]), 4.0), 0.5 * np.log2(3) + 0.25)
    assert [float(vpd.annealed(t, 10, 2.0, 0.4, 0.2, 0.7)) for t in (0, 2, 7, 9)] == pytest.approx([2, 2, 0.4, 0.4])
    # Broken variant: the penalty of halves of the batch is not that of the batch.
    halves = jnp.asarray([[1.0, 0.0], [0.0, 0.5]])
    apart = np.mean([float(vpd.frequency_penalty(half, 4.0)) for half in halves])
    assert abs(apart - vpd.frequency_penalty(halves.mean(0), 4.0)) > 0.1


def test_the_adversary_is_adam_upwards_and_stays_in_the_box():
    draw = np.random.default_rng(0)
    adversary = vpd.start_adversary(jax.random.key(0), {"a": 3, "b": 2}, (4,))
    sources = {n: np.asarray(s) for n, s in adversary.sources.items()}
    assert sources["a"].shape == (4, 4) and sources["b"].shape == (4, 3)
    first, second = ({n: 0 * s for n, s in sources.items()} for _ in range(2))
    for t in range(1, 4):
        gradient = {n: draw.normal(size=s.shape) for n, s in sources.items()}
        adversary = vpd.ascend(adversary, {n: jnp.asarray(g) for n, g in gradient.items()}, rate=0.3)
        for n, g in gradient.items():
            first[n], second[n] = 0.5 * first[n] + 0.5 * g, 0.99 * second[n] + 0.01 * g**2
            step = 0.3 * (first[n] / (1 - 0.5**t)) / (np.sqrt(second[n] / (1 - 0.99**t)) + 1e-8)
            sources[n] = np.clip(sources[n] + step, 0, 1)
            np.testing.assert_allclose(adversary.sources[n], sources[n], rtol=0, atol=1e-7)


def test_climbing_makes_the_masked_model_worse():
    model, parts, gates, _, x = problem()
    reads = model.reads(x)
    importances = {n: p.causal_importances(reads[n], parts[n], gates[n]) for n in parts}
    masked = masked_by(model, parts, x)
    loss = jax.jit(lambda sources: vpd.adversarial(masked, model(x), importances, sources, "squares"))
    fresh = vpd.start_adversary(jax.random.key(1), {IN: 4, OUT: 4}).sources
    found = vpd.projected_ascent(loss, fresh, steps=20, rate=0.1)
    assert loss(found) > 1.5 * loss(fresh)
    by_hand = p.Mask(p.mask_from(importances[IN].lower, fresh[IN][:-1]), jnp.broadcast_to(fresh[IN][-1], (6,)))
    made = vpd.adversarial_masks(importances, fresh)[IN]
    np.testing.assert_allclose(made.parts, by_hand.parts)
    np.testing.assert_allclose(made.rest, by_hand.rest)


def test_routing_masks_a_random_subset_and_leaves_the_rest_as_it_is():
    chosen = vpd.subset_routing(jax.random.key(0), ("a", "b", "c"), (3000,))
    counts = sum(np.asarray(here).astype(int) for here in chosen.values())
    assert set(counts) == {1, 2, 3} and np.abs(np.bincount(counts)[1:] / 3000 - 1 / 3).max() < 0.04
    for here in chosen.values():
        assert abs(here.mean() - 2 / 3) < 0.04
    model, parts, _, sources, x = problem()
    none = {n: jnp.zeros(6, bool) for n in parts}
    np.testing.assert_allclose(masked_by(model, parts, x)(vpd.routed(sources, none)), model(x), atol=1e-12)
    every = {n: jnp.ones(6, bool) for n in parts}
    np.testing.assert_allclose(
        masked_by(model, parts, x)(vpd.routed(sources, every)), masked_by(model, parts, x)(sources)
    )


def blocks_of(seed=0, parts=3, m=2):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape))
    sizes = {IN: (5, 2), OUT: (2, 5)}
    return {n: apd.Blocks(normal(parts, i, m), normal(parts, m, o)) for n, (i, o) in sizes.items()}


def test_attributions_are_gradients_times_parts():
    model, *_, x = problem()
    blocks = blocks_of()

    def forward(added, x):
        weights = model.weights()
        return model(x, lambda name, value: value @ weights[name] + added[name])

    found = apd.attributions(forward, x, model.reads(x), blocks)
    of_weights = jax.vmap(jax.jacrev(lambda w, x: model(x, lambda name, value: value @ w[name])), (None, 0))
    slopes = of_weights(model.weights(), x)  # df_o/dW, the definition
    wanted = np.zeros((6, 3))
    for c in range(3):
        matrices = {n: np.asarray(b.read[c] @ b.write[c]) for n, b in blocks.items()}
        wanted[:, c] = np.sum(sum(np.einsum("noij,ij->no", slopes[n], matrices[n]) for n in blocks) ** 2, axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    apart = sum(
        np.einsum("noij,ij->no", slopes[n], np.asarray(blocks[n].read[0] @ blocks[n].write[0])) ** 2 for n in blocks
    )
    assert np.abs(apart.sum(1) - wanted[:, 0]).max() > 0.01  # broken variant: squared before layers are added


def test_masks_and_penalties():
    values = jnp.asarray([[3.0, 1, 2], [0.1, 5, 0.2]])
    np.testing.assert_array_equal(apd.top_k_mask(values, 1.5), [[1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(apd.top_k_mask(values, 1, batch=False), [[1, 0, 0], [0, 1, 0]])
    blocks, mask = blocks_of(), jnp.asarray([[1.0, 0, 1], [0, 1, 0]])
    wanted = 0.0
    for b in blocks.values():
        a, w = np.asarray(b.read), np.asarray(b.write)
        for n, c, r in np.ndindex(2, 3, 2):
            wanted += (float(mask[n, c]) * np.sum(a[c, :, r] ** 2) * np.sum(w[c, r] ** 2) + 1e-16) ** 0.45
    np.testing.assert_allclose(apd.simplicity(blocks, mask, 0.9, 20), wanted / 20 / 2, rtol=1e-10)
    np.testing.assert_allclose(apd.attribution_penalty(values, 4, 2.0), np.mean(np.sum(np.asarray(values) / 4, 1)))
    model, *_ = problem()
    exact = {n: apd.Blocks(jnp.eye(w.shape[0])[None], w[None]) for n, w in model.weights().items()}
    assert apd.parameter_match(model.weights(), exact) == 0
    x = problem()[4]
    np.testing.assert_allclose(apd.blocks_linear(x, exact[IN]), x @ model.weight_in, atol=1e-12)
    np.testing.assert_allclose(
        apd.blocks_linear(x, exact[IN], 0.5 * jnp.ones((6, 1))), x @ model.weight_in / 2, atol=1e-12
    )
