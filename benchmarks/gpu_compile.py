"""Compile every GPU kernel and whole steps with the real CUDA compiler; no GPU is needed.

    CUDA_VISIBLE_DEVICES=-1 JAX_PLATFORMS=cpu python -m benchmarks.gpu_compile [--gpus a100 h100 h200]
        [--only encode ...] [--json FILE]

jax 0.12's CUDA plugin describes GPUs and compiles for them on any machine; nothing runs. A table says for every program
how long it compiled, its temporary memory on a device, its largest arrays and its collectives. The exit code is 1 where
a limit is broken: a program does not compile, holds an array as large as tokens x features or tokens x k x width, sorts
all features of a token, runs other kernels than those of its GPU (Mosaic from Hopper on, else Triton), or takes more
temporary memory than below. Autotuning needs a device and is off.

    encode fused      on Hopper: temporary memory <= 2,048 x features bytes (the candidates of so many tokens) + 16 MiB,
                      and no array of 512 tokens x features, which the plain encoder holds
    encode, passes    temporary memory <= 512 x features x 8 bytes (a chunk of pre-activations and places) + 64 MiB
    gradient          what it returns besides; on (data, feature) = (2, 4) at most a fifth of what plain autodiff of
                      `lax.top_k` and a gather takes there, compiled in the same run (the control: it must hold an array
                      of tokens x features, and sort all features), and for the larger shape at most a tenth of the
                      2,691 MB that it takes with float32 rows. What is left is one matrix's gradient before it is
                      summed over `data`
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled_for import mesh
from jaxinterp.kernels import encode_topk, sampled_dot, sparse_decode, sparse_outer
from jaxinterp.preflight.gpus import GPUS, UNTUNED, described
from jaxinterp.preflight.program_text import arrays, exchanges, numbers_of, shape_of, size_of, sorts

TOKENS = 8192
SMALL, LARGE = (768, 24576, 32), (2304, 65536, 64)  # width, features, k
SHARE = 1 / 5
"""Of the temporary memory of plain autodiff on a mesh that ours may take."""
MOST = {LARGE: 0.1 * 2691e6}
"""Bytes of temporary memory that the gradient on a mesh may take at most, by shape."""


KERNEL_CALLS = {"mosaic": "mosaic_gpu", "triton": "xla.gpu.triton"}
"""The name of the call to one of our kernels in a compiled program; XLA's own Triton fusions have another."""


