"""Hidden experts: the forward pass written out, its sparse gradients, start values, and the Gaussian twin."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from benchmarks.factor import experts_memory
from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.experts import Router, gathered_dot
from jaxinterp.methods.factor import experts

TOKENS, D, N, RANK, K, OUT = 6, 5, 40, 3, 4, 7


def arrays(seed=0, rank=RANK):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape)
    router = (draw(rank, D), draw(N, rank), draw(N)) if rank else (None, draw(N, D), draw(N))
    return draw(TOKENS, D), router, draw(N, D), draw(N), draw(N, OUT), draw(OUT)


def by_hand(x, router, read, c, write, bias, k=K):
    inner, outer, r = router
    rows = []
    for token in x:
        scores = outer @ (token if inner is None else inner @ token) + r
        chosen = np.argsort(-scores)[:k]
        weights = scipy.special.softmax(scores[chosen])
        total = bias.copy()
        for w, e in zip(weights, chosen, strict=True):
            a = read[e] @ token + c[e]
            total = total + w * a * scipy.special.ndtr(a) * write[e]
        rows.append(total)
    return np.stack(rows)


def forward(x, router, *rest, k=K, chunk=32):
    inner, outer, r = router
    module = Router(None if inner is None else jnp.asarray(inner), jnp.asarray(outer), jnp.asarray(r))
    return experts.expert_forward(jnp.asarray(x), module, *(jnp.asarray(part) for part in rest), k=k, chunk=chunk)


@pytest.mark.parametrize("rank", [RANK, 0])
def test_the_forward_pass_is_the_paper_s(float64, rank):
    problem = arrays(rank=rank)
    found, chosen, weights = forward(*problem)
    np.testing.assert_allclose(found, by_hand(*problem), atol=1e-12)
    np.testing.assert_allclose(forward(*problem, chunk=3)[0], found, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
    assert chosen.shape == (TOKENS, K)
    wrong = by_hand(*problem, k=N)  # softmax over all experts, then cut, is another student
    assert np.abs(wrong - np.asarray(found)).max() > 1e-2


def test_the_dense_part_is_two_linear_maps(float64):
    x, _, read, c, write, bias = arrays()
    inner = x @ read.T + c
    wanted = (inner * scipy.special.ndtr(inner)) @ write + bias
    np.testing.assert_allclose(experts.dense_forward(*map(jnp.asarray, (x, read, c, write, bias))), wanted, atol=1e-12)


def student(seed=0, rank=RANK):
    """A module with the arrays of `arrays`, without shared neurons that do anything."""
    x, router, read, c, write, bias = arrays(seed, rank)
    method = experts.HiddenExperts(experts=N, k=K, shared=2, rank=rank or None)
    made = experts.start(method, jax.random.key(0), *sample(x, write))
    inner, outer, r = router
    as_float = lambda array: None if array is None else jnp.asarray(array, jnp.float32)
    return x, eqx.tree_at(
        lambda e: (e.router, e.encoder, e.encoder_bias, e.decoder, e.decoder_bias, e.shared.decoder),
        made,
        (Router(*map(as_float, (inner, outer, r))), *map(as_float, (read, c, write, bias)), jnp.zeros((2, OUT))),
    )


def sample(x, write):
    arrays = {"a/in": jnp.asarray(x, jnp.float32), "a/out": jnp.asarray(x @ np.ones((D, OUT)), jnp.float32)}
    return (make_batch(arrays, jnp.ones(len(x)), Sites("a/in", "a/out")),)


@pytest.mark.parametrize("rank", [RANK, pytest.param(0, marks=pytest.mark.slow)])
def test_the_module_with_the_sparse_core_is_the_forward_pass_and_so_are_its_gradients(rank):
    x, module = student(rank=rank)
    read = module.scaling.read(jnp.asarray(x, jnp.float32))

    def written_out(e):
        return experts.expert_forward(read, e.router, e.encoder, e.encoder_bias, e.decoder, e.decoder_bias, k=K)[0]

    def by_core(e):
        return (e(jnp.asarray(x, jnp.float32)) - e.scaling.output_mean) / e.scaling.output_scale

    np.testing.assert_allclose(by_core(module), written_out(module), rtol=2e-4, atol=2e-4)
    direction = jax.random.normal(jax.random.key(1), (TOKENS, OUT))
    wanted = eqx.filter_jit(eqx.filter_grad(lambda e: jnp.sum(written_out(e) * direction)))(module)
    found = eqx.filter_jit(eqx.filter_grad(lambda e: jnp.sum(by_core(e) * direction)))(module)
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=2e-3, atol=2e-3, err_msg=name)
    np.testing.assert_allclose(found.router.outer, wanted.router.outer, rtol=2e-3, atol=2e-3)
    assert float(jnp.abs(wanted.router.outer).max()) > 0.01, "the router has a gradient, through the weights"


def test_gathered_dots_have_the_gradients_of_dots():
    rng = np.random.default_rng(0)
    x, rows = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 3), (9, 3)))
    chosen = jnp.asarray(rng.integers(0, 9, (4, 2)))
    plain = lambda x, rows: jnp.einsum("td,tkd->tk", x, rows[chosen])
    np.testing.assert_allclose(gathered_dot(x, rows, chosen), plain(x, rows), rtol=1e-5, atol=1e-6)
    g = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)
    found = jax.grad(lambda *a: jnp.sum(g * gathered_dot(*a, chosen)), argnums=(0, 1))(x, rows)
    wanted = jax.grad(lambda *a: jnp.sum(g * plain(*a)), argnums=(0, 1))(x, rows)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_starts_are_the_authors_and_the_write_start_is_one_for_both_routers():
    x, _, _, _, write, _ = arrays()
    bounds = {}
    for rank in (RANK, None):
        for write_start in ("k", "experts"):
            method = experts.HiddenExperts(experts=4000, k=K, shared=8, rank=rank, write_start=write_start)
            made = experts.start(method, jax.random.key(0), *sample(x, write))
            bounds[rank, write_start] = float(jnp.abs(made.decoder).max())
            assert float(jnp.abs(made.encoder).max()) == pytest.approx(D**-0.5, rel=0.01)
            assert float(jnp.abs(made.router.outer).max()) == pytest.approx((rank or D) ** -0.5, rel=0.01)
    for rank in (RANK, None):
        assert bounds[rank, "k"] == pytest.approx(K**-0.5, rel=0.01)
        assert bounds[rank, "experts"] == pytest.approx(4000**-0.5, rel=0.01)
    assert bounds[RANK, "k"] > 30 * bounds[None, "experts"], "what the authors compare"


def test_wrong_hyperparameters_are_refused(without_annotations):
    for wrong, message in [
        ({"k": 5000}, "k=5000 must lie between 1 and experts=4096"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"write_start": "n"}, "write_start='n' must be"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"shared": 0}, "shared=0 must be at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            experts.HiddenExperts(**wrong)


def test_the_twin_has_the_mean_and_the_covariance(float64):
    rng = np.random.default_rng(0)
    rows = rng.exponential(size=(500, 4)) @ rng.normal(size=(4, 4)) + 2
    mean, covariance = experts.twin_moments(jnp.asarray(rows))
    normal = rng.normal(size=(2000, 4))
    normal = (normal - normal.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(normal.T, ddof=0))).T
    twin = np.asarray(experts.gaussian_twin(jnp.asarray(normal), mean, covariance))
    np.testing.assert_allclose(twin.mean(axis=0), rows.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(np.cov(twin.T, ddof=0), np.cov(rows.T, ddof=0), atol=1e-8)
    wrong = normal @ covariance + mean  # the covariance in the place of its root
    assert np.abs(np.cov(wrong.T, ddof=0) - covariance).max() > 0.1


def test_unexplained_variance_is_dominated_by_large_dimensions_and_shown_for_each():
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(400, 3)) * [100, 1, 1], jnp.float32)
    output = target * jnp.array([1.0, 0, 0])
    total, each = experts.unexplained(output, target)
    assert float(total) < 1e-3 and float(each[0]) == 0
    np.testing.assert_allclose(each[1:], 1, atol=0.05)


def test_nothing_of_tokens_by_experts_by_d_is_built():
    """Temporary bytes of loss and gradient: below a thirtieth of that array, and below tokens x experts alone."""
    memory = experts_memory(tokens=256, d=64, number=16384, k=32, rank=16)
    assert memory["temporary_gb"] < memory["tokens_x_experts_x_d_gb"] / 30
    assert memory["temporary_gb"] < 2 * memory["tokens_x_experts_gb"]
