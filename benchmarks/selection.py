"""The selection of the k largest by rounds or in two stages beside `lax.top_k`, on a CPU.

    python -m benchmarks.selection [--repeats 9]

All give the same values and indices; what is printed is the time of what `xla.largest` chooses for a shape, as a
multiple of `lax.top_k`'s, in one interleaved run.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.timing import Sample, interleaved, ratio, seconds, timed
from jaxinterp.kernels.xla import largest

SHAPES = (
    (512, 4608, 32),
    (512, 12288, 32),
    (512, 24576, 32),
    (512, 24576, 64),
    (128, 131072, 64),
)  # tokens, features, k


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"{'tokens, features, k':>22}{'lax.top_k ms':>14}{'ours ms':>10}{'ours / top_k':>14}")
    for tokens, features, k in SHAPES:
        pre = jax.random.normal(jax.random.key(0), (tokens, features))
        plain = jax.jit(lambda pre, k=k: jax.lax.top_k(pre, k))
        ours = jax.jit(lambda pre, k=k: largest(pre, k))
        same = jax.tree.map(jnp.array_equal, tuple(plain(pre)), ours(pre))
        assert all(same), "the two selections differ"
        schedule = [("plain", _measure(plain, pre)), ("ours", _measure(ours, pre))]
        rounds = interleaved(schedule, repeats)
        shape = f"{tokens}, {features}, {k}"
        times = "".join(
            f"{seconds(rounds, name).median * 1e3:>{room}.1f}" for name, room in (("plain", 14), ("ours", 10))
        )
        print(f"{shape:>22}{times}{ratio(rounds, 'ours', 'plain').median:>14.2f}")
        time.sleep(0.1)


def _measure(function: Callable[[jax.Array], object], pre: jax.Array) -> Callable[[], Sample]:
    return lambda: timed(lambda: jax.block_until_ready(function(pre)))[0]


if __name__ == "__main__":
    main()
