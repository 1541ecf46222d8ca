"""SPD: squashings with the published derivatives, terms and gradients against NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxinterp.evaluation.planted.superposition import IN, OUT
from jaxinterp.methods.factor import parameters as p
from tests.methods.factor.planted_parts import masked_by, problem


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


H = np.array([-1.5, -0.2, 0.0, 0.3, 1.0, 1.4])


def test_lower_has_the_published_derivative():
    np.testing.assert_allclose(p.lower(jnp.asarray(H)), [0, 0, 0, 0.3, 1, 1])
    for sign, wanted in ((1.0, [0, 0, 0, 1, 1, 0]), (-1.0, [0.01, 0.01, 0.01, 1, 1, 0])):
        gradient = jax.grad(lambda h, sign=sign: sign * jnp.sum(p.lower(h)))(jnp.asarray(H))
        np.testing.assert_allclose(gradient, sign * np.array(wanted))
    # Broken variant: the plain clip never opens a gate that is shut.
    assert np.all(jax.grad(lambda h: -jnp.sum(jnp.clip(h, 0, 1)))(jnp.asarray(H))[:2] == 0)


def test_upper_leaks_above_one():
    np.testing.assert_allclose(p.upper(jnp.asarray(H)), [0, 0, 0, 0.3, 1, 1.004])
    gradient = jax.grad(lambda h: jnp.sum(p.upper(h)))(jnp.asarray(H))
    np.testing.assert_allclose(gradient, [0, 0, 1, 1, 1, 0.01])


def test_the_papers_lower_one_keeps_negative_values():
    np.testing.assert_allclose(p.lower_of_the_paper(jnp.asarray(H)), [-0.015, -0.002, 0, 0.3, 1, 1])


def loss(parts, gates, model, sources, x, kind="squares", exponent=0.9):
    reads = model.reads(x)
    importances = {name: p.causal_importances(reads[name], parts[name], gates[name]) for name in parts}
    coefficients = p.Coefficients(0.7, 1.1, 1.3, 0.4)
    return p.terms(
        masked_by(model, parts, x), model(x), model.weights(), parts, importances, sources,
        kind=kind, p=exponent, coefficients=coefficients,
    )  # fmt: skip


def by_numpy(parts, gates, model, sources, x, kind="squares", exponent=0.9):
    """The same four terms, written again."""
    weights = {name: np.asarray(weight) for name, weight in model.weights().items()}
    x = np.asarray(x)
    reads = {IN: x, OUT: x @ weights[IN]}
    masks, upper = {}, 0.0
    for name in weights:
        gate = gates[name]
        inner = np.einsum("ni,ci->nc", reads[name], parts[name].read)
        pre = inner[..., None] * np.asarray(gate.weight) + np.asarray(gate.bias)
        h = np.einsum("nch,ch->nc", pre * 0.5 * (1 + erf(pre / np.sqrt(2))), gate.out_weight) + np.asarray(
            gate.out_bias
        )
        g = np.clip(h, 0, 1)
        masks[name] = g + (1 - g) * np.asarray(sources[name].parts)
        leaky = np.where(h > 1, 1 + 0.01 * (h - 1), np.clip(h, 0, None))
        upper += np.sum(np.mean((leaky + 1e-12) ** exponent, axis=0))

    def forward(on):
        def linear(name, x):
            if name not in on:
                return x @ weights[name]
            total = np.zeros((len(x), weights[name].shape[1]))
            for c in range(len(parts[name].read)):
                v, u = np.asarray(parts[name].read[c]), np.asarray(parts[name].write[c])
                total += masks[name][:, c : c + 1] * (x @ np.outer(v, u))
            rest = weights[name] - np.asarray(parts[name].read).T @ np.asarray(parts[name].write)
            return total + np.asarray(sources[name].rest)[:, None] * (x @ rest)

        return np.maximum(linear(OUT, linear(IN, x)) + np.asarray(model.bias), 0)

    def apart(a, b):
        if kind == "squares":
            return np.mean((a - b) ** 2)
        p_, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (a, b))
        return np.mean(np.sum(p_ * np.log(p_ / q), axis=-1))

    clean = forward(())
    rest = [weights[n] - np.asarray(parts[n].read).T @ np.asarray(parts[n].write) for n in weights]
    return {
        "faithful": sum(np.sum(r**2) for r in rest) / sum(r.size for r in rest),
        "stochastic": apart(clean, forward((IN, OUT))),
        "layerwise": (apart(clean, forward((IN,))) + apart(clean, forward((OUT,)))) / 2,
        "importance": upper,
    }


@pytest.mark.parametrize("kind", ["squares", "kl"])
def test_terms_are_those_of_numpy(kind):
    model, parts, gates, sources, x = problem()
    value, found = loss(parts, gates, model, sources, x, kind)
    wanted = by_numpy(parts, gates, model, sources, x, kind)
    for name, number in wanted.items():
        np.testing.assert_allclose(found[name], number, rtol=1e-12, err_msg=name)
    total = (
        0.7 * wanted["faithful"] + 1.1 * wanted["stochastic"] + 1.3 * wanted["layerwise"] + 0.4 * wanted["importance"]
    )
    np.testing.assert_allclose(value, total, rtol=1e-12)


def test_gradients_are_finite_differences_where_no_gate_leaks():
    model, parts, gates, sources, x = problem()
    reads = model.reads(x)
    h = {name: gates[name](reads[name] @ parts[name].read.T) for name in parts}
    middle = {
        name: p.Gates(g.weight, g.bias, 0.1 * g.out_weight / (1 + jnp.abs(h[name]).max()), 0.5 + 0 * g.out_bias)
        for name, g in gates.items()
    }  # every logit is near 1/2
    objective = jax.jit(lambda parts, gates: loss(parts, gates, model, sources, x)[0])
    gradient = jax.grad(objective, argnums=(0, 1))(parts, middle)
    draw = np.random.default_rng(1)
    along = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape)), (parts, middle))
    moved = lambda step: objective(*jax.tree.map(lambda leaf, a: leaf + step * a, (parts, middle), along))
    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    products = jax.tree.map(lambda g, a: jnp.sum(g * a), gradient, along)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-7)


def test_one_lower_node_sees_the_sum_of_all_cotangents():
    """Squashed once a term, the leak looks at each term's sign alone: another gradient, the pitfall."""
    h = jnp.asarray([-0.5, -0.5])
    first, second = jnp.asarray([3.0, -3.0]), jnp.asarray([-2.0, 1.0])

    def shared(h):
        g = p.lower(h)
        return jnp.sum(first * g) + jnp.sum(second * g)

    def twice(h):
        return jnp.sum(first * p.lower(h)) + jnp.sum(second * p.lower(h))

    np.testing.assert_allclose(jax.grad(shared)(h), [0, -0.02])
    np.testing.assert_allclose(jax.grad(twice)(h), [-0.02, -0.03])


