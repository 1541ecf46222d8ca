"""Mutated files against every reader: only UserErrors, no code, no allocation beyond the file's size and 64 MB.

    python -m benchmarks.fuzz                        100,000 files, with what was refused, read, and the largest memory
    python -m benchmarks.fuzz --files 2000 --seed 7

A file of every format is written, then changed: bytes flipped, dropped, doubled, cut off; numbers replaced by huge
ones; in JSON and YAML values replaced by others. An audit hook looks for what running code would need (processes,
sockets, unpickling, exec); tracemalloc measures each read. `--files 200` is part of the tests.
"""

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from jaxinterp.core.errors import UserError
from jaxinterp.interchange.gemma_scope_2 import read_gemma_scope_2_clt
from jaxinterp.interchange.readers import READERS, WHOLE, locate
from jaxinterp.interchange.releases import directory, place
from jaxinterp.interchange.samples import FEATURES, D, draw, save_torch, write_sample
from jaxinterp.models.files.gguf_file import open_gguf
from jaxinterp.models.files.safetensors_file import open_directory

HERE = Path(__file__).parents[1]
SPARE = 64 * 2**20
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.", "pickle.find_class", "exec")
"""Beginnings of audit events that reading a file has no use for."""

ENTRIES = (
    *("gemma-scope-2b-pt-mlp-canonical", "gemma-scope-2-1b-pt-transcoders", "gpt2-small-res-jb", "mistral-7b-res-wg"),
    *("gpt2-small-mlp-out-v5-32k", "gemma-2-2b-res-matryoshka-dc", "llama_scope_lxm_8x", "llama_scope_r1_distill"),
    *("sae_bench_pythia70m_sweep_topk_ctx128_0730", "sae_bench_pythia70m_sweep_gated_ctx128_0730"),
    *("saebench_gemma-2-2b_width-2pow12_date-0108", "mwhanna-qwen3-4b-transcoders", "gpt2-small-hook-z-kk"),
    *("qwen-scope-3-8b-base-w64k-l50", "goodfire-llama-3.1-8b-instruct", "mntss-gemma-2-2b-2.5m-clt-as-per-layer"),
)
"""Releases whose first entry is a seed."""

NUMBERS = (-1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**64 - 1)
VALUES = (None, True, False, -1, 0, 2**70, 0.5, float("inf"), "", "x", "relu", [], {}, [[]], "a" * 3000, {"k": None})


@dataclass(frozen=True)
class Seed:
    """One valid file or folder: where it is, what may be changed, and what reads it."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Any]


def seeds(root: Path) -> list[Seed]:
    """A valid one of every reader, and of the files of models."""
    found = []
    for name in ENTRIES:
        release = directory()[name]
        entry = next(iter(release.entries.values()))
        where, kind = locate(write_sample(release, entry, root / name), place(release, entry).format)
        files = tuple(sorted(path for path in (root / name).rglob("*") if path.is_file()))
        found.append(Seed(name, files, lambda kind=kind, where=where: READERS[kind].read(where)))  # type: ignore[misc]
    return [*found, *_others(root)]


def _others(root: Path) -> Iterator[Seed]:
    """What the directory has none of."""
    arrays = {"encoder.weight": draw(FEATURES, D), "encoder.bias": draw(FEATURES), "W_dec": draw(FEATURES, D)}
    folder = root / "sparsify" / "layers.1.mlp"
    folder.mkdir(parents=True)
    save_file({**arrays, "b_dec": draw(D)}, folder / "sae.safetensors")
    said = {"d_in": D, "num_latents": FEATURES, "k": 4, "activation": "groupmax", "transcode": True}
    (folder / "cfg.json").write_text(json.dumps(said))
    yield Seed("sparsify", tuple(folder.iterdir()), lambda: READERS["sparsify"].read(folder))
    openai = root / "openai" / "autoencoder.pt"
    openai.parent.mkdir()
    parts = {"encoder.weight": draw(FEATURES, D), "decoder.weight": draw(D, FEATURES), "pre_bias": draw(D)}
    save_torch(openai, {**parts, "latent_bias": draw(FEATURES)})
    yield Seed("openai", (openai,), lambda: READERS["openai"].read(openai))
    clt = root / "gemma_scope_2_clt"
    clt.mkdir()
    for layer in range(2):
        held = {"w_enc": draw(D, FEATURES), "w_dec": draw(FEATURES, 2, D), "b_enc": draw(FEATURES), "b_dec": draw(D)}
        held["w_dec"][:, :layer] = 0
        save_file({**held, "threshold": abs(draw(FEATURES))}, clt / f"params_layer_{layer}.safetensors")
    yield Seed("gemma_scope_2_clt", tuple(clt.iterdir()), lambda: read_gemma_scope_2_clt(clt))
    tracer = root / "circuit_tracer_clt"
    tracer.mkdir()
    for layer in range(2):
        held = {f"W_enc_{layer}": draw(FEATURES, D), f"b_enc_{layer}": draw(FEATURES), f"b_dec_{layer}": draw(D)}
        save_file(held, tracer / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": draw(FEATURES, 2 - layer, D)}, tracer / f"W_dec_{layer}.safetensors")
    (tracer / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n")
    yield Seed("circuit_tracer_clt", tuple(tracer.iterdir()), lambda: WHOLE["circuit_tracer_clt"](tracer))
    model = root / "model"
    model.mkdir()
    save_file({"a": draw(4, 8), "b": draw(8)}, model / "model.safetensors")
    yield Seed("safetensors", (model / "model.safetensors",), lambda: _read_all(open_directory(model)))
    path = root / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("a", gguf.quantize(draw(4, 32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield Seed("gguf", (path,), lambda: _read_all(open_gguf(path)[1]))


def _read_all(tensors: Any) -> None:
    for tensor in tensors.values():
        if tensor.refusal is None and tensor.shape:
            tensor.read(slice(None), None)


def mutated(data: bytes, name: str, rng: np.random.Generator) -> bytes:
    """The file with one to three changes."""
    for _ in range(int(rng.integers(1, 4))):
        if name.endswith((".json", ".yaml")) and rng.random() < 0.6:
            data = _other_value(data, rng)
        else:
            data = _other_bytes(data, rng)
    return data


def _other_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed; in the first kilobyte, where headers are, more often."""
    found = bytearray(data or b"\0")
    most = min(len(found), 1024) if rng.random() < 0.6 else len(found)
    at, length = int(rng.integers(most)), int(rng.integers(1, 20))
    match rng.integers(6):
        case 0:
            found[at] = int(rng.integers(256))
        case 1:
            del found[at : at + length]
        case 2:
            found[at:at] = found[at : at + length]
        case 3:
            del found[at:]
        case 4:
            found[at : at + 8] = (NUMBERS[rng.integers(len(NUMBERS))] % 2**64).to_bytes(8, "little")
        case _:
            found[at : at + length] = bytes(rng.integers(0, 256, length).astype(np.uint8))
    return bytes(found)


