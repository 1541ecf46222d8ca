"""The sparse top-k core on a CPU: every part and the whole training step, in units of the encoder matmul.

    python -m benchmarks.topk [--json FILE] [--peers PYTHON] [--shapes N,d,M,k ...] [--repeats 7] [--patience 0]

With x [N, d], encoder E and decoder D [M, d], all float32:

    floor            x E^T, the encoder matmul alone (it writes [N, M] numbers; `encode` does not, and can be under it)
    encode           v, i = top-k of x E^T + b
    decode           y = sum_j relu(v)_j D[i_j]
    d values         gradient of `decode` in v
    d rows           gradient of `decode` in D; that of `encode` in E is the same work
    forward          encode, decode, squared error
    gradient         the same, and its gradient in E, b and D
    adam             Adam on E, b, D and the decoder's bias, gradients given
    tangent          what would only lengthen a row of D, taken out of its gradient
    unit norm        rows of D made unit vectors
    step             gradient, tangent, Adam, unit norm, tokens since each feature fired: what sparsify's trainer does
    package step     the step of `methods.SparseAutoencoder`, as `training.fit` runs it, with its metrics
    dense gradient   `gradient` by autodiff of codes as a dense [N, M] array

All of a round is measured one after the other, ours and the peers' whole steps in turns (benchmarks/peers.py says what
they are and how to install them), each in a process of its own; a ratio is that of one round, and the table has the
median over rounds. "cpu" are the seconds of all threads: the better guide on a machine with company, where --patience
gives every round some seconds to take disturbed samples again. "had it our matmul" is the ratio if the peer's matmuls
took as long as the floor: PyTorch's library is slow on some makes of CPU ("torch matmul" is its floor). "MB" is the
greatest resident size of a process that does nothing but this step, libraries included; "+MB" is what came on top of
importing them. "fvu" shows that a step learns; warm-ups and starts differ, so do not compare it.

Facts of the compiled programs are checked, and decide the exit code: what the gradient needs beside its arguments and
results, and that no array as large as N x M or N x k x d stands in the forward pass, the gradient or the step.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.timing import Round, Spread, interleaved, load, ratio, seconds, spread
from benchmarks.workers import Shape, Start, Worker, WorkerError, serve

SHAPES = (Shape(4096, 768, 12288, 32), Shape(4096, 768, 24576, 32))
PARTS = (
    "floor", "encode", "decode", "d values", "d rows", "forward", "gradient", "adam", "tangent", "unit norm",
    "dense gradient",
)  # fmt: skip
PEERS = {"sparsify": 1, "dictionary_learning": 6, "saelens": 6}
"""Libraries, and how many matmuls of the encoder's size a step of theirs has (counted with torch.profiler)."""


def run(shape: Shape, repeats: int, peers: str | None = None, patience: float = 0.0) -> dict[str, Any]:
    """Facts, rounds and memory of one shape, as the JSON file has them."""
    with ExitStack() as stack:

        def worker(name: str, command: list[str]) -> Worker:
            return stack.enter_context(Worker(name, command, shape, {"JAX_PLATFORMS": "cpu"}))

        def own(name: str) -> Worker:
            return worker(name, [sys.executable, "-m", "benchmarks.topk", "--worker", name])

        before = load()
        parts, step, package = own("parts"), own("step"), own("package step")
        failures: list[str] = []
        others: list[Worker] = []
        for name in (*PEERS, "torch") if peers else ():
            try:
                others.append(worker(name, [str(peers), "-m", "benchmarks.peers", name]))
            except (WorkerError, OSError) as error:
                failures.append(str(error))

        def measure(worker: Worker, part: str = "step") -> Callable[[], Any]:
            return lambda: worker.run(part)

        schedule = [(part, measure(parts, part)) for part in PARTS]
        for other in others:
            schedule += [("step", measure(step)), (other.name, measure(other))]
        schedule += [("step", measure(step)), ("package step", measure(package))]
        rounds = interleaved(schedule, repeats, warmups=1, patience=patience)
        alone = {worker.name: worker for worker in (step, package, *others) if worker.name != "torch"}
        return {
            "shape": asdict(shape),
            "load": [before, load()],
            "facts": parts.ask({"do": "run", "part": "facts"})["facts"],
            "popularity": step.about["popularity"],
            "versions": {worker.name: worker.about["version"] for worker in (step, *others)},
            "memory_mb": {
                name: {"peak": worker.last["peak_mb"], "idle": worker.about["idle_mb"]}
                for name, worker in alone.items()
            },
            "fvu": {name: [worker.last["steps"], worker.last["fvu"]] for name, worker in alone.items()},
            "failures": failures,
            "rounds": [found._asdict() for found in rounds],
        }


