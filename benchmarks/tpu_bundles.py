"""How many instructions the fused TPU encoder takes, beside the plain matmul of the same tiles; no TPU is needed.

    python -m benchmarks.tpu_bundles [--json FILE] [--chips v5e ...]

The TPU compiler writes down its schedule: one bundle is what a core issues in a cycle. Counted, for 8192 tokens, are

    plain    x W^T + b as bfloat16: bundles of a grid step x grid steps, with tiles of 256 tokens and as many
             features as the fused kernel's
    steady   the fused kernel's grid step (matmul, and the columns before absorbed into their buckets) x grid steps
    whole    steady + what happens once for 256 tokens: empty buckets, last columns, merging (a loop over groups of 8
             tokens) and k rounds of taking the greatest, each loop's bundles x its rounds

Waiting for memory is not in it. A block of code is one entry of the schedule; blocks of loops inside a grid step stand
at depth 2, in the order of the source: merging, then taking.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.compiled_for import ENVIRONMENT, SHAPES, TOKENS, TOPOLOGIES

LIMITS = {768: 1.3, 2304: 1.15, 4096: 1.15}  # steady / plain on v5e


class Block(NamedTuple):
    """A run of bundles without a branch into or out of it."""

    bundles: int
    depth: int


def main() -> int:
    """Compile in a process for every chip and shape, print, compare with the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=["v5e"])
    parser.add_argument("--here", nargs=4, metavar=("CHIP", "WIDTH", "FEATURES", "K"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        chip, *shape = arguments.here
        print(json.dumps(counted(chip, *map(int, shape))))
        return 0
    rows = [one(chip, shape) for chip in arguments.chips for shape in SHAPES]
    print(f"{'chip':5}{'d, M, k':>18}{'plain':>12}{'steady':>12}{'whole':>12}{'steady/plain':>14}{'whole/plain':>13}")
    for row in rows:
        shape = f"{row['width']}, {row['features']}, {row['k']}"
        numbers = "".join(f"{row[name]:>12,}" for name in ("plain", "steady", "whole"))
        ratios = f"{row['steady'] / row['plain']:>14.3f}{row['whole'] / row['plain']:>13.3f}"
        print(f"{row['chip']:5}{shape:>18}{numbers}{ratios}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    broken = [r for r in rows if r["chip"] == "v5e" and r["steady"] > LIMITS[r["width"]] * r["plain"]]
    return 1 if broken else 0


def one(chip: str, shape: tuple[int, int, int]) -> dict[str, int]:
    """The counts of a shape, from a process of its own: the compiler reads its flags once."""
    command = [sys.executable, "-m", "benchmarks.tpu_bundles", "--here", chip, *map(str, shape)]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true"
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags, "JAXINTERP_SCHEDULES": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{chip} {shape}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def counted(chip: str, width: int, features: int, k: int) -> dict[str, int]:
    """Compile both kernels for a few tiles and count; a grid step is the same however many there are."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental import topologies
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import SingleDeviceSharding

    from jaxinterp.kernels.pallas_tpu.encode import ROWS, STEP, VMEM, _fused, _product, encode_plan

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    plan = encode_plan(tokens=TOKENS, features=features, k=k, width=width)
    place = SingleDeviceSharding(device)

    def described(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    few = 2 * max(plan.features, 1024)
    arrays = described((plan.tokens, width), jnp.bfloat16), described((few, width), jnp.bfloat16)
    bias = described((few,), jnp.float32)

    def matmul(x, rows, bias, out) -> None:
        out[...] = (_product(x[...], rows[...]) + bias[...]).astype(jnp.bfloat16)

    def plain(x, rows, bias):
        return pl.pallas_call(
            matmul,
            grid=(x.shape[0] // STEP, few // plan.features),
            in_specs=[
                pl.BlockSpec((STEP, width), lambda i, j: (i, 0)),
                pl.BlockSpec((plan.features, width), lambda i, j: (j, 0)),
                pl.BlockSpec((1, plan.features), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((STEP, plan.features), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((x.shape[0], few), jnp.bfloat16),
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM),
            name="plain_matmul",
        )(x, rows, bias[None])

    jax.jit(plain).lower(*arrays, bias).compile()
    jax.jit(lambda x, rows, bias: _fused(x, rows, bias, k, plan, False)).lower(*arrays, bias).compile()
    steps = TOKENS // STEP * -(-features // plan.features)
    matmul_blocks, fused = blocks("plain_matmul"), blocks("encode_topk")
    step = max(block.bundles for block in fused if block.depth == 1)
    once = sum(block.bundles for block in fused if block.depth == 1) - step
    merging, taking = [block.bundles for block in fused if block.depth == 2 and block.bundles >= 32][:2]
    per_tokens = once + merging * (STEP // ROWS) + taking * k
    steady = step * steps
    return {
        "chip": chip,  # type: ignore[dict-item]
        "width": width,
        "features": features,
        "k": k,
        "plain": max(block.bundles for block in matmul_blocks) * steps,
        "steady": steady,
        "whole": steady + per_tokens * (TOKENS // STEP),
    }


def blocks(kernel: str) -> list[Block]:
    """The blocks of a kernel's schedule, as the compiler dumped it."""
    folder = Path(os.environ["JAXINTERP_SCHEDULES"])
    names = [path for path in folder.glob(f"*{kernel}*-final_bundles.txt") if "schedule-analysis" not in path.name]
    found: list[Block] = []
    ended = True
    for line in sorted(names)[-1].read_text().splitlines():
        match = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?:\s*((?:> ?)*)\{(.*)", line)
        if not match:
            continue
        mark, depth, body = match[1], match[2].count(">"), match[3]
        if ended or mark or depth != found[-1].depth:
            found.append(Block(0, depth))
        found[-1] = Block(found[-1].bundles + 1, depth)
        ended = "sbr.rel" in body
    return found


if __name__ == "__main__":
    sys.exit(main())
