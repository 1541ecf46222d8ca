"""The sparse top-k core on a CUDA GPU: every pass and the whole step, in units of what the machine can do.

    python -m benchmarks.gpu [--json FILE] [--peers PYTHON] [--shapes 8192,768,24576,32 ...] [--repeats 7]
                             [--minutes 10]
    python -m benchmarks.gpu --dry         the same on any machine, in tiny, to see it work

First the machine's own ceilings: F operations per second of a bfloat16 matmul, B bytes per second of a copy. Then every
implementation against float64 numpy at a small shape. Then, with N tokens, width d, M features, k active, e = 2 bytes:

    part             what                                                         no less than
    matmul           x E^T alone                                                  max(2 N d M / F, M d e / B)
    encode           matmul, bias and exact selection                             the same
    gather_sum       decode                                                       N k d e / B
    sampled_dot      gradient of the values                                       N k d e / B
    outer_sum        gradient of one dictionary, its sort of the indices with it  (N k d e + 4 M d) / B
    order            that sort alone
    forward+backward of a squared error, in both dictionaries                     matmul + gather + dot + 2 outer
    step             the same, Adam on float32 parameters and rows of length 1    the same + 60 M d / B

The floors assume that no row is found in a cache: a ratio under 1 says that some were. `outer_sum .at[].add` is the
plain scatter, `dense` is autodiff of codes as a dense [N, M] array, and `sparsify` is that library's own step and
Triton decoder (benchmarks/gpu_peer.py). Parts are measured in turns in one process, each step in a process of its own
(so that "peak" is its own: the allocator's greatest size), and each process times the matmul between the others.

Prints tables in Markdown; tokens/s are those of a step. What has not begun after `--minutes` is named and left out.
`--dry` takes a tiny shape and interprets the kernels: its numbers mean nothing. The exit code is 2 where there is no
CUDA GPU, 1 where an implementation is wrong.
"""

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.timing import Sample, interleaved, spread
from benchmarks.workers import Shape, Start, Worker, WorkerError, serve

SHAPES = tuple(Shape(8192, *of) for of in ((768, 24576, 32), (2304, 65536, 64), (4096, 131072, 64)))
SMALL = Shape(257, 576, 1021, 31)
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "pallas_gpu")
TINY = Shape(4, 24, 20, 3)
NEEDED = "python -m benchmarks.gpu needs a CUDA GPU and jax[cuda13], and JAX finds: {}. Run it on such a machine."


def floors(shape: Shape, operations: float, moved: float) -> dict[str, float]:
    """The least seconds of each part, from operations and bytes per second."""
    tokens, width, features, k = shape.tokens, shape.width, shape.features, shape.k
    matmul = max(2 * tokens * width * features / operations, 2 * features * width / moved)
    gather = 2 * tokens * k * width / moved
    outer = gather + 4 * features * width / moved
    both = matmul + 2 * gather + 2 * outer
    return {
        "matmul": matmul,
        "encode": matmul,
        "gather_sum": gather,
        "sampled_dot": gather,
        "outer_sum": outer,
        "forward+backward": both,
        "step": both + 60 * features * width / moved,
    }


def measure(worker: Worker, repeats: int) -> dict[str, list[float]]:
    """Everything that a worker has, in turns: by part, the seconds of one call in each round."""

    def of(part: str) -> Sample:
        sample = worker.run(part)
        return Sample(*(number / worker.last["calls"] for number in sample))

    rounds = interleaved([(part, partial(of, part)) for part in worker.about["parts"]], repeats)
    return {part: [found.samples[part][0].wall for found in rounds] for part in worker.about["parts"]}


def run(
    shape: Shape,
    repeats: int,
    peers: str | None,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    until: float = math.inf,
) -> dict[str, Any]:
    """What the JSON file says about one shape; what does not run is under "failures", with the reason.

    until: a time of `time.monotonic`, after which no process is started.
    """
    own = partial(_command, implementations)
    commands = {"parts": own("parts")}
    commands |= {f"step {name}": own(f"step {name}") for name in (*implementations, "dense")}
    if peers:
        commands["sparsify"] = [peers, "-m", "benchmarks.gpu_peer"]
    result: dict[str, Any] = {"shape": asdict(shape), "seconds": {}, "peak_bytes": {}, "failures": {}, "about": {}}
    for name, command in commands.items():  # one after the other: the largest do not fit beside each other
        try:
            if time.monotonic() > until:
                raise WorkerError("no time was left: give --minutes more, or fewer --shapes.")
            with _worker(name, command, shape) as worker:
                if name == "sparsify" and worker.about["device"] != "cuda":
                    raise WorkerError(f"its torch {worker.about['torch']} has no CUDA.")
                result["about"][name] = worker.about
                result["failures"] |= worker.about["failed"]
                result["seconds"][name] = measure(worker, repeats)
                result["peak_bytes"][name] = worker.about.get("device_peak_bytes")
        except (WorkerError, OSError) as error:
            result["failures"][name] = str(error)
    return result


