"""Is preflight's estimate honest where it can be checked, and does a step's traffic stay the same on more chips?

    python -m benchmarks.preflight --here                  on 8 virtual CPU devices: estimated and measured step
    python -m benchmarks.preflight --scaling               v5p, feature=4, data=4 to 128, the same tokens on every chip
    python -m benchmarks.preflight --remat v5e:2x2         temporary memory with and without remat (cpu:1 too)

`--here` trains with the very program that preflight compiled. The memory of a shared machine is faster in one minute
than in the next: peaks are measured anew before every step, and the ratio is the median of all repeats; exit code 1
where it is more than 2 or less than 1/2. `--scaling` needs the TPU compiler (pip install 'jaxinterp[tpu]') and no TPU;
a chip's operand bytes must stay within 10 % of those at data=4, an all-gather counted by what it gathers. (By what each
chip puts in, it shrinks as chips are added.) `--remat` compiles a step with the model in its loss, ten layers of width
64, and needs the TPU compiler for a TPU; exit code 1 where remat takes more.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

DEVICES = 8
SCALES = {4: "4x2x2", 16: "4x4x4", 32: "4x4x8", 64: "4x8x8", 128: "4x8x16"}
TOKENS = 4096  # a chip of `data`


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--remat", metavar="TARGET", default="")
    parser.add_argument("--data", type=int, nargs="+", choices=list(SCALES), default=[4, 16, 128])
    parser.add_argument("--features", type=int, default=32_768)
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES} {os.environ.get('XLA_FLAGS', '')}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not (options.here or options.scaling or options.remat):
        parser.error("say --here, --scaling or --remat")
    codes = [
        here() if options.here else 0,
        scaling(options.data, options.features) if options.scaling else 0,
        remat(options.remat) if options.remat else 0,
    ]
    return max(codes)


def here() -> int:
    """Estimated and measured seconds of a step, for three meshes and two sizes."""
    print(f"{'model, features, mesh, tokens':52}{'estimate ms':>12}{'measured ms':>12}{'ratio':>7}  bound by")
    worst = 1.0
    for model, features, k, batch in (("tiny", 512, 16, 4096), ("smollm2-135m", 4608, 32, 4096)):
        for mesh in ({"data": 8, "feature": 1}, {"data": 2, "feature": 4}, {"data": 1, "feature": 8}):
            pairs, bound = both(model, features, k, batch, mesh | {"model": 1})
            estimate, measured = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(guess / seconds for guess, seconds in pairs)
            worst = max(worst, ratio, 1 / ratio)
            what = f"{model}, {features}, data={mesh['data']},feature={mesh['feature']}, {batch}"
            print(f"{what:52}{estimate * 1e3:>12.1f}{measured * 1e3:>12.1f}{ratio:>7.2f}  {bound}", flush=True)
    return 1 if worst > 2 else 0


def both(model: str, features: int, k: int, batch: int, mesh: dict[str, int]) -> tuple[list[tuple[float, float]], str]:
    """Estimated and measured seconds of steps of the same program on the same devices, and what bounds them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinterp.methods import SkipTranscoder
    from jaxinterp.models.files.shapes import model_shapes
    from jaxinterp.models.load import load
    from jaxinterp.preflight.check import Setting, preflight
    from jaxinterp.preflight.chips import find
    from jaxinterp.preflight.estimate import measured
    from jaxinterp.training.mesh import make_mesh, over_data, place_model
    from jaxinterp.training.program import Program

    seq, site = 128, "blocks/1/mlp"
    method = SkipTranscoder(features=features, k=k, auxk=0.0)
    shapes = lambda sharding: model_shapes(model, dtype=jnp.float32, sharding=sharding)
    estimate = preflight(
        method, shapes, site, find(f"cpu:{DEVICES}"), Setting(mesh, batch), steps=100, seq=seq, buffer_batches=2
    )
    devices = make_mesh(**mesh)
    subject = load(model)
    placed = place_model(subject.model, devices)
    program = Program(method.recipe(100), method.needs(site), devices, batch, seq, 2, seed=0)
    step = program.jit_step()
    vocabulary = subject.model.config.vocab_size
    generator = np.random.default_rng(0)

    def windows() -> dict[str, Any]:
        shape = batch // seq, seq
        text = {
            "tokens": generator.integers(0, vocabulary, shape).astype(np.int32),
            "weight": np.ones(shape, np.float32),
            "document": np.zeros(shape, np.int32),
        }
        return jax.device_put(text, over_data(devices))

    with jax.set_mesh(devices):
        state = program.first_state(placed, iter(windows, None))
        state, metrics = step((placed, windows()), state)
        pairs = []
        for _ in range(7):
            text = windows()
            chip = measured(tuple(devices.devices.flat), estimate.chip.memory, estimate.bytes_needed)
            start = time.perf_counter()
            state, metrics = step((placed, text), state)
            jax.block_until_ready((state.method, metrics))
            pairs.append((replace(estimate, chip=chip).seconds, time.perf_counter() - start))
    return pairs, estimate.bound


