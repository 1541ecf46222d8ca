"""Compile every TPU kernel and the whole training step with the real TPU compiler; no TPU is needed.

    python -m benchmarks.tpu_compile [--json FILE] [--chips v5e v5p v6e] [--quick]

libtpu describes the chips of a topology and compiles for them on any machine; nothing runs. A table says for every
program how long it compiled, the temporary memory of a chip, its largest arrays and its collectives. The exit code is 1
where a limit is broken: a program does not compile, takes a minute, holds an array as large as tokens x features or
tokens x k x width, or more temporary memory than below; the step sorts twice; chips exchange more than candidates.

    encode            temporary memory <= 5 % of tokens x features x 4 bytes
    gradient, passes  temporary memory <= outputs + 512 x features x 4 bytes + 64 MiB; block_sparse, the product with a
                      fifth of the 128 x 128 blocks of width x 4 width, likewise
    encode on a mesh  collectives: tokens x k x shards x 8 bytes for the tokens of a data shard, and nothing else
    encode on v5e     bundles of a grid step against the plain matmul's: `benchmarks.tpu_bundles`; not in --quick

Inputs and rows are bfloat16, parameters, gradients and Adam's moments float32. A step whose state does not fit one chip
is spread over the feature axis of the topology's four, and the table says so. Every chip has a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tpu_bundles
from benchmarks.compiled_for import ENVIRONMENT, SHAPES, TOKENS, TOPOLOGIES, mesh
from jaxinterp.preflight.program_text import arrays, exchanges, numbers_of, shape_of, size_of, sorts

MEMORY = {"v5e": 16, "v5p": 95, "v6e": 32}  # GiB of a chip
ODD = ((576, 24576, 32), (640, 24576, 32), (1152, 24576, 30), (1600, 24576, 33))  # registers that are not full
ODD_PASSES = ["gather_sum", "sampled_dot"]
SECONDS = 60


class Program(NamedTuple):
    """What is compiled: a function, its arguments with their places on a mesh, and the bytes it may hold."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Any
    temporary: float | None
    options: dict[str, Any]
    exchanged: int = 0
    sorts: int | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument(
        "--quick", action="store_true", help="only v5e, the smallest shape and widths that are no multiple of 512"
    )
    parser.add_argument("--only", nargs="+", help="only programs of these names")
    parser.add_argument("--here", choices=TOPOLOGIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = SHAPES[:1] if arguments.quick else SHAPES
    if arguments.here:
        for shape in shapes:
            compile_all(arguments.here, *shape, only=arguments.only)
        passes = [name for name in arguments.only or ODD_PASSES if name in ODD_PASSES]
        for shape in ODD:
            compile_all(arguments.here, *shape, only=passes, limited=False)  # rows may be copied to be padded
        return 0
    results = []
    for chip in ["v5e"] if arguments.quick else arguments.chips:
        results += in_process(chip, arguments.quick, arguments.only)
    if not (arguments.quick or arguments.only):
        results += bundles(arguments.chips)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    broken = [(result, limit) for result in results for limit in result["broken"]]
    for result, limit in broken:
        print(f"BROKEN {result['chip']} {result['shape']} {result['name']}: {limit}")
    print(f"{len(results)} programs, {len(broken)} broken limits")
    return 1 if broken or not results else 0


def in_process(chip: str, quick: bool, only: list[str] | None) -> list[dict[str, Any]]:
    """The results of one chip, printed as they come."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--here", chip]
    command += ["--quick"] * quick + (["--only", *only] if only else [])
    results = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                results.append(json.loads(line))
                print(row(results[-1], first=len(results) == 1), flush=True)
    if process.returncode:
        why = [f"the process of {chip} ended with code {process.returncode}"]
        results.append({"chip": chip, "shape": [], "name": "all", "broken": why})
    return results


def bundles(chips: list[str]) -> list[dict[str, Any]]:
    """The scheduled bundles of the fused encoder, as a multiple of those of the plain matmul of the same tiles."""
    results = []
    for chip in chips:
        for shape in SHAPES:
            counts = tpu_bundles.one(chip, shape)
            ratio, limit = counts["steady"] / counts["plain"], tpu_bundles.LIMITS[shape[0]]
            over = [f"{ratio:.3f} x the bundles, limit {limit}"] if chip == "v5e" and ratio > limit else []
            results.append({**counts, "shape": list(shape), "name": "encode's bundles", "broken": over})
            print(
                f"{chip:5}{', '.join(map(str, shape)):>19}  encode's bundles: {ratio:.3f} x the plain matmul's",
                flush=True,
            )
    return results


def row(result: dict[str, Any], first: bool) -> str:
    title = (
        f"{'chip':5}{'width, features, k':>19}  {'program':22}{'s':>6}{'cpu s':>7}{'temp MiB':>10}{'% NM4':>8}  notes"
    )
    shape = ", ".join(map(str, result["shape"]))
    text = f"{result['chip']:5}{shape:>19}  {result['name']:22}{result['seconds']:6.1f}{result['cpu_seconds']:7.1f}"
    if "temporary" in result:
        share = 100 * result["temporary"] / result["tokens_features_bytes"]
        text += f"{result['temporary'] / 2**20:10.1f}{share:8.2f}  largest {' '.join(result['largest'])}"
        text += "".join(f"; {name} {count / 2**20:.1f} MiB" for name, count in result["collectives"])
        text += f"; {result['sorts']} sorts" if result["sorts"] else ""
    text += "".join(f"; BROKEN: {limit}" for limit in result["broken"])
    return f"{title}\n{text}" if first else text


def compile_all(chip: str, width: int, features: int, k: int, only: list[str] | None, limited: bool = True) -> None:
    """Compile all programs of one shape for one chip, and print a line of JSON for each; `limited`: in their memory."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    for program in programs(chip, devices, width, features, k):
        if only is None or program.name.split(" ")[0] in only:
            result = {"chip": chip, "shape": [width, features, k], "tokens": TOKENS, "name": program.name}
            program = program if limited else program._replace(temporary=None)
            print(json.dumps(result | compiled(program, width, features, k)), flush=True)


def programs(chip: str, devices: Any, width: int, features: int, k: int) -> list[Program]:
    """The passes, the gradient, the step, and the encoder on a mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from jaxinterp.kernels import encode_topk, sampled_dot, sparse_decode, sparse_outer
    from jaxinterp.kernels.pallas_tpu.block_sparse import block_sparse_product

    one, four = mesh(devices[:1], 1, 1), mesh(devices[:4], 2, 2)

    def array(shape: tuple[int, ...], dtype: Any, on: Any = one, spec: Any = None) -> Any:
        sharding = jax.sharding.NamedSharding(on, spec or P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x, rows = array((TOKENS, width), jnp.bfloat16), array((features, width), jnp.bfloat16)
    values, indices = array((TOKENS, k), jnp.float32), array((TOKENS, k), jnp.int32)
    bias = array((features,), jnp.float32)
    ours: dict[str, Any] = {"implementation": "pallas_tpu"}
    encode, outer = partial(encode_topk, k=k, **ours), partial(sparse_outer, features=features, **ours)
    small = TOKENS * features * 4 * 0.05
    spare = 512 * features * 4 + 2**26
    wide = [
        array((TOKENS, width), jnp.bfloat16, four, P("data")),
        array((features, width), jnp.bfloat16, four, P("feature")),
    ]
    wide.append(array((features,), jnp.float32, four, P("feature")))
    exchanged = TOKENS // 2 * k * 2 * 8
    stored = width // 128 * (4 * width // 128) // 5  # a fifth of the blocks of W_up
    blocks, places = array((stored, 128, 128), jnp.bfloat16), array((stored,), jnp.int32)
    found = [
        Program("encode", encode, (x, rows, bias), one, small, {}),
        Program("gather_sum", partial(sparse_decode, **ours), (values, indices, rows), one, spare, {}),
        Program("sampled_dot", partial(sampled_dot, **ours), (x, rows, indices), one, spare, {}),
        Program("outer_sum", outer, (values, indices, x), one, spare, {}, sorts=1),
        Program(
            "block_sparse", partial(block_sparse_product, d_out=4 * width), (x, blocks, places, places), one, spare, {}
        ),
        Program("encode data2 feature2", encode, tuple(wide), four, small / 4 + 3 * exchanged, {}, exchanged),
    ]
    state_bytes = 2 * features * width * 4 * 4  # parameters, two moments and the gradient of two matrices
    shards = 1 if state_bytes * 1.3 < MEMORY[chip] * 2**30 else 4
    here = one if shards == 1 else mesh(devices[:4], 1, 4)
    placed = partial(array, on=here)
    weights = {name: placed((features, width), jnp.float32, spec=P("feature")) for name in ("encoder", "decoder")}
    weights |= {"encoder_bias": placed((features,), jnp.float32, spec=P("feature"))}
    weights |= {"decoder_bias": placed((width,), jnp.float32)}
    state = (weights, weights, placed((), jnp.int32))
    suffix = "" if shards == 1 else f" feature{shards}"
    batch = placed((TOKENS, width), jnp.bfloat16)
    gradient = jax.grad(partial(loss, k=k))
    outputs = state_bytes / 4 / shards
    placing = jax.tree.map(lambda leaf: leaf.sharding, (weights, state))
    return [
        *found,
        Program(f"gradient{suffix}", gradient, (weights, batch), here, outputs + spare, {}, sorts=1),
        Program(
            f"step{suffix}",
            partial(step, k=k),
            (weights, state, batch),
            here,
            None,
            {"donate_argnums": (0, 1), "out_shardings": placing},
            sorts=1,
        ),
    ]


def loss(weights: dict[str, Any], x: Any, k: int) -> Any:
    """The squared error of a TopK dictionary, rows in bfloat16."""
    import jax
    import jax.numpy as jnp

    from jaxinterp.kernels import encode_topk, sparse_decode

    encoder, decoder = (weights[name].astype(jnp.bfloat16) for name in ("encoder", "decoder"))
    values, indices = encode_topk(x, encoder, weights["encoder_bias"], k=k, implementation="pallas_tpu")
    y = sparse_decode(jax.nn.relu(values), indices, decoder, implementation="pallas_tpu") + weights["decoder_bias"]
    return jnp.mean(jnp.sum((y - x) ** 2, axis=-1))


def step(weights: dict[str, Any], state: tuple[Any, Any, Any], x: Any, k: int) -> tuple[Any, Any]:
    """Forward, backward, Adam, decoder rows of unit norm."""
    import jax
    import jax.numpy as jnp

    gradient = jax.grad(loss)(weights, x, k)
    means, squares, count = state
    count = count + 1
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradient)
    squares = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, squares, gradient)
    rate = 1e-3 * jnp.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    weights = jax.tree.map(lambda w, m, s: w - rate * m / (jnp.sqrt(s) + 1e-8), weights, means, squares)
    norms = jnp.linalg.norm(weights["decoder"], axis=1, keepdims=True)
    return {**weights, "decoder": weights["decoder"] / norms}, (means, squares, count)


def compiled(program: Program, width: int, features: int, k: int) -> dict[str, Any]:
    """Compile a program: its numbers, and the limits that it breaks."""
    import jax

    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with jax.set_mesh(program.mesh):
            lowered = jax.jit(program.function, **program.options).trace(*program.arguments)
            done = lowered.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # whatever the compiler says is the result
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        return {**seconds(wall, cpu), "broken": [failure]}
    times = seconds(wall, cpu)
    text, temporary = done.as_text(), done.memory_analysis().temp_size_in_bytes
    found = sorted(arrays(text), key=lambda array: -numbers_of(array))
    data, feature = program.mesh.devices.shape
    whole = min(TOKENS * features // (data * feature), TOKENS // data * k * width)
    exchanged = [(kind, size_of(" ".join(results))) for kind, results in exchanges(text)]
    total = sum(count for _, count in exchanged)
    entries = TOKENS // data * k  # the redone tokens of `encode` sort less
    sorted_whole = sum(len(axes) == 1 and axes[0] >= entries for axes in sorts(text))
    rows = lambda axes: len(axes) == 2 and axes[0] == features // feature and axes[1] <= width + 128  # of a matrix
    broken = [f"holds {one}" for one in found if numbers_of(one) >= whole and not rows(shape_of(one))]
    if min(times.values()) > SECONDS:  # the clock's time counts where the machine has nothing else to do
        broken.append(f"compiled for {times['seconds']:.0f} s")
    if program.temporary is not None and temporary > program.temporary:
        broken.append(f"{temporary / 2**20:.0f} MiB temporary, limit {program.temporary / 2**20:.0f}")
    if program.exchanged and total != program.exchanged:
        broken.append(f"{total} bytes cross chips, not {program.exchanged}")
    if program.sorts is not None and sorted_whole != program.sorts:
        broken.append(f"{sorted_whole} sorts, not {program.sorts}")
    return {
        **times,
        "temporary": temporary,
        "tokens_features_bytes": TOKENS * features * 4,
        "largest": found[:3],
        "collectives": exchanged,
        "sorts": sorted_whole,
        "broken": broken,
    }


def seconds(wall: float, cpu: float) -> dict[str, float]:
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


if __name__ == "__main__":
    sys.exit(main())