def test_masks_of_one_are_the_matrix_and_masks_of_zero_nothing():
    model, parts, _, _, x = problem()
    weight, ones = model.weight_in, p.Mask(jnp.ones((6, 4)), jnp.ones(6))
    np.testing.assert_allclose(p.masked_linear(x, weight, parts[IN], ones), x @ weight, atol=1e-12)
    none = p.Mask(jnp.zeros((6, 4)))
    np.testing.assert_allclose(p.masked_linear(x, weight, parts[IN], none, jnp.ones(2)), np.ones((6, 2)))
    without_rest = p.masked_linear(x, weight, parts[IN], p.Mask(jnp.ones((6, 4))))
    assert np.abs(without_rest - x @ weight).max() > 0.1


def test_importance_counts_matrices_and_parts_and_means_over_inputs():
    values = {"a": jnp.full((3, 4, 5), 0.25), "b": jnp.full((3, 2), 1.0)}
    np.testing.assert_allclose(p.importance_minimality(values, 0.5), 5 * 0.5 + 2, rtol=1e-9)


def test_mmcs_and_ml2r_of_the_mechanisms_themselves():
    model, *_ = problem()
    own = p.Parts(jnp.eye(5), 0.9 * model.weight_in)
    np.testing.assert_allclose(p.mean_max_cosine(model.weight_in, own), (1, 0.9), rtol=1e-12)
    mixed = p.Parts(jnp.eye(5) + 0.5, model.weight_in)
    assert p.mean_max_cosine(model.weight_in, mixed)[1] > 1.1
    one_part = p.Parts(jnp.ones((1, 5)), model.weight_in[:1])
    assert p.mean_max_cosine(model.weight_in, one_part)[0] < 0.8
