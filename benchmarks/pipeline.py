"""Whole training jobs on a CPU, beside other libraries and beside their own matmuls: text in, trained dictionary out.

    python -m benchmarks.pipeline [--peers PYTHON] [--json FILE] [--quick] [--rounds 3] [--layers 1 15]
                                  [--features 4608 24576] [--tokens 2048] [--dtype bfloat16] [--dry]

The subject is a random model of SmolLM2-135M's shape (30 layers, width 576, MLP 1536, 9 heads on 3 keys, 49,152 ids),
windows have 256 random tokens, a step 2,048 tokens; a TopK autoencoder of one MLP's output, k 32, Adam.

    jaxinterp   `training.fit` as a user calls it: input, forward pass up to the MLP, shuffle buffer, step, metrics, a
                row of numbers a turn; float32, the default on a CPU, or the subject model in bfloat16 by `--dtype`.
                AuxK as by default: idle while nothing is dead
    sparsify    its `Trainer.fit`: the whole model without a head in bfloat16, as its command loads SmolLM2's file;
                no shuffling. `--sparsify-dtype float32` for a machine whose bfloat16 is slow
    saelens     its `SAETrainer.fit`, fed by transformers' model up to the hooked MLP, float32; no shuffling
    harvest     our forward pass up to the MLP's output alone
    harvest matmuls, encoder, decoder
                the floors: projections and attention products of the layers that are needed, x E^T, and sum of k rows
    encode, d values, d rows, adam
                what a step needs beside them, each alone: x E^T with the selection of k, the gradients of the sum of
                rows in its values and in one of the two matrices, the update of all parameters

Trainers run in threads of processes of their own (benchmarks/pipeline_peers.py, pipeline_programs.py) and stand still
between turns; a turn is a few whole steps. Start and compilation do not count. All of a round is measured one after
the other, a ratio is that of one round, the table has medians over rounds. "CPU s / Mtok" are the seconds of all
threads for a million tokens: the guide on a machine with company. "MB" is the greatest resident size of a process.

With the peers, the steps alone are measured as well: ours of given activations beside sparsify's (benchmarks/topk.py).

A ratio that is missed is said to be forbidden where parts alone, at no cost of anything else, would miss it too: the
floors for the peers, the floors and what a step needs beside them for the whole job.
Times decide no exit code.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.pipeline_job import Job
from benchmarks.timing import Round, Spread, interleaved, load, spread
from benchmarks.topk import machine
from benchmarks.workers import Shape, Worker, WorkerError

FLOORS = ("harvest matmuls", "encoder", "decoder")
NEEDS = ("harvest matmuls", "encode", "decoder", "d values", "d rows", "d rows", "adam")
"""What a step cannot do without, each alone: the gradients of two matrices, of the encoder and of the decoder."""

SUMS = {"floors": FLOORS, "needs": NEEDS}
PARTS = ("harvest", *dict.fromkeys((*FLOORS, *NEEDS)))
NEEDED = {"sparsify": 3.0, "saelens": 2.0}
"""How many times a peer's tokens per CPU second ours should be."""

WHOLE, HARVEST, STEP = 1.25, 1.2, 0.5
"""What the whole job over its floors, the harvest over its matmuls, the step over sparsify's should be at most."""


def run(job: Job, shape: Shape, rounds: int, peers: str | None, sparsify_dtype: str = "bfloat16") -> dict[str, Any]:
    """One setting: rounds, seconds for a token, memory, what failed."""
    with ExitStack() as stack:
        failures: list[str] = []
        started: list[Worker] = []

        def start(name: str, command: list[str]) -> None:
            try:
                started.append(stack.enter_context(Worker(name, command, shape, {"JAX_PLATFORMS": "cpu"})))
            except (WorkerError, OSError) as error:
                failures.append(str(error))

        ours = [sys.executable, "-m", "benchmarks.pipeline_programs"]
        start("jaxinterp", [*ours, "fit", job.text()])
        for name in NEEDED if peers else ():
            theirs = replace(job, dtype=sparsify_dtype if name == "sparsify" else "float32")
            start(name, [str(peers), "-m", "benchmarks.pipeline_peers", name, theirs.text()])
        start("floors", [*ours, "floors", job.text()])
        tokens: dict[str, int] = {}

        def measure(worker: Worker, part: str, name: str) -> tuple[str, Callable[[], Any]]:
            def once() -> Any:
                sample = worker.run(part)
                tokens[name] = worker.last["tokens"]
                return sample

            return name, once

        schedule = [measure(worker, "job", worker.name) for worker in started if worker.name != "floors"]
        schedule += [measure(worker, part, part) for worker in started if worker.name == "floors" for part in PARTS]
        before = load()
        found = interleaved(schedule, rounds, warmups=1)
        return {
            "job": asdict(job),
            "shape": asdict(shape),
            "load": [before, load()],
            "tokens": tokens,
            "versions": {worker.name: worker.about["version"] for worker in started},
            "dtypes": {worker.name: worker.about["dtype"] for worker in started if "dtype" in worker.about},
            "memory_mb": {worker.name: worker.last["peak_mb"] for worker in started if worker.name != "floors"},
            "failures": failures,
            "rounds": [each._asdict() for each in found],
        }


