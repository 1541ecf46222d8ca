"""A sweep of eight runs in one program beside eight runs of their own: seconds of a training step, in turns.

    python -m benchmarks.sweep [--features 1152] [--batch-size 1024] [--repeats 7]

k = 16, 32, 48, 64 times two seeds, skip transcoders of blocks/1/mlp of SmolLM2-135M, random tokens. Compilation is not
counted. `fused` harvests and trains; `train only` is given the activations. Exit code 1 where the eight take less than
1.5 times as long as the sweep (fused).
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Sample, interleaved, ratio, seconds, timed
from jaxinterp.methods import Method, Seeds, SkipTranscoder, Together
from jaxinterp.models.load import load
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.program import Program

SITE, SEQ, STEPS, BUFFER = "blocks/1/mlp", 128, 1000, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=1152)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    subject = load("smollm2-135m")
    runs = {
        f"k={k}, seed={seed}": Seeds(SkipTranscoder(features=options.features, k=k, auxk=0.0), 1, first=seed)
        for k in (16, 32, 48, 64)
        for seed in (0, 1)
    }
    shape = options.batch_size // SEQ, SEQ
    text = {
        "tokens": np.random.default_rng(0).integers(0, subject.model.config.vocab_size, shape).astype(np.int32),
        "weight": np.ones(shape, np.float32),
        "document": np.zeros(shape, np.int32),
    }
    together = Together(runs)
    names = together.needs(SITE).names()
    found = program(together, text, {}).take.jitted(subject.model, text)
    for said, windows in (("fused", text), ("train only", text | dict(found.arrays))):
        sweep = stepper(together, subject.model, windows)
        singles = [stepper(method, subject.model, windows) for method in runs.values()]

        def in_turn(singles: list[Callable[[], None]] = singles) -> None:
            for single in singles:
                single()

        rounds = interleaved([("eight", sample_of(in_turn)), ("sweep", sample_of(sweep))], options.repeats, warmups=1)
        eight, one = seconds(rounds, "eight"), seconds(rounds, "sweep")
        times = ratio(rounds, "eight", "sweep")
        print(
            f"{said:11} eight runs {eight.median:.3f} s, the sweep {one.median:.3f} s: {times.median:.2f} times as "
            f"long ({times.least:.2f} to {times.greatest:.2f}); {len(names)} arrays of {options.batch_size} tokens",
            flush=True,
        )
        if said == "fused":
            enough = times.median >= 1.5
    return 0 if enough else 1


def program(method: Method, text: dict[str, Any], cached: dict[str, Any]) -> Program:
    rows = {name: (array.shape[1:], array.dtype) for name, array in cached.items()}
    batch = text["tokens"].size
    return Program(method.recipe(STEPS), method.needs(SITE), make_mesh(), batch, SEQ, BUFFER, seed=0, cached=rows)


def stepper(method: Method, model: Any, windows: dict[str, Any]) -> Callable[[], None]:
    """A function that takes one training step and waits for it."""
    cached = {name: array for name, array in windows.items() if name not in ("tokens", "weight", "document")}
    made = program(method, windows, cached)
    step, placed = made.jit_step(), jax.device_put(windows)
    with jax.set_mesh(made.mesh):
        held = [made.first_state(model, [placed] * BUFFER)]

    def one() -> None:
        with jax.set_mesh(made.mesh):
            held[0], metrics = step((model, placed), held[0])
            jax.block_until_ready((held[0].method, metrics))

    one()
    return one


def sample_of(function: Callable[[], None]) -> Callable[[], Sample]:
    return lambda: timed(function)[0]


if __name__ == "__main__":
    sys.exit(main())