def table(result: Mapping[str, Any]) -> str:
    """One shape as text."""
    rounds = [Round(**found) for found in result["rounds"]]
    names = list(dict.fromkeys(name for found in rounds for name in found.samples))
    names.sort(key=lambda name: name in result["memory_mb"] or name == "torch")
    before, after = result["load"]
    company = spread(found.company for found in rounds)
    lines = [
        f"{Shape(**result['shape'])}, float32; median of {len(rounds)} rounds; load {before:.1f} to {after:.1f}, "
        f"others kept {company.median:.2f} cores busy ({company.least:.2f} to {company.greatest:.2f})",
        f"{'':20}{'wall ms':>8}{'least':>7}{'most':>7}{'cpu ms':>8}{'x floor':>9}{'cpu x':>7}"
        f"{'step/it':>9}{'package/it':>12}{'MB':>7}{'+MB':>7}{'fvu':>7}",
    ]
    for name in names:
        wall, cpu = seconds(rounds, name), seconds(rounds, name, "cpu")
        line = f"{_label(name, result):20}{wall.median * 1e3:8.0f}{wall.least * 1e3:7.0f}{wall.greatest * 1e3:7.0f}"
        line += f"{cpu.median * 1e3:8.0f}{ratio(rounds, name, 'floor').median:9.2f}"
        line += f"{ratio(rounds, name, 'floor', 'cpu').median:7.2f}"
        peer = name in PEERS
        line += f"{ratio(rounds, 'step', name).median:9.2f}" if peer else " " * 9
        line += f"{ratio(rounds, 'package step', name).median:12.2f}" if peer else " " * 12
        if name in result["memory_mb"]:
            memory = result["memory_mb"][name]
            line += f"{memory['peak']:7.0f}{memory['peak'] - memory['idle']:7.0f}{result['fvu'][name][1]:7.3f}"
        lines.append(line)
    for name in (name for name in names if name in PEERS):
        for ours in ("step", "package step"):
            wall, cpu = ratio(rounds, ours, name), ratio(rounds, ours, name, "cpu")
            line = f"{ours} / {name}: wall {_shown(wall)}, cpu {_shown(cpu)}"
            if "torch" in names:
                line += f"; had it our matmul: wall {_shown(_with_our_matmul(rounds, ours, name))}"
                line += f", cpu {_shown(_with_our_matmul(rounds, ours, name, 'cpu'))}"
            lines.append(line)
    lines += [f"not measured: {failure}" for failure in result["failures"]]
    lines += [f"{'holds ' if fact['holds'] else 'BROKEN'} {fact['name']}: {fact['found']}" for fact in result["facts"]]
    share = result["popularity"]
    lines.append(
        f"data: the first batch chooses the most popular feature for {share['greatest']:.1%} of the tokens, the most "
        f"popular tenth of the features in {share['tenth']:.0%} of the places, {share['never']:.0%} of them never"
    )
    return "\n".join(lines)


def _shown(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.greatest:.2f})"


def _with_our_matmul(rounds: list[Round], ours: str, peer: str, clock: str = "wall") -> Spread:
    """The ratio if the peer's matmuls took as long as the floor."""

    def one(found: Round) -> float:
        slower = found.middle("torch", clock) - found.middle("floor", clock)
        return found.middle(ours, clock) / (found.middle(peer, clock) - PEERS[peer] * slower)

    return spread(map(one, rounds))


def _label(name: str, result: Mapping[str, Any]) -> str:
    short = {"dictionary_learning": "dict_learning", "torch": "torch matmul"}.get(name, name)
    return f"{short} {result['versions'][name]}" if name in PEERS else short


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a fact does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.topk", description="Times of the sparse top-k core.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has the peers (see benchmarks/peers.py)")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="N,d,M,k")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        help="seconds a round may spend on repeating samples that other processes disturbed",
    )
    parser.add_argument("--worker", choices=("parts", "step", "package step"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(lambda: _programs(options.worker))
        return 0
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 round must count.")
    if options.peers and not shutil.which(options.peers):
        parser.error(f"--peers {options.peers}: no such interpreter; see benchmarks/peers.py on how to make one.")
    peers = os.path.abspath(shutil.which(options.peers) or "") if options.peers else None
    results = []
    print(", ".join(f"{name} {value}" for name, value in machine().items()), end="\n\n")
    for shape in options.shapes:
        results.append(run(shape, options.repeats, peers, options.patience))
        print(table(results[-1]), end="\n\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return exit_code(results)


def exit_code(results: list[dict[str, Any]]) -> int:
    """1 where a fact is broken, else 0. Times do not count."""
    return 0 if all(fact["holds"] for result in results for fact in result["facts"]) else 1


def machine() -> dict[str, Any]:
    """The processor and the interpreter."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        family = next(line.partition(":")[2].strip() for line in lines if line.startswith("cpu family"))
        processor = f"{processor} (family {family})"
    except (OSError, StopIteration):
        processor = platform.processor()
    return {"processor": processor, "cores": os.cpu_count(), "Python": platform.python_version()}


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _programs(which: str) -> Start:
    """Imported here, so that the parent, which has no work to do, stays small."""
    from benchmarks import topk_programs

    return {"parts": topk_programs.parts, "step": topk_programs.step, "package step": topk_programs.package_step}[which]


if __name__ == "__main__":
    sys.exit(main())