def steps_alone(shape: Shape, rounds: int, peers: str) -> dict[str, Any]:
    """Our package's step and sparsify's, of given activations: CPU and wall ratios of each round."""
    own = [sys.executable, "-m", "benchmarks.topk", "--worker", "package step"]
    with ExitStack() as stack:
        try:
            ours = stack.enter_context(Worker("package step", own, shape, {"JAX_PLATFORMS": "cpu"}))
            other = stack.enter_context(Worker("sparsify", [peers, "-m", "benchmarks.peers", "sparsify"], shape))
        except (WorkerError, OSError) as error:
            return {"features": shape.features, "failures": [str(error)], "rounds": []}
        schedule = [("jaxinterp", lambda: ours.run("step")), ("sparsify", lambda: other.run("step"))]
        found = interleaved(schedule, 2 * rounds + 1, warmups=2)
        return {"features": shape.features, "failures": [], "rounds": [each._asdict() for each in found]}


def per_token(found: Round, name: str, tokens: Mapping[str, int], clock: str = "cpu") -> float:
    """Seconds for one token in one round; of "floors" and "needs" the sum of their parts."""
    if name in SUMS:
        return sum(per_token(found, part, tokens, clock) for part in SUMS[name])
    return found.middle(name, clock) / tokens[name]


def quotient(result: Mapping[str, Any], name: str, unit: str, clock: str = "cpu") -> Spread:
    """How many times the seconds of `unit` a token costs, round by round."""
    tokens, rounds = result["tokens"], [Round(**found) for found in result["rounds"]]
    return spread(per_token(found, name, tokens, clock) / per_token(found, unit, tokens, clock) for found in rounds)


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """What holds in one setting, by CPU seconds, and whether the floors forbid what does not."""
    lines = []
    for peer in (peer for peer in NEEDED if peer in result["tokens"]):
        times, room = quotient(result, peer, "jaxinterp"), quotient(result, peer, "floors")
        wall = quotient(result, peer, "jaxinterp", "wall")
        held = _held(times.median >= NEEDED[peer], room.median < NEEDED[peer])
        lines.append(
            f"{held}: {_shown(times)} times {peer}'s tokens per CPU second ({wall.median:.2f} by wall), "
            f"{NEEDED[peer]:g} wanted; floors alone: {room.median:.2f}"
        )
    whole, harvest = quotient(result, "jaxinterp", "floors"), quotient(result, "harvest", "harvest matmuls")
    needs = quotient(result, "needs", "floors")
    held = _held(whole.median <= WHOLE, needs.median > WHOLE)
    lines.append(
        f"{held}: whole job {_shown(whole)} of its floors, {WHOLE} wanted; its parts alone: {needs.median:.2f}"
    )
    layers = result["job"]["layer"] + 1
    of = f"harvest of {layers} layers {_shown(harvest)} of its matmuls"
    lines.append(f"{_held(harvest.median <= HARVEST)}: {of}, {HARVEST} wanted")
    return lines


def _held(holds: bool, forbidden: bool = False) -> str:
    return "holds" if holds else "MISSED, forbidden by its parts alone" if forbidden else "MISSED"


def _shown(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.greatest:.2f})"


