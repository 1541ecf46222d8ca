"""Generation with a key/value cache against one compiled program without, padded to the full length: time per token.

    python -m benchmarks.generate --model smollm2-135m --tokens 64

Both are one program (a `lax.while_loop`), greedy, same prompt, same run; each is compiled first; then they take turns
`--repeats` times and the medians count. The two must write the same tokens.

Beside wall-clock time it gives CPU time, which other processes on the machine disturb less, and the *floor*: the time
to multiply one vector with every matrix of the model once, which no decoder with a batch of one can pass below.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxinterp.models.generate import generate
from jaxinterp.models.load import load

PROMPT = "The river rises in the hills above the town and runs for about forty miles before it reaches the sea."


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median wall-clock and CPU seconds of each, taking turns, after a first call that compiles."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start, busy = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    return {
        name: {
            "wall": statistics.median(wall for wall, _ in found),
            "cpu": statistics.median(cpu for _, cpu in found),
        }
        for name, found in seconds.items()
    }


def floor(model: Any) -> Callable[[], Array]:
    """One vector times every matrix of the model: what reading the weights costs."""
    matrices = [leaf for leaf in jax.tree.leaves(model) if getattr(leaf, "ndim", 0) == 2]

    @jax.jit
    def once(matrices: list[Array], vectors: list[Array]) -> list[Array]:
        return [matrix @ vector for matrix, vector in zip(matrices, vectors, strict=True)]

    vectors = [jnp.ones(matrix.shape[1], matrix.dtype) for matrix in matrices]
    return lambda: once(matrices, vectors)  # type: ignore[return-value]


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    subject = load(given.model)
    write = {
        name: lambda cache=cache: generate(subject, PROMPT, max_tokens=given.tokens, cache=cache).tokens
        for name, cache in (("cached", True), ("anew", False))
    }
    same = write["cached"]() == write["anew"]()
    count = len(write["cached"]()[0])
    found = interleaved({**write, "floor": floor(subject.model)}, given.repeats)
    per_token = {
        f"{name}_{clock}_ms": round(1000 * seconds / (1 if name == "floor" else count), 1)
        for name, clocks in found.items()
        for clock, seconds in clocks.items()
    }
    faster = {
        f"times_faster_{clock}": round(found["anew"][clock] / found["cached"][clock], 2) for clock in ("wall", "cpu")
    }
    print(json.dumps({"model": given.model, "tokens": count, **per_token, **faster, "same": same}))


if __name__ == "__main__":
    main()
