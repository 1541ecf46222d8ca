"""The programs that `benchmarks.topk` times, and what their compiled form shows; each runs in a worker.

The step is that of `methods.recipes.gradient_method` on the least that a sparse autoencoder needs; its state is donated
as `training.fit` does; the package's own step adds normalisation, metrics and the activation's own state.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from benchmarks.workers import Part, Shape, activations
from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.kernels import encode_topk, sparse_decode
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.preflight.program_text import arrays, numbers_of, shape_of

CHUNK = 512  # tokens whose pre-activations may stand in memory at a time
SPARE = 64_000_000  # bytes
LEARNING_RATE = 1e-3
STEPS = 100_000

Ready = tuple[dict[str, Any], dict[str, Part]]


class Parameters(NamedTuple):
    """A sparse autoencoder; also its gradient."""

    encoder: Float[Array, "features d"]
    encoder_bias: Float[Array, " features"]
    decoder: Float[Array, "features d"]
    decoder_bias: Float[Array, " d"]


class State(NamedTuple):
    """Everything that the step changes."""

    parameters: Parameters
    optimizer: Any
    since_fired: Int[Array, " features"]


OPTIMIZER = optax.adam(LEARNING_RATE)


def start(key: Array, mean: Float[Array, " d"], shape: Shape) -> State:
    """Random unit rows, encoder equal to decoder, the decoder's bias at the mean."""
    rows = unit_norm(jax.random.normal(key, (shape.features, shape.width)))
    parameters = Parameters(rows, jnp.zeros(shape.features), rows, mean)
    return State(parameters, OPTIMIZER.init(parameters), jnp.zeros(shape.features, jnp.int32))


def forward(parameters: Parameters, x: Array, mean: Array, k: int) -> tuple[Array, Array]:
    """The mean squared error over tokens and dimensions, and what was chosen."""
    values, indices = encode_topk(x - mean, parameters.encoder, parameters.encoder_bias, k=k)
    y = sparse_decode(jax.nn.relu(values), indices, parameters.decoder) + parameters.decoder_bias
    return jnp.mean((x - y) ** 2), indices


def dense_forward(parameters: Parameters, x: Array, mean: Array, k: int) -> tuple[Array, Array]:
    """`forward` as one would write it without kernels."""
    values, indices = jax.lax.top_k((x - mean) @ parameters.encoder.T + parameters.encoder_bias, k)
    tokens = jnp.arange(x.shape[0])[:, None]
    codes = jnp.zeros((x.shape[0], parameters.encoder.shape[0])).at[tokens, indices].set(jax.nn.relu(values))
    return jnp.mean((x - codes @ parameters.decoder - parameters.decoder_bias) ** 2), indices


def adam(parameters: Parameters, optimizer: Any, gradient: Parameters) -> tuple[Parameters, Any]:
    """One update of Adam on everything."""
    updates, optimizer = OPTIMIZER.update(gradient, optimizer, parameters)
    return optax.apply_updates(parameters, updates), optimizer


def tangent(gradient: Array, rows: Array) -> Array:
    """g_j - (g_j . D_j) D_j."""
    return gradient - jnp.sum(gradient * rows, axis=1, keepdims=True) * rows


def unit_norm(rows: Array) -> Array:
    """Every row divided by its length."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def whole_step(state: State, x: Array, mean: Array, k: int) -> tuple[State, Array]:
    """One training step, as sparsify's trainer does it."""
    (loss, indices), gradient = jax.value_and_grad(forward, has_aux=True)(state.parameters, x, mean, k)
    gradient = gradient._replace(decoder=tangent(gradient.decoder, state.parameters.decoder))
    parameters, optimizer = adam(state.parameters, state.optimizer, gradient)
    parameters = parameters._replace(decoder=unit_norm(parameters.decoder))
    fired = jnp.zeros(len(state.since_fired), bool).at[indices.reshape(-1)].set(True)
    return State(parameters, optimizer, jnp.where(fired, 0, state.since_fired + x.shape[0])), loss


