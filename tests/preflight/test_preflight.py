"""Preflight: what a compiled step says of itself, what does not fit, which neighbour does, and what is refused."""

from functools import partial

import jax
import pytest

from experiments.transcoder import Config, main
from jaxinterp.errors import UserError
from jaxinterp.methods import SkipTranscoder, Transcoder
from jaxinterp.models.load import load
from jaxinterp.models.shapes import model_shapes
from jaxinterp.preflight import chips
from jaxinterp.preflight.check import Setting, announce, nearest, neighbours, preflight
from jaxinterp.preflight.chips import Chip, Target
from jaxinterp.preflight.compiled import Collective, Program
from jaxinterp.preflight.estimate import Estimate
from jaxinterp.trees import named_leaves

HERE = Chip("made up", flops=1e9, memory=2**30, memory_bandwidth=1e9, interconnect=1e8, clock=1e9)
MESH = {"data": 2, "feature": 4, "model": 1}


def shapes(sharding=None):
    return model_shapes("tiny", dtype="float32", sharding=sharding)


def of_tiny(method, chip=HERE, mesh=MESH, batch_size=256):
    target = Target("cpu:8", tuple(jax.devices()), chip)
    return preflight(method, shapes, "blocks/1/mlp", target, Setting(mesh, batch_size), steps=20, seq=32)


def test_shapes_are_those_of_the_loaded_model():
    real = named_leaves(load("tiny").model)
    assert {name: leaf.shape for name, leaf in named_leaves(shapes()).items()} == {n: x.shape for n, x in real.items()}
    llama = named_leaves(model_shapes("llama-3.1-8b"))
    assert sum(leaf.size for leaf in llama.values()) == 8_030_261_248
    with pytest.raises(UserError, match=r"no shapes of model 'lama-3.1-8b'.*Did you mean 'llama-3.1-8b'"):
        model_shapes("lama-3.1-8b")


def test_bytes_are_those_of_a_device():
    """512 features of width 64 over four feature shards; the moments over data as well; collectives of the step."""
    found = of_tiny(Transcoder(features=512, k=4, auxk=0.0))
    memory = found.program.memory
    rows = 2 * 512 * 64 * 4 // 4 + 2 * 512 * 4 // 4  # two matrices, biases and counters
    assert memory["dictionary"] == pytest.approx(rows, rel=0.05)
    assert memory["optimizer"] == pytest.approx(2 * (2 * 512 * 64 + 512) * 4 // 8, rel=0.05)
    assert memory["activation buffer"] == 8 * 256 * (64 + 64 + 1) * 4 // 2
    assert memory["model weights"] == sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes()))
    scattered = [each for each in found.program.collectives if each.kind == "reduce-scatter"]
    matrices = [each for each in scattered if each.operand_bytes >= 128 * 64 * 4]
    assert len(matrices) == 2 and found.fits and found.program.flops > 2 * 128 * 128 * 64


def test_time_is_the_longest_part_and_the_exchange():
    program = Program({"all": 2**20}, 2e9, 1e9, (Collective("all-reduce", 10_000_000, 3),), cycles=3e9)
    found = Estimate(HERE, program, devices=8, tokens=1000, steps=10)
    assert found.compute == 3.0 and found.memory == 1.0 and found.interconnect == pytest.approx(0.3)
    assert found.seconds == pytest.approx(3.3) and found.bound == "compute"
    assert found.device_hours == pytest.approx(3.3 * 10 * 8 / 3600)
    assert any("303 tokens/s" in line for line in found.lines())


def test_what_does_not_fit_is_told_with_a_neighbour_that_does(capsys):
    """More shards of the dictionary first."""
    method = SkipTranscoder(features=4096, k=4)
    alone = of_tiny(method, mesh={"data": 8, "feature": 1, "model": 1})
    spread = of_tiny(method, mesh={"data": 4, "feature": 2, "model": 1})
    assert spread.bytes_needed < 0.9 * alone.bytes_needed
    small = Chip("small", 1e9, int((alone.bytes_needed + spread.bytes_needed) / 2 / 0.9), 1e9, 1e8)
    attempt = lambda setting: of_tiny(method, small, setting.mesh, setting.batch_size)
    setting = Setting({"data": 8, "feature": 1, "model": 1}, 256)
    better, estimate = nearest(attempt, setting, 8, 32)
    assert estimate.fits and better == Setting({"data": 4, "feature": 2, "model": 1}, 256)
    target = Target("cpu:8", tuple(jax.devices()), small)
    assert announce(method, shapes, "blocks/1/mlp", target=target, setting=setting, steps=20, seq=32) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "the nearest setting that fits: --mesh data=4,feature=2 --batch-size 256" in said


def test_neighbours_change_little_first():
    found = list(map(str, neighbours(Setting({"data": 4, "feature": 1, "model": 1}, 1024), 8, 32)))
    assert found[0] == "--mesh data=2,feature=2 --batch-size 1024"
    assert "--mesh data=8 --batch-size 1024" in found and found[-1] == "--mesh data=4 --batch-size 128"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5x:2x2", "unknown chip 'v5x'"),
        ("v5e:2x2x2", "v5e comes in 2 dimensions, such as v5e:4x4"),
        ("v5p:4x4", "v5p comes in 3 dimensions"),
        ("cpu", "write it as cpu:8"),
        ("cpu:99", "needs 99 virtual devices, but there are 8"),
    ],
)
def test_unknown_targets_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        chips.find(text)


def test_the_command_line_compiles_and_trains_nothing(tmp_path, capsys):
    config = partial(Config, out=tmp_path / "run", model="tiny", seq=32, batch_size=256)
    with pytest.raises(SystemExit) as ended:
        main(config(preflight="cpu:8", mesh="data=2,feature=4"))
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "it fits" in said and "device-hours" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="mesh data=4,feature=4,model=1 needs 16 devices, but there are 8"):
        main(config(preflight="cpu:8", mesh="data=4,feature=4"))