def scaling(sizes: list[int], features: int) -> int:
    """Operand bytes of a chip's collectives, a skip transcoder of SmolLM2's shape.

    Where a chip's part of the rows (features / 4 / data) is not a multiple of 64, XLA pads it, and exchanges what that
    shifts with neighbours.
    """
    from jaxinterp.methods import SkipTranscoder
    from jaxinterp.models.files.shapes import model_shapes
    from jaxinterp.preflight.check import Setting, preflight
    from jaxinterp.preflight.chips import find

    method = SkipTranscoder(features=features, k=32, auxk=0.0)
    kinds = ("reduce-scatter", "all-gather", "all-reduce", "collective-permute")
    print(f"{'chips':>6}{'data':>6}" + "".join(f"{kind:>20}" for kind in kinds) + f"{'all, MB':>12}{'step ms':>10}")
    totals = []
    for data in sizes:
        target, setting = find(f"v5p:{SCALES[data]}"), Setting({"data": data, "feature": 4, "model": 1}, data * TOKENS)
        shapes = lambda sharding: model_shapes("smollm2-135m", sharding=sharding)
        found = preflight(method, shapes, "blocks/1/mlp", target, setting, steps=100, seq=256)
        by_kind = dict.fromkeys(kinds, 0.0)
        for each in found.program.always.collectives:
            by_kind[each.kind] = by_kind.get(each.kind, 0.0) + each.total * (
                each.devices if each.kind == "all-gather" else 1
            )
        totals.append(sum(by_kind.values()))
        numbers = "".join(f"{by_kind[kind] / 1e6:>20.2f}" for kind in kinds)
        print(f"{4 * data:>6}{data:>6}{numbers}{totals[-1] / 1e6:>12.2f}{found.seconds * 1e3:>10.2f}", flush=True)
    return 0 if all(abs(total / totals[0] - 1) <= 0.1 for total in totals) else 1


def remat(target: str) -> int:
    """Temporary bytes of a transcoder's step whose loss is the model's cross-entropy."""
    import jax

    from jaxinterp.methods import Transcoder
    from jaxinterp.models.transformer import TransformerConfig, initialise
    from jaxinterp.objectives import total
    from jaxinterp.objectives.end_to_end import cross_entropy
    from jaxinterp.preflight.chips import find
    from jaxinterp.training.mesh import make_mesh
    from jaxinterp.training.program import Program

    devices = find(target).devices
    shape = TransformerConfig(
        vocab_size=256, d_model=64, layers=10, heads=4, kv_heads=4, head_dim=16, d_mlp=256, context=256
    )
    model = jax.eval_shape(lambda: initialise(shape, jax.random.key(0)))
    sizes = []
    for again in (False, True):
        method = Transcoder(features=64, activation="relu", objective=total(cross_entropy(remat=again)))
        mesh = make_mesh(devices=devices)
        program = Program(method.recipe(20), method.needs("blocks/0/mlp"), mesh, 4096, 128, 2, seed=0)
        sizes.append(program.compile(model, devices[0].platform).memory_analysis().temp_size_in_bytes)
        print(f"{target}, remat={again}: {sizes[-1] / 1e6:.0f} MB", flush=True)
    return 0 if sizes[1] <= sizes[0] else 1


if __name__ == "__main__":
    sys.exit(main())