def _other_value(data: bytes, rng: np.random.Generator) -> bytes:
    """A value of a configuration replaced, dropped or added."""
    try:
        found = json.loads(data)
    except ValueError:
        return _other_bytes(data, rng)
    if not isinstance(found, dict) or not found:
        return _other_bytes(data, rng)
    inner = [found, *(value for value in found.values() if isinstance(value, dict) and value)]
    chosen = inner[rng.integers(len(inner))]
    key = list(chosen)[rng.integers(len(chosen))]
    match rng.integers(4):
        case 0:
            del chosen[key]
        case 1:
            chosen["unheard_of"] = VALUES[rng.integers(len(VALUES))]
        case _:
            chosen[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(found).encode()


def _filename(arguments: tuple[Any, ...]) -> str:
    """Where a code object comes from: a module that is imported late lies in an installation."""
    return str(getattr(arguments[0], "co_filename", "")) if arguments else ""


@contextmanager
def watched(forbidden: tuple[str, ...] = FORBIDDEN) -> Iterator[list[str]]:
    """The forbidden audit events within the block."""
    seen: list[str] = []
    on = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        imports = event == "exec" and _filename(arguments).startswith((sys.prefix, sys.base_prefix, str(HERE)))
        if on[0] and event.startswith(forbidden) and not imports:
            seen.append(event)

    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        on[0] = False


@dataclass
class Report:
    """What came out: how many were read and refused by seed, what went wrong, and the largest memory beyond a file."""

    read: Counter[str]
    refused: Counter[str]
    failures: list[str]
    largest: int = 0


def fuzz(files: int, seed: int = 0, forbidden: tuple[str, ...] = FORBIDDEN) -> Report:
    """Read so many mutated files.

    Args:
      forbidden: beginnings of audit events that fail.
    """
    report, rng = Report(Counter(), Counter(), []), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place_of_all:
        every = seeds(Path(place_of_all))
        for each in every:
            each.read()  # what it imports is imported before anybody watches
        whole = {path: path.read_bytes() for each in every for path in each.files}
        tracemalloc.start()
        with watched(forbidden) as seen:
            for number in range(files):
                each = every[number % len(every)]
                path = each.files[rng.integers(len(each.files))]
                data = mutated(whole[path], path.name, rng)
                path.write_bytes(data)
                size = sum(other.stat().st_size for other in each.files)
                _one(each, size, report, f"{each.name}, {path.name}, number {number} of seed {seed}")
                path.write_bytes(whole[path])
                if seen:
                    report.failures.append(f"{each.name}, {path.name}, number {number}: audit events {seen[:3]}")
                    seen.clear()
        tracemalloc.stop()
    return report


def _one(each: Seed, size: int, report: Report, where: str) -> None:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        each.read()
        report.read[each.name] += 1
    except UserError as error:
        report.refused[each.name] += 1
        if "\n" in str(error):
            report.failures.append(f"{where}: a message of several lines")
    except Exception as error:  # the fault that is looked for
        report.failures.append(f"{where}: {type(error).__name__}: {error}"[:300])
    beyond = tracemalloc.get_traced_memory()[1] - before - size
    report.largest = max(report.largest, beyond)
    if beyond > SPARE:
        report.failures.append(f"{where}: {beyond:,} bytes beyond the file's size")


def main() -> int:
    """Print the report; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.process_time()
    report = fuzz(arguments.files, arguments.seed)
    for name in sorted({*report.read, *report.refused}):
        print(f"{name}: {report.read[name]:,} read, {report.refused[name]:,} refused")
    print("\n".join(report.failures[:50]))
    print(
        f"{arguments.files:,} files, {report.refused.total():,} refused, {len(report.failures)} failures, at most "
        f"{report.largest / 2**20:.1f} MB beyond a file's size, {time.process_time() - began:.0f} CPU seconds"
    )
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