def table(result: Mapping[str, Any]) -> str:
    """One setting as text."""
    job, tokens, rounds = Job(**result["job"]), result["tokens"], [Round(**found) for found in result["rounds"]]
    shape, (before, after) = Shape(**result["shape"]), result["load"]
    company = spread(found.company for found in rounds)
    lines = [
        f"layer {job.layer}, {shape}; median of {len(rounds)} rounds of {job.steps} steps; load {before:.1f} to "
        f"{after:.1f}, others kept {company.median:.2f} cores busy",
        "",
        "| | tokens/s | CPU s / Mtok | wall s / Mtok | of the floors, CPU | MB |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*tokens, *SUMS):
        cpu = spread(per_token(found, name, tokens) for found in rounds).median
        wall = spread(per_token(found, name, tokens, "wall") for found in rounds).median
        memory = result["memory_mb"].get(name)
        label = {"floors": "sum of the floors", "needs": "floors, and what a step needs besides"}.get(name, name)
        if name in result["dtypes"]:
            label = f"{name} {result['versions'][name]}, {result['dtypes'][name]}"
        shown = "" if memory is None else f"{memory:,.0f}"
        over = quotient(result, name, "floors").median
        lines.append(f"| {label} | {1 / wall:,.0f} | {cpu * 1e6:,.0f} | {wall * 1e6:,.0f} | {over:.2f} | {shown} |")
    lines += ["", *verdicts(result), *(f"not measured: {failure}" for failure in result["failures"])]
    return "\n".join(lines)


def steps_text(found: Mapping[str, Any]) -> str:
    """The steps alone as one line."""
    if not found["rounds"]:
        return f"step alone, {found['features']:,} features: not measured: {'; '.join(found['failures'])}"
    rounds = [Round(**each) for each in found["rounds"]]
    cpu, wall = (spread(_step_ratio(each, clock) for each in rounds) for clock in ("cpu", "wall"))
    return (
        f"{_held(cpu.median <= STEP)}: step alone at {found['features']:,} features: {_shown(cpu)} of sparsify's CPU "
        f"seconds, {_shown(wall)} of its wall, {STEP} wanted"
    )


def _step_ratio(found: Round, clock: str) -> float:
    return found.middle("jaxinterp", clock) / found.middle("sparsify", clock)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if none of our jobs could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description="Whole training jobs on a CPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the peers (see benchmarks/peers.py)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 15])
    parser.add_argument("--features", type=int, nargs="+", default=[4608, 24576])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--quick", action="store_true", help="layer 1, 4,608 features, two rounds")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="our subject model's")
    parser.add_argument("--sparsify-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dry", action="store_true", help="a tiny model, one round: goes through everything")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1 round must count.")
    if options.peers and not shutil.which(options.peers):
        parser.error(f"--peers {options.peers}: no such interpreter; see benchmarks/peers.py on how to make one.")
    peers = os.path.abspath(shutil.which(options.peers) or "") if options.peers else None
    base, k = Job(0), 32
    if options.dry:
        base = Job(0, seq=16, width=32, layers=3, d_mlp=48, heads=4, kv_heads=2, vocab=96)
        options.layers, options.features, options.tokens, options.rounds, k = [1], [64], 64, 1, 4
    elif options.quick:
        options.layers, options.features, options.rounds = [1], [4608], 2
    if any(not 0 <= layer < base.layers for layer in options.layers):
        parser.error(f"--layers {options.layers}: must be from 0 to {base.layers - 1}.")
    if options.tokens < base.seq or options.tokens % base.seq:
        parser.error(f"--tokens {options.tokens} must be a multiple of {base.seq}.")
    everything: dict[str, Any] = {"machine": machine(), "results": [], "steps": []}
    print(", ".join(f"{name} {value}" for name, value in everything["machine"].items()), end="\n\n")

    def keep() -> None:
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1) + "\n")

    for features in options.features:
        shape = Shape(options.tokens, base.width, features, k)
        for layer in options.layers:
            job = replace(base, layer=layer, steps=3 if layer < 4 else 1, dtype=options.dtype)
            result = run(job, shape, options.rounds, peers, options.sparsify_dtype)
            everything["results"].append(result)
            print(table(result), end="\n\n", flush=True)
            keep()
        if peers:
            everything["steps"].append(steps_alone(shape, options.rounds, peers))
            print(steps_text(everything["steps"][-1]), end="\n\n", flush=True)
            keep()
    return 0 if all("jaxinterp" in result["tokens"] for result in everything["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