def lines_of(result: Mapping[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """What a table has a line for: by label, its seconds and those of the matmul of the same process, by round."""
    lines = {}
    for worker, parts in result["seconds"].items():
        for part in parts if worker == "parts" else [part for part in parts if part != "matmul"]:
            label = {"parts": part, "sparsify": f"{part} sparsify"}.get(worker, worker)
            lines[label] = parts[part], parts.get("matmul", [])
    return lines


def table(result: Mapping[str, Any], operations: float, moved: float) -> str:
    """One shape in Markdown."""
    least, lines = floors(Shape(**result["shape"]), operations, moved), lines_of(result)
    titles = (
        "part",
        "ms",
        "least",
        "most",
        "/ roofline",
        "/ matmul",
        "dense / it",
        "sparsify / it",
        "peak MB",
        "tokens/s",
    )
    rows = [titles, ["---"] * len(titles)]
    for label, (found, matmul) in lines.items():
        wall, kind = spread(found), label.split()[0]
        times = spread(a / b for a, b in zip(found, matmul, strict=True)).median if matmul else None
        floor = wall.median / least[kind] if kind in least else None
        others = [lines.get(f"{kind} {other}") for other in ("dense", "sparsify")]
        against = [spread(other[0]).median / wall.median if other else None for other in others]
        peak = result["peak_bytes"].get("sparsify" if label == "step sparsify" else label)
        row = [label, *(f"{number * 1e3:.3f}" for number in wall), *map(_ratio, (floor, times, *against))]
        speed = f"{result['shape']['tokens'] / wall.median:,.0f}" if kind == "step" else ""
        rows.append([*row, f"{peak / 1e6:,.0f}" if peak else "", speed])
    failures = [f"Not measured: {name}: {reason}" for name, reason in result["failures"].items()]
    return "\n".join(
        [f"**{Shape(**result['shape'])}**", "", *(f"| {' | '.join(row)} |" for row in rows), "", *failures]
    )


def examine(worker: Worker) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The ceilings of the machine, and the checks."""
    worker.run("ceilings")
    ceilings = {name: worker.last[name] for name in ("operations", "bytes")}
    worker.run("checks")
    return ceilings, worker.last["checks"]


def machine_text(about: Mapping[str, Any], ceilings: Mapping[str, float], checks: Sequence[Mapping[str, Any]]) -> str:
    """The machine, its ceilings, and whether the passes are right."""
    lines = [
        f"{about['device']}, jax {about['jax']}: {ceilings['operations'] / 1e12:.0f} TFLOP/s in a bfloat16 matmul, "
        f"{ceilings['bytes'] / 1e12:.2f} TB/s in a copy.",
        "",
        "| pass | greatest error against float64 | |",
        "|---|---|---|",
        *(
            f"| {check['pass']} | {check['error']:.1e} | {'right' if check['holds'] else 'WRONG'} {check['reason']} |"
            for check in checks
        ),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 where there is no CUDA GPU, 1 where an implementation is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Times of the sparse core on a GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything measured")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has sparsify (see benchmarks/gpu_peer.py)")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="N,d,M,k")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--minutes", type=float, default=10.0, help="no process is started after these")
    parser.add_argument("--dry", action="store_true", help="a tiny shape and interpreted kernels, on any machine")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--implementations", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(lambda: _programs(options.worker, tuple(options.implementations)))
        return 0
    until = time.monotonic() + 60 * options.minutes
    if options.implementations is None:
        interpreted = ["xla", *(f"{name}:interpret" for name in IMPLEMENTATIONS[1:])]
        options.implementations = interpreted if options.dry else list(IMPLEMENTATIONS)
    if options.dry:
        options.shapes, options.repeats = (TINY,), 1
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 round must count.")
    if options.peers and not shutil.which(options.peers):
        parser.error(f"--peers {options.peers}: no such interpreter; see benchmarks/gpu_peer.py on how to make one.")
    with _worker("machine", _command(options.implementations, "machine"), TINY if options.dry else SMALL) as worker:
        about = worker.about
        if about["platform"] != "gpu" and not options.dry:
            print(NEEDED.format(about["device"]), file=sys.stderr)
            return 2
        ceilings, checks = examine(worker)
    print(machine_text(about, ceilings, checks), end="\n\n", flush=True)
    results = []
    for shape in options.shapes:
        results.append(run(shape, options.repeats, options.peers, options.implementations, until))
        print(table(results[-1], ceilings["operations"], ceilings["bytes"]), end="\n\n", flush=True)
        if options.json:
            system = {"system": platform.platform(), "python": platform.python_version()}
            found = {"machine": about | system, "ceilings": ceilings, "checks": checks, "results": results}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(check["holds"] for check in checks) else 1


def _worker(name: str, command: list[str], shape: Shape) -> Worker:
    return Worker(name, command, shape, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


def _command(implementations: Sequence[str], name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--worker", name, "--implementations", *implementations]


def _programs(name: str, implementations: tuple[str, ...]) -> Start:
    """Imported here, so that the parent holds nothing on the GPU."""
    from benchmarks import gpu_programs

    if name.startswith("step "):
        of = name.removeprefix("step ")
        return partial(gpu_programs.step, implementation=None if of == "dense" else of)
    return partial(
        {"machine": gpu_programs.machine, "parts": gpu_programs.parts}[name], implementations=implementations
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
