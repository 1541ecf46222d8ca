"""Preflight for eight H200s beside a count by hand: what a device holds, by kind; no GPU is needed.

    CUDA_VISIBLE_DEVICES=-1 JAX_PLATFORMS=cpu python -m benchmarks.gpu_memory [--json FILE]

Each run of `RUNS` is compiled for described devices and its memory printed beside `by_hand`. The exit code is 1 where a
run does not fit, or where a kind of more than `SMALL` of the whole, or the whole, is not within twice the count.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxinterp.methods import Transcoder
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.models.transformer import TransformerConfig
from jaxinterp.preflight.check import Setting, preflight
from jaxinterp.preflight.chips import Target, find
from jaxinterp.preflight.estimate import Estimate

TARGET = "h200:8"
WITHIN = 2.0
SMALL = 0.05
BUFFERED = 8  # batches that the shuffle buffer holds


@dataclass(frozen=True)
class Run:
    """A transcoder with AuxK on a model's MLP; mesh: sizes of data and feature."""

    model: str
    site: str
    features: int
    k: int
    batch: int
    mesh: tuple[int, int] = (2, 4)
    seq: int = 256


RUNS = (
    Run("smollm2-135m", "blocks/1/mlp", features=24576, k=32, batch=8192),
    Run("llama-3.1-8b", "blocks/16/mlp", features=131072, k=64, batch=131072),
)


def by_hand(config: TransformerConfig, run: Run, itemsize: int = 2) -> dict[str, float]:
    """Bytes of a device, by kind; itemsize: bytes of a number of the model and of its activations.

    model weights       every weight, on every device
    dictionary          two matrices [features, d] and two numbers a feature, float32, over `feature`
    optimizer           two moments of the same, over `feature` and `data`
    activation buffer   what the MLP reads and writes, of `BUFFERED` batches, over `data`
    temporary           the greater of two. Harvest, for a device's tokens: three arrays of the MLP's inner width, four
                        of d, and the scores of all heads in float32. Step: the gradients of both matrices in float32,
                        and both matrices rounded to `itemsize`
    """
    data, feature = run.mesh
    d, inner, tokens = config.d_model, config.d_mlp, run.batch // data
    attention = 2 * d * config.head_dim * (config.heads + config.kv_heads)
    block = attention + (3 if config.gated else 2) * d * inner + 2 * d
    weights = config.layers * block + d + (1 if config.tied else 2) * config.vocab_size * d
    dictionary = 4 * run.features * (2 * d + 2) / feature
    harvest = tokens * ((3 * inner + 4 * d) * itemsize + 4 * config.heads * run.seq)
    step = 2 * run.features * d / feature * (4 + itemsize)
    return {
        "model weights": itemsize * weights,
        "dictionary": dictionary,
        "optimizer": 2 * dictionary / data,
        "activation buffer": BUFFERED * tokens * 2 * d * itemsize,
        "temporary": max(harvest, step),
    }


def beyond(found: Mapping[str, float], counted: Mapping[str, float]) -> list[str]:
    """Kinds, and the whole, that are not within `WITHIN` times the count; kinds under `SMALL` of the whole may be."""
    whole = sum(found.values())
    pairs = {kind: (found.get(kind, 0.0), counted[kind]) for kind in counted if found.get(kind, 0.0) > SMALL * whole}
    pairs["all"] = whole, sum(counted.values())
    return [
        f"{kind}: {here / 2**30:.3f} GiB, by hand {hand / 2**30:.3f}"
        for kind, (here, hand) in pairs.items()
        if not hand / WITHIN <= here <= hand * WITHIN
    ]


def compiled(run: Run, target: Target, dtype: DTypeLike = jnp.bfloat16) -> Estimate:
    """The estimate of a run."""
    data, feature = run.mesh
    return preflight(
        Transcoder(features=run.features, k=run.k),
        lambda sharding: model_shapes(run.model, dtype=dtype, sharding=sharding),
        run.site,
        target,
        Setting({"data": data, "feature": feature, "model": 1}, run.batch),
        steps=100,
        seq=run.seq,
        buffer_batches=BUFFERED,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    target, everything, wrong = find(TARGET), [], 0
    for run in RUNS:
        started = time.perf_counter()
        estimate = compiled(run, target)
        found, counted = estimate.program.memory, by_hand(model_shapes(run.model).config, run)
        print(f"{run}\n{'GiB of a device':40}{'compiled':>10}{'by hand':>10}")
        for kind in found:
            print(f"  {kind:38}{found[kind] / 2**30:10.3f}{counted.get(kind, 0) / 2**30:10.3f}")
        reasons = [*beyond(found, counted), *([] if estimate.fits else ["it does not fit"])]
        wrong += len(reasons)
        whole, hand = sum(found.values()), sum(counted.values())
        print(f"  all: {whole / 2**30:.2f} GiB, {whole / hand:.2f} of the count; {time.perf_counter() - started:.0f} s")
        print("".join(f"  BROKEN: {reason}\n" for reason in reasons), flush=True)
        everything.append({"run": asdict(run), "compiled": dict(found), "by hand": counted, "broken": reasons})
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