def parts(shape: Shape) -> Ready:
    """Every part of the step by itself, and the facts."""
    x = _batches(shape)[0]
    mean = jnp.mean(x, axis=0)
    state = jax.jit(start, static_argnums=2)(jax.random.key(0), mean, shape)
    parameters, rows = state.parameters, state.parameters.decoder
    k = shape.k

    def encode(parameters: Parameters, x: Array, mean: Array) -> tuple[Array, Array]:
        return encode_topk(x - mean, parameters.encoder, parameters.encoder_bias, k=k)

    def decode(values: Array, rows: Array, indices: Array) -> Array:
        return sparse_decode(jax.nn.relu(values), indices, rows)

    def against(values: Array, rows: Array, indices: Array, g: Array) -> Array:
        return jnp.sum(decode(values, rows, indices) * g)

    def gradient(forward: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(lambda *arguments: jax.grad(forward, has_aux=True)(*arguments, k)[0])

    values, indices = jax.jit(encode)(parameters, x, mean)
    d_parameters = gradient(forward)(parameters, x, mean)
    # Everything is an argument: what a program closes over is a constant, which its compiler may work out beforehand.
    jitted: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "floor": (lambda x, e: x @ e.T, (x, rows)),
        "encode": (encode, (parameters, x, mean)),
        "decode": (decode, (values, rows, indices)),
        "d values": (jax.grad(against, argnums=0), (values, rows, indices, x)),
        "d rows": (jax.grad(against, argnums=1), (values, rows, indices, x)),
        "forward": (lambda p, x, mean: forward(p, x, mean, k)[0], (parameters, x, mean)),
        "gradient": (gradient(forward), (parameters, x, mean)),
        "tangent": (tangent, (d_parameters.decoder, rows)),
        "dense gradient": (gradient(dense_forward), (parameters, x, mean)),
    }
    ready = {name: _repeat(jax.jit(function), arguments) for name, (function, arguments) in jitted.items()}
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    update = jax.jit(lambda state, gradient: adam(state[0], state[1], gradient), donate_argnums=0)
    ready["adam"] = _carry(update, copy((state.parameters, state.optimizer)), d_parameters)
    ready["unit norm"] = _carry(jax.jit(lambda rows: unit_norm(rows), donate_argnums=0), copy(rows))
    ready["facts"] = lambda: {"facts": [fact._asdict() for fact in facts(shape)]}
    return {"version": version("jax")}, ready


def step(shape: Shape) -> Ready:
    """The whole step, and how often which features are chosen at its start."""
    batches = _batches(shape)
    mean = jnp.mean(batches[0], axis=0)
    run = jax.jit(whole_step, static_argnums=3, donate_argnums=0)
    state = jax.jit(start, static_argnums=2)(jax.random.key(0), mean, shape)
    _, indices = jax.jit(forward, static_argnums=3)(state.parameters, batches[0], mean, shape.k)
    counts = np.sort(np.bincount(np.asarray(indices).reshape(-1), minlength=shape.features))[::-1]
    popularity = {
        "greatest": counts[0] / shape.tokens,
        "tenth": counts[: math.ceil(shape.features / 10)].sum() / counts.sum(),
        "never": float(np.mean(counts == 0)),
    }
    variance = float(jnp.mean((batches[0] - mean) ** 2))
    done = 0

    def one_step() -> dict[str, Any]:
        nonlocal state, done
        state, loss = run(state, batches[done % len(batches)], mean, shape.k)
        jax.block_until_ready(state)
        done += 1
        return {"fvu": float(loss) / variance, "steps": done}

    return {"version": version("jax"), "popularity": popularity}, {"step": one_step}


