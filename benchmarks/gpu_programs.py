"""What `benchmarks.gpu` runs on the GPU: ceilings, checks, parts and steps, each in a worker of its own.

A part is called so often, without waiting in between, that one measurement takes `SPAN` seconds: the launch of the next
call is hidden behind the one before it. "calls" in its answer is how often.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.timing import timed
from benchmarks.topk_programs import Parameters, State, adam, start, tangent, unit_norm
from benchmarks.workers import Part, Shape, activations
from jaxinterp.kernels import dispatch, encode_topk, mosaic_gpu, pallas_gpu, runs, sparse_decode

SPAN = 0.02
CEILINGS = {"gpu": (8192, 2**30), "cpu": (256, 2**20)}  # size of the matmul, bytes of the copy
TOLERANCE = 1e-5  # of a float32 sum, of the greatest number; operands are what they are, bfloat16 or not

Ready = tuple[dict[str, Any], dict[str, Part]]


def platform() -> str:
    """`gpu` for CUDA only."""
    return "gpu" if jax.devices()[0].platform in ("gpu", "cuda") else jax.devices()[0].platform


def machine(shape: Shape, implementations: tuple[str, ...]) -> Ready:
    """What the machine is, the most it can do, and whether each implementation is right at a small shape."""
    about = {
        "platform": platform(),
        "device": jax.devices()[0].device_kind,
        "jax": version("jax"),
        "pallas_gpu": pallas_gpu.available(),
        "mosaic_gpu": mosaic_gpu.available(),
    }
    return about, {
        "ceilings": lambda: ceilings(*CEILINGS.get(about["platform"], CEILINGS["cpu"])),
        "checks": lambda: {"checks": [found for name in implementations for found in checks(name, shape)]},
    }


def ceilings(size: int, copied: int) -> dict[str, Any]:
    """Operations per second of a bfloat16 matmul, and bytes per second of a copy (read and written): best of five."""
    a = jnp.ones((size, size), jnp.bfloat16)
    numbers = jnp.ones(copied // 4, jnp.float32)
    matmul, copy = _repeat(jnp.matmul, (a, a)), _repeat(lambda numbers: numbers + 1, (numbers,))

    def best(part: Part) -> float:
        return min(sample.wall / said["calls"] for sample, said in (timed(part) for _ in range(5)))

    return {"operations": 2 * size**3 / best(matmul), "bytes": 2 * copied / best(copy)}


def checks(implementation: str, shape: Shape) -> list[dict[str, Any]]:
    """Every pass against float64 numpy, in float32 and bfloat16: the greatest error, in units of the greatest number.

    Some indices occur twice in a token, and some name no row.
    """
    random = np.random.default_rng(0)
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        g, rows = (jnp.asarray(random.standard_normal((n, shape.width)), dtype) for n in (shape.tokens, shape.features))
        bias, values = (
            jnp.asarray(random.standard_normal(size), jnp.float32) for size in (shape.features, (shape.tokens, shape.k))
        )
        indices = jnp.asarray(random.integers(0, shape.features + 1, values.shape), jnp.int32)
        wide_g, wide_rows, wide_values = (np.asarray(array).astype(np.float64) for array in (g, rows, values))
        padded = np.concatenate([wide_rows, np.zeros((1, shape.width))])[np.asarray(indices)]
        outer = np.zeros((shape.features + 1, shape.width))
        np.add.at(outer, np.asarray(indices), wide_values[:, :, None] * wide_g[:, None, :])
        pre = wide_g @ wide_rows.T + np.asarray(bias).astype(np.float64)
        passes: dict[str, tuple[tuple[Any, ...], np.ndarray]] = {
            "encode": ((g, rows, bias, shape.k), -np.sort(-pre, axis=1)[:, : shape.k]),
            "gather_sum": ((values, indices, rows), np.einsum("nk,nkd->nd", wide_values, padded)),
            "sampled_dot": ((g, rows, indices), np.einsum("nd,nkd->nk", wide_g, padded)),
            "outer_sum": ((values, indices, g, shape.features), outer[:-1]),
        }
        for name, (arguments, expected) in passes.items():
            try:
                got = run_pass(implementation, name, shape)(*arguments)
                error, reason = _error(name, got, expected, pre), ""
            except Exception as failure:  # the other passes are worth checking all the same
                error, reason = math.inf, _line(failure)
            label = f"{name} {implementation} {dtype.__name__}"
            found.append({"pass": label, "error": error, "holds": error <= TOLERANCE, "reason": reason})
    return found


def parts(shape: Shape, implementations: tuple[str, ...]) -> Ready:
    """Every pass by itself, and forward and backward together."""
    k = shape.k
    x = jnp.asarray(activations(shape)[0], jnp.bfloat16)
    parameters = jax.jit(start, static_argnums=2)(jax.random.key(0), jnp.zeros(shape.width), shape).parameters
    rows = parameters.decoder.astype(jnp.bfloat16)
    encode = jax.jit(lambda x, rows, bias: run_pass("xla", "encode", shape)(x, rows, bias, k))
    values, indices = encode(x, rows, parameters.encoder_bias)
    work: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "matmul": (lambda x, rows: x @ rows.T, (x, rows)),
        "encode": (encode, (x, rows, parameters.encoder_bias)),
        "outer_sum .at[].add": (partial(_plain_add, shape.features), (values, indices, x)),
        "order": (lambda indices: runs.order(indices, shape.features), (indices,)),
        "forward+backward dense": (_gradient(None, k), (parameters, x)),
    }
    for name in implementations:
        find = partial(_lazy, name, shape)
        work |= {
            f"gather_sum {name}": (find("gather_sum"), (values, indices, rows)),
            f"sampled_dot {name}": (find("sampled_dot"), (x, rows, indices)),
            f"outer_sum {name}": (find("outer_sum", shape.features), (values, indices, x)),
            f"forward+backward {name}": (_gradient(name, k), (parameters, x)),
        }
    ready, failed = _prepared({name: partial(_repeat, *arguments) for name, arguments in work.items()})
    return _about(ready, failed), ready


def step(shape: Shape, implementation: str | None) -> Ready:
    """The whole training step, and the matmul as a unit; None is dense autodiff."""
    x = jnp.asarray(activations(shape)[0], jnp.bfloat16)

    def begin() -> State:
        return jax.jit(start, static_argnums=2)(jax.random.key(0), jnp.zeros(shape.width), shape)

    def carried() -> Part:
        run = jax.jit(partial(whole_step, shape.k, implementation), donate_argnums=0)
        return _repeat(run, (begin(), x), carry=True)

    ready, failed = _prepared({"step": carried})
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # before the matmul has had its results
    rows = jax.random.normal(jax.random.key(1), (shape.features, shape.width), jnp.bfloat16)
    unit, no_unit = _prepared({"matmul": partial(_repeat, lambda x, rows: x @ rows.T, (x, rows))})
    return _about(ready | unit, failed | no_unit) | {"device_peak_bytes": peak}, ready | unit


def whole_step(k: int, implementation: str | None, state: State, x: Array) -> tuple[State, Array]:
    """Gradient, its part along the decoder's rows taken out, Adam, rows of length 1; what fired is not counted."""
    loss, gradient = jax.value_and_grad(partial(_loss, implementation, k))(state.parameters, x)
    gradient = gradient._replace(decoder=tangent(gradient.decoder, state.parameters.decoder))
    parameters, optimizer = adam(state.parameters, state.optimizer, gradient)
    return State(
        parameters._replace(decoder=unit_norm(parameters.decoder)), optimizer, state.since_fired + len(x)
    ), loss


