"""Compiled programs hold no array of tokens x features and none of tokens x k x width, forward or backward."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxinterp.kernels import dense, xla
from jaxinterp.preflight.program_text import arrays, numbers_of, sorts
from tests.kernels import programs

TOKENS, FEATURES, WIDTH, K = 16384, 4096, 96, 16
LIMIT = min(TOKENS * FEATURES, TOKENS * K * WIDTH)


def described(platform):
    """A mesh of one device that is not here."""
    device = AbstractDevice("NVIDIA H200" if platform == "gpu" else platform, None, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1, 1), ("data", "feature"), abstract_device=device))


def arguments():
    parameters = jax.eval_shape(lambda: programs.parameters(FEATURES, WIDTH))
    return parameters, jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


def largest(text):
    return max(map(numbers_of, arrays(text)))


def forward(parameters, x):
    return programs.loss(parameters, x, K)


def gradient(parameters, x):
    return jax.grad(programs.loss)(parameters, x, K)


def step(parameters, x):
    state = optax.adam(1e-3).init(parameters)
    return programs.step(parameters, state, x, K)


@pytest.mark.parametrize("function", [forward, gradient, step])
def test_on_a_cpu(function):
    """Invariant 22."""
    compiled = jax.jit(function).lower(*arguments()).compile()
    assert largest(compiled.as_text()) <= xla.chunks.PRE_ACTIVATIONS * FEATURES < LIMIT


@pytest.mark.parametrize("function", [forward, gradient])
def test_lowered_for_a_gpu(function, monkeypatch):
    """Invariant 22: plain XLA, in the form in which the GPU compiler gets it."""
    monkeypatch.setattr("jaxinterp.kernels.dispatch.refusal", lambda *args, **shape: None)
    monkeypatch.setattr("jaxinterp.kernels.dispatch.choose", lambda *args, **shape: "xla")
    with described("gpu"):
        text = jax.jit(function).trace(*arguments()).lower(lowering_platforms=("cuda",)).as_text()
    assert largest(text) <= xla.GATHERED["gpu"] < LIMIT


def test_temporary_memory_of_the_gradient():
    compiled = jax.jit(gradient).lower(*arguments()).compile()
    memory = compiled.memory_analysis()
    limit = memory.output_size_in_bytes + 512 * FEATURES * 4 + 64 * 2**20
    assert memory.temp_size_in_bytes <= limit


def test_plain_autodiff_holds_the_array_that_is_looked_for():
    """The control: the same loss by dense codes, and by `lax.top_k` with a gather."""

    def plain(parameters, x):
        def loss(parameters):
            values, indices = jax.lax.top_k(x @ parameters["encoder"].T, K)
            return jnp.sum(jnp.einsum("nk,nkd->nd", values, parameters["decoder"][indices]) ** 2)

        return jax.grad(loss)(parameters)

    assert largest(jax.jit(plain).lower(*arguments()).compile().as_text()) >= TOKENS * FEATURES


def test_dense_passes_are_chunked():
    """What the table chooses for large k / M holds 512 tokens of codes at a time."""

    def passes(parameters, x, values, indices):
        rows = parameters["decoder"]
        y = dense.gather_sum(values, indices, rows)
        return dense.sampled_dot(y, rows, indices), dense.outer_sum(values, indices, x, FEATURES)

    parameters, x = arguments()
    values, indices = (jax.ShapeDtypeStruct((TOKENS, 200), dtype) for dtype in (jnp.float32, jnp.int32))
    text = jax.jit(passes).lower(parameters, x, values, indices).compile().as_text()
    assert largest(text) < TOKENS * FEATURES / 8


def test_two_weight_gradients_share_one_sort():
    """On an accelerator, where entries are sorted by feature: the indices are the same, so the sort is."""

    def both(values, indices, g):
        with described("gpu"):
            return xla._outer_sorted(values, indices, g, 50), xla._outer_sorted(2 * values, indices, g + 1, 50)

    values = jnp.ones((64, 4))
    text = jax.jit(both).lower(values, jnp.ones((64, 4), jnp.int32), jnp.ones((64, 8))).compile().as_text()
    assert len(sorts(text)) == 1