def package_step(shape: Shape) -> Ready:
    """The step of the package's own sparse autoencoder."""
    batches = [_batch(x) for x in _batches(shape)]
    recipe = _recipe(shape)
    state = jax.jit(recipe.init)(jax.random.key(0), batches[0], None)
    run = jax.jit(recipe.step, donate_argnums=0)
    done = 0

    def one_step() -> dict[str, Any]:
        nonlocal state, done
        state, metrics = run(state, batches[done % len(batches)], jax.random.key(done), None)
        jax.block_until_ready(state)
        done += 1
        return {"fvu": float(metrics["fvu"].value()), "steps": done}

    return {"version": version("jax")}, {"step": one_step}


class Fact(NamedTuple):
    """Something that a compiled program shows, and whether it is as it should be."""

    name: str
    holds: bool
    found: str


def facts(shape: Shape) -> list[Fact]:
    """What the compiled programs show; no program runs."""
    x = jax.ShapeDtypeStruct((shape.tokens, shape.width), jnp.float32)
    mean = jax.ShapeDtypeStruct((shape.width,), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(partial(start, shape=shape), key, mean)
    batch = jax.eval_shape(_batch, x)
    recipe = _recipe(shape)
    package_state = jax.eval_shape(lambda key, batch: recipe.init(key, batch, None), key, batch)
    static = partial(jax.jit, static_argnums=3)
    package = jax.jit(lambda state, batch, key: recipe.step(state, batch, key, None), donate_argnums=0)
    lowered = {
        "forward": static(forward).lower(state.parameters, x, mean, shape.k),
        "gradient": static(jax.grad(forward, has_aux=True)).lower(state.parameters, x, mean, shape.k),
        "step": static(whole_step, donate_argnums=0).lower(state, x, mean, shape.k),
        "package step": package.lower(package_state, batch, key),
    }
    compiled: dict[str, Any] = {name: program.compile() for name, program in lowered.items()}
    memory = compiled["gradient"].memory_analysis()
    allowed = memory.output_size_in_bytes + CHUNK * shape.features * 4 + SPARE
    found = [
        Fact(
            "temporary memory of the gradient",
            memory.temp_size_in_bytes <= allowed,
            f"{_mb(memory.temp_size_in_bytes)} of {_mb(allowed)} = results + {CHUNK} M 4 + {_mb(SPARE)}",
        )
    ]
    for name, program in compiled.items():
        large = large_arrays(program.as_text(), shape)
        temp = program.memory_analysis().temp_size_in_bytes
        shown = ", ".join(large[:4]) or f"none (temporary memory {_mb(temp)})"
        found.append(Fact(f"arrays as large as N x M or N x k x d in the {name}", not large, shown))
    return found


def large_arrays(text: str, shape: Shape) -> list[str]:
    """The array types in a compiled program that are as large as N x M or N x k x d, whatever their axes.

    Where the shape is a small one, a weight matrix, a batch, or the pre-activations of a chunk may be that large.
    """
    limit = min(shape.tokens * shape.features, shape.tokens * shape.k * shape.width)
    limit = max(limit, CHUNK * shape.features + 1)
    fine = ({shape.features, shape.width}, {shape.tokens, shape.width})
    large = [array for array in arrays(text) if numbers_of(array) >= limit]
    return [array for array in large if {size for size in shape_of(array) if size > 1} not in fine]


def _batches(shape: Shape) -> list[Array]:
    return [jnp.asarray(batch) for batch in activations(shape)]


def _batch(x: Array) -> Any:
    return make_batch({"x": x}, jnp.ones(x.shape[0]), Sites("x", "x"))


def _recipe(shape: Shape) -> Any:
    method = SparseAutoencoder(features=shape.features, k=shape.k, auxk=0.0, learning_rate=LEARNING_RATE)
    return method.recipe(STEPS)


def _repeat(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Part:
    def once() -> dict[str, Any]:
        jax.block_until_ready(function(*arguments))
        return {}

    return once


def _carry(function: Callable[..., Any], state: Any, *arguments: Any) -> Part:
    """Like `_repeat`, the first argument donated and replaced by the result."""

    def once() -> dict[str, Any]:
        nonlocal state
        state = jax.block_until_ready(function(state, *arguments))
        return {}

    return once


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