def run_pass(implementation: str, name: str, shape: Shape) -> Callable[..., Any]:
    """One pass as dispatch finds it.

    Raises:
      UserError: the implementation cannot run here.
    """
    return dispatch.find(
        implementation, name, tokens=shape.tokens, features=shape.features, k=shape.k, width=shape.width
    )


def _loss(implementation: str | None, k: int, parameters: Parameters, x: Array) -> Array:
    """Squared error of a sparse autoencoder: float32 parameters, bfloat16 operands, float32 sums."""
    encoder, decoder = (rows.astype(jnp.bfloat16) for rows in (parameters.encoder, parameters.decoder))
    if implementation is None:
        pre = jnp.matmul(x, encoder.T, preferred_element_type=jnp.float32) + parameters.encoder_bias
        values, indices = jax.lax.top_k(pre, k)
        codes = (
            jnp.zeros(pre.shape, x.dtype)
            .at[jnp.arange(len(x))[:, None], indices]
            .set(jax.nn.relu(values).astype(x.dtype))
        )
        y = jnp.matmul(codes, decoder, preferred_element_type=jnp.float32)
    else:
        values, indices = encode_topk(x, encoder, parameters.encoder_bias, k=k, implementation=implementation)
        y = sparse_decode(jax.nn.relu(values), indices, decoder, implementation=implementation)
    return jnp.mean((x - y - parameters.decoder_bias) ** 2)


def _gradient(implementation: str | None, k: int) -> Callable[..., Any]:
    return jax.grad(partial(_loss, implementation, k))


def _plain_add(features: int, values: Array, indices: Array, g: Array) -> Array:
    entries = values[:, :, None] * g[:, None, :].astype(jnp.float32)
    return jnp.zeros((features, g.shape[1])).at[indices].add(entries)


def _lazy(implementation: str, shape: Shape, name: str, *static: int) -> Callable[..., Any]:
    """A pass that is looked up when it is traced, so that a refusal is that part's failure alone."""
    return lambda *arguments: run_pass(implementation, name, shape)(*arguments, *static)


def _prepared(makers: dict[str, Callable[[], Part]]) -> tuple[dict[str, Part], dict[str, str]]:
    """Every part compiled and run once, and why one is not there (refused, out of memory, not compiled)."""
    ready, failed = {}, {}
    for name, make in makers.items():
        try:
            ready[name] = make()
        except Exception as error:  # the others are worth measuring all the same
            failed[name] = _line(error)
    return ready, failed


def _about(ready: dict[str, Part], failed: dict[str, str]) -> dict[str, Any]:
    return {"parts": list(ready), "failed": failed}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _repeat(function: Callable[..., Any], arguments: tuple[Any, ...], carry: bool = False) -> Part:
    """Calls a jitted function; with `carry` the first argument is donated, and replaced by the first result."""
    run = jax.jit(function)
    first, *others = arguments

    def call() -> Any:
        nonlocal first
        result = run(first, *others)
        if carry:
            first = result[0]
        return result

    def several(calls: int) -> dict[str, Any]:
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return {"calls": calls}

    several(1)
    sample, _ = timed(lambda: several(1))
    return partial(several, min(200, max(1, math.ceil(SPAN / sample.wall))))


def _error(name: str, got: Any, expected: np.ndarray, pre: np.ndarray) -> float:
    """The greatest error in units of the greatest number; features chosen by `encode` must have the values it gives."""
    right = [expected]
    if name == "encode":
        got, chosen = got
        right.append(np.take_along_axis(pre, np.asarray(chosen), axis=1))
    wide = np.asarray(got).astype(np.float64)
    return max(float(np.abs(wide - array).max() / np.abs(array).max()) for array in right)
