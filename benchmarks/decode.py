"""Does leaving neurons out save time when one token is decoded? A gated MLP whole, and with k neurons read, in turns.

    python -m benchmarks.decode --d-model 1024 --d-mlp 4096

The dense MLP and the gathered one (`models/gathered.py`) take turns in one run; a ratio is dense / gathered, the median
over rounds with the least and the greatest. The break-even is the share left out at which the ratio is 1, by a line
through the two nearest measured shares. The answers are compared with the masked MLP first.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Sample, interleaved, load, ratio, seconds, timed
from jaxinterp.models.gathered import gathered
from jaxinterp.models.layers import random_linear
from jaxinterp.models.mlp import MLP


def runner(leaf: Any, x: jax.Array, calls: int) -> Callable[[], Sample]:
    """Measures `calls` calls of the leaf, each on what the one before returned: as layers follow each other."""
    arrays, static = eqx.partition(leaf, eqx.is_array)

    @jax.jit
    def run(arrays: Any, x: jax.Array) -> jax.Array:
        whole = eqx.combine(arrays, static)
        return jax.lax.fori_loop(0, calls, lambda _, y: x + 1e-3 * whole(y), x)

    return lambda: timed(lambda: jax.block_until_ready(run(arrays, x)))[0]


def break_even(shares: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The share at which the ratio is 1, linear between measured ones; None where it is not reached."""
    points = list(zip([0.0, *shares], [ratios[0] if ratios[0] < 1 else 0.0, *ratios], strict=True))
    for (low, below), (high, above) in pairwise(points):
        if below < 1 <= above:
            return low + (high - low) * (1 - below) / (above - below)
    return None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-mlp", type=int, default=4096)
    parser.add_argument("--left-out", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.7, 0.9])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    keys = jax.random.split(jax.random.key(0), 4)
    d, m = given.d_model, given.d_mlp
    mlp = MLP(
        random_linear(keys[0], d, m, False),
        random_linear(keys[1], d, m, False),
        random_linear(keys[2], m, d, False),
        "silu",
    )
    x = jax.random.normal(keys[3], (1, 1, d))
    schedule = [("dense", runner(mlp, x, given.calls))]
    for block in given.blocks:
        for share in given.left_out:
            leaf = gathered(mlp, round(m * (1 - share) / block) * block, block=block)
            pair = leaf(jnp.concatenate([x, x], axis=1))[:, :1]
            np.testing.assert_allclose(leaf(x), pair, atol=1e-4)
            schedule.append((f"{block}/{share:g}", runner(leaf, x, given.calls)))
    rounds = interleaved(schedule, given.rounds, patience=1.0)
    result: dict[str, Any] = {"d_model": d, "d_mlp": m, "load": load()}
    result["dense ms"] = 1000 * seconds(rounds, "dense").median / given.calls
    for block in given.blocks:
        speeds = []
        for share in given.left_out:
            found = ratio(rounds, "dense", f"{block}/{share:g}")
            speeds.append(found.median)
            print(
                f"blocks of {block:3d}, {share:4.0%} left out: {found.median:.2f} x "
                f"[{found.least:.2f}, {found.greatest:.2f}]"
            )
        even = break_even(given.left_out, speeds)
        print(f"blocks of {block}: break-even at {'none' if even is None else f'{even:.0%}'} left out")
        result[f"blocks of {block}"] = {
            "ratio": dict(zip(map(str, given.left_out), speeds, strict=True)),
            "break-even": even,
        }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