class Program(NamedTuple):
    """What is compiled: a function, shapes with their places on a mesh, and the bytes that it may hold; None: any."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Any
    temporary: float | None
    sparse: bool = True
    kernels: bool = True
    hopper: bool = False
    """Only there."""


def loss(weights: dict[str, Any], x: Any, k: int, plain: bool = False) -> Any:
    """The squared error of a TopK dictionary, rows in bfloat16; plain: by `lax.top_k` and a gather."""
    encoder, decoder = (weights[name].astype(jnp.bfloat16) for name in ("encoder", "decoder"))
    if plain:
        values, indices = jax.lax.top_k(x @ encoder.T, k)
        y = jnp.einsum("nk,nkd->nd", jax.nn.relu(values), decoder[indices])
    else:
        values, indices = encode_topk(x, encoder, weights["bias"], k=k)
        y = sparse_decode(jax.nn.relu(values), indices, decoder)
    return jnp.mean(jnp.sum((y - x) ** 2, axis=-1))


def programs(devices: Any, width: int, features: int, k: int) -> list[Program]:
    """The passes and the gradient on one GPU; the gradient on eight, ours and plain."""
    one, eight = mesh(devices[:1], 1, 1), mesh(devices[:8], 2, 4)

    def array(shape: tuple[int, ...], dtype: Any, on: Any = one, spec: Any = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, spec or P()))

    def weights(on: Any, spec: Any) -> dict[str, Any]:
        matrix = array((features, width), jnp.float32, on, spec)
        return {"encoder": matrix, "decoder": matrix, "bias": array((features,), jnp.float32, on, spec)}

    x, rows = array((TOKENS, width), jnp.bfloat16), array((features, width), jnp.bfloat16)
    values, indices = array((TOKENS, k), jnp.float32), array((TOKENS, k), jnp.int32)
    bias = array((features,), jnp.float32)
    spare = 512 * features * 8 + 2**26
    fused = partial(encode_topk, k=k, implementation="mosaic_gpu_fused")
    gradient = 2 * features * width * 4
    spread = weights(eight, P("feature")), array((TOKENS, width), jnp.bfloat16, eight, P("data"))
    return [
        Program("encode", partial(encode_topk, k=k), (x, rows, bias), one, spare, kernels=False),
        Program("encode, 4 k", partial(encode_topk, k=4 * k), (x, rows, bias), one, spare, kernels=False),
        Program("encode fused", fused, (x, rows, bias), one, 2048 * features + 2**24, hopper=True),
        Program("gather_sum", sparse_decode, (values, indices, rows), one, spare),
        Program("sampled_dot", sampled_dot, (x, rows, indices), one, spare),
        Program("outer_sum", partial(sparse_outer, features=features), (values, indices, x), one, spare),
        Program("gradient", jax.grad(partial(loss, k=k)), (weights(one, P()), x), one, gradient + spare),
        Program("gradient data2 feature4", jax.grad(partial(loss, k=k)), spread, eight, MOST.get((width, features, k))),
        Program("plain data2 feature4", jax.grad(partial(loss, k=k, plain=True)), spread, eight, None, False, False),
    ]


def compiled(program: Program, width: int, features: int, k: int, kernel: str = "mosaic") -> dict[str, Any]:
    """Compile a program: its numbers, and the limits that it breaks."""
    wall = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            lowered = jax.jit(program.function).trace(*program.arguments).lower(lowering_platforms=("cuda",))
            done = lowered.compile(compiler_options=dict(UNTUNED))
    except Exception as error:  # any failure to compile is a finding
        words = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return {"name": program.name, "broken": [f"does not compile: {words}"]}
    text = done.as_text()
    temporary = int(done.memory_analysis().temp_size_in_bytes)
    shards = dict(program.mesh.shape)
    whole = min(TOKENS // shards["data"] * features // shards["feature"], TOKENS // shards["data"] * k * width)
    found = sorted(arrays(text), key=size_of, reverse=True)
    own = {(features // shards["feature"], width), (width, features // shards["feature"])}
    large = [one for one in found if numbers_of(one) >= whole and shape_of(one) not in own]
    broken = [f"holds {one}" for one in large] if program.sparse else []
    whole_sort = {features, features // shards["feature"]} & {axes[-1] for axes in sorts(text)}
    if program.sparse and whole_sort:
        broken.append(f"sorts all {max(whole_sort)} features of a token")
    if not program.sparse and not (large and whole_sort):
        broken.append("the control holds no array of tokens x features, or sorts none: the limits look for nothing")
    kernels = sorted(name for name in ("mosaic", "triton") if KERNEL_CALLS[name] in text)
    if program.kernels and kernels != [kernel]:
        broken.append(f"runs {' and '.join(kernels) or 'no'} kernels, not those of {kernel}")
    if program.hopper:
        chunk = [one for one in found if shape_of(one)[-2:] == (512, features)]
        broken += [f"holds the pre-activations of a chunk, {one}" for one in chunk]
    if program.temporary is not None and temporary > program.temporary:
        broken.append(f"{temporary / 2**20:.0f} MiB temporary, limit {program.temporary / 2**20:.0f}")
    return {
        "name": program.name,
        "seconds": time.perf_counter() - wall,
        "temporary": temporary,
        "largest": found[:2],
        "collectives": [(kind, size_of(" ".join(results))) for kind, results in exchanges(text)],
        "kernels": kernels,
        "broken": broken,
    }


def compare(results: list[dict[str, Any]]) -> None:
    """The gradient on a mesh takes at most `SHARE` of what plain autodiff takes there."""
    by_name = {result["name"]: result for result in results}
    if not {"gradient data2 feature4", "plain data2 feature4"} <= set(by_name):
        return
    ours, plain = by_name["gradient data2 feature4"], by_name["plain data2 feature4"]
    if "temporary" in ours and "temporary" in plain:
        share = ours["temporary"] / plain["temporary"]
        ours["share"] = share
        if share > SHARE:
            ours["broken"].append(f"{share:.0%} of plain autodiff's temporary memory, limit {SHARE:.0%}")


def row(result: dict[str, Any]) -> str:
    """One line of the table."""
    if "temporary" not in result:
        return f"{result['name']:26}{'; '.join(result['broken'])}"
    text = (
        f"{result['name']:26}{result['seconds']:6.1f}{result['temporary'] / 2**20:10.1f}  {' '.join(result['largest'])}"
    )
    text += "".join(f"; {kind} {count / 2**20:.1f} MiB" for kind, count in result["collectives"])
    text += f"; {', '.join(result['kernels'])}" if result["kernels"] else ""
    text += f"; {result['share']:.1%} of plain autodiff" if "share" in result else ""
    return text + "".join(f"; BROKEN: {limit}" for limit in result["broken"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", nargs="+", choices=list(GPUS), default=["a100", "h100", "h200"])
    parser.add_argument("--quick", action="store_true", help="only the smaller shape for all GPUs but the last")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the programs of these names")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    everything = []
    for gpu in arguments.gpus:
        devices, kernel = described(GPUS[gpu], 8, 1), "mosaic" if GPUS[gpu].capability >= (9, 0) else "triton"
        last = gpu == arguments.gpus[-1]
        for shape in [SMALL, LARGE] if last or not arguments.quick else [SMALL]:
            print(f"{gpu}, width, features, k = {shape}\n{'program':26}{'s':>6}{'temp MiB':>10}", flush=True)
            wanted = [
                program
                for program in programs(devices, *shape)
                if (kernel == "mosaic" or not program.hopper) and program.name in (arguments.only or [program.name])
            ]
            results = [compiled(program, *shape, kernel) for program in wanted]
            if shape == LARGE:
                compare(results)
            print("\n".join(map(row, results)), flush=True)
            everything += [{"gpu": gpu, "shape": list(shape), **result} for result in results]
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    broken = sum(len(result["broken"]) for result in everything)
    print(f"{len(everything)} programs, {broken} broken limits")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
