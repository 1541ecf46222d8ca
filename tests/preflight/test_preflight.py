"""Preflight: what a compiled step says of itself, what does not fit, which neighbour does, and what is refused."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import pytest

from jaxinterp.commands.train import Config, main
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.methods import SkipTranscoder, Transcoder
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.models.load import load
from jaxinterp.preflight import chips
from jaxinterp.preflight.check import Setting, announce, nearest, neighbours, overflowing, preflight
from jaxinterp.preflight.chips import Chip, Target
from jaxinterp.preflight.compiled import Program
from jaxinterp.preflight.estimate import Estimate
from jaxinterp.preflight.hlo import Collective, Kernel, Work, groups, read_work
from jaxinterp.training import program as programs
from tests.preflight.made_up import HERE

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
    scattered = [each for each in found.program.always.collectives if each.kind == "reduce-scatter"]
    matrices = [each for each in scattered if each.operand_bytes >= 128 * 64 * 4]
    assert len(matrices) == 2 and found.fits and found.program.flops > 2 * 128 * 128 * 64


def test_time_is_the_longest_part_and_the_exchange():
    """An all-reduce of 8 devices sends 2 * 7/8 of its operand; a kernel takes the longer of products and bytes."""
    exchange = Collective("all-reduce", 10_000_000, 3, 8)
    always = Work((exchange,), (Kernel("gather_sum", 1e8, 5e8, 2),), cycles=2e9)
    program = Program({"all": 2**20}, 2e9, 1e9, always, besides=Work((exchange,), cycles=1e9))
    found = Estimate(HERE, program, devices=8, tokens=1000, steps=10, read_per_second=250.0)
    assert found.compute == 2.0 and found.interconnect(always) == pytest.approx(0.525)
    assert found.seconds == found.input == 4.0 and found.bound == "input"
    fed = replace(found, read_per_second=1e6)
    assert fed.seconds == pytest.approx(2.0 + 2 * 0.5 + 0.525) and fed.bound == "compute"
    assert fed.seconds_at_most == pytest.approx(fed.seconds + 1.525)
    assert fed.device_hours == pytest.approx(3.525 * 10 * 8 / 3600)
    assert any("284 tokens/s" in line for line in fed.lines())


def test_without_a_clock_or_without_overlap_memory_counts():
    """tpu7x gives cycles that nobody can turn into seconds; a core reads memory or computes."""
    program = Program({"all": 2**20}, 2e9, 5e9, Work(cycles=1e3), Work())
    here = Estimate(HERE, program, devices=1, tokens=1000, steps=10)
    assert here.seconds == here.compute == 2.0
    unclocked = replace(here, chip=replace(HERE, clock=None))
    assert unclocked.seconds == unclocked.memory == 5.0 and unclocked.bound == "memory bandwidth"
    assert not any("cycles" in line for line in unclocked.lines())
    core = replace(here, chip=replace(HERE, clock=None, overlaps=False))
    assert core.seconds == 7.0


def test_the_text_of_a_program_is_read():
    """Loops as often as they run, the costliest branch, fused reduce-scatters, chains once; what is unknown is not."""
    always, besides = read_work(PROGRAM)
    assert always.cycles == 5 + 3 * 7 and besides.cycles == 11
    assert [(each.kind, each.total, each.devices) for each in always.collectives] == [
        ("reduce-scatter", 4096, 4),
        ("all-gather", 512, 16),
    ]
    assert always.kernels == (Kernel("gather_sum", 100.0, 200.0, 1),)
    assert [each.kind for each in besides.collectives] == ["all-reduce"]


PROGRAM = """HloModule step
%all-reduce-scatter.1 (input: f32[32,32]) -> f32[8,32] {
  %input = f32[32,32]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[32,32]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
}
%body (arg: f32[8]) -> f32[8] {
  %unknown = f32[8]{0} fusion(%arg), kind=kCustom, calls=%none, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %add = f32[8]{0} add(%unknown, %unknown), backend_config={"estimated_cycles":"7"}
}
%cheap (arg.1: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%arg.1), backend_config={"estimated_cycles":"2"}
}
%costly (arg.2: f32[8]) -> f32[8] {
  %psum = f32[8]{0} all-reduce(%arg.2), channel_id=3, replica_groups=mesh['a'=16,'b'=4] {'b'}
  ROOT %copy.2 = f32[8]{0} copy(%psum), backend_config={"estimated_cycles":"11"}
}
ENTRY %main (x: f32[32,32]) -> f32[8] {
  %x = f32[32,32]{1,0} parameter(0)
  %part = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"5"}
  %fusion.1 = f32[8,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %g.1 = f32[128,16]{1,0} all-gather(%part8), channel_id=7, replica_groups=[4,16]<=[64], frontend_attributes={chain_id="2"}
  %part8 = f32[128]{0} copy(%x)
  %g.2 = f32[128,16]{1,0} all-gather(%part8), channel_id=7, replica_groups=[4,16]<=[64], frontend_attributes={chain_id="2"}
  %gather_sum.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"100","transcendentals":"0","bytes_accessed":"200"}}
  %w = f32[8]{0} while(%part), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = f32[8]{0} conditional(%p, %w, %w), branch_computations={%cheap, %costly}
}
"""  # noqa: E501


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_a_neighbour_that_does(capsys):
    """More shards of the dictionary first."""
    method = SkipTranscoder(features=4096, k=4)
    alone = of_tiny(method, mesh={"data": 8, "feature": 1, "model": 1})
    spread = of_tiny(method, mesh={"data": 4, "feature": 2, "model": 1})
    assert spread.bytes_needed < 0.9 * alone.bytes_needed
    small = Chip("small", 1e9, int((alone.bytes_needed + spread.bytes_needed) / 2 / 0.9), 1e9, 1e8)
    attempt = lambda setting, expected: of_tiny(method, small, setting.mesh, setting.batch_size)
    setting = Setting({"data": 8, "feature": 1, "model": 1}, 256)
    better, estimate = nearest(attempt, setting, 8, 32)
    assert estimate.fits and better == Setting({"data": 4, "feature": 2, "model": 1}, 256)
    target = Target("cpu:8", tuple(jax.devices()), small)
    assert announce(method, shapes, "blocks/1/mlp", target=target, setting=setting, steps=20, seq=32) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "the nearest setting that fits: --mesh data=4,feature=2 --batch-size 256" in said


def test_what_the_compiler_says_of_too_little_memory_is_read():
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded"
    temporaries = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (18.42G) exceeds available HBM"
    assert overflowing(used, 2**30) == int(19.5 * 2**30)
    assert overflowing(temporaries, 2**30) == int(18.42 * 2**30)
    assert overflowing("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 64.57M", 0) is None


def test_a_device_may_be_half_a_chip():
    halves = tuple(SimpleNamespace(core_on_chip=core) for core in (0, 1))
    assert chips.of_a_device(chips.CHIPS["tpu7x"], halves).memory == 96 * 2**30
    assert chips.of_a_device(chips.CHIPS["v5e"], halves[:1]) == chips.CHIPS["v5e"]


def test_what_the_compiler_refused_does_not_fit():
    program = Program({"all": 1}, 0.0, 0.0, Work(), Work())
    assert Estimate(HERE, program, 1, 1, 1).fits and not Estimate(HERE, program, 1, 1, 1, refused=True).fits


def test_what_cannot_fit_is_told_without_compiling(monkeypatch):
    """Weights alone are too much: no compiler is asked."""
    monkeypatch.setattr(programs.Program, "compile", lambda *_: pytest.fail("compiled"))
    found = of_tiny(Transcoder(features=512, k=4), Chip("small", 1e9, 2**16, 1e9, 1e8))
    assert not found.fits and "DOES NOT FIT" in found.lines()[0] and "model weights" in found.lines()[1]


def test_neighbours_change_little_first():
    found = list(map(str, neighbours(Setting({"data": 4, "feature": 1, "model": 1}, 1024), 8, 32)))
    assert found[0] == "--mesh data=2,feature=2 --batch-size 1024"
    assert "--mesh data=8 --batch-size 1024" in found and "--mesh data=4 --batch-size 1024" not in found
    assert found.index("--mesh data=4 --batch-size 512") > found.index("--mesh model=8 --batch-size 1024")


def test_what_one_compilation_said_spares_the_next():
    """Of 1000 temporary bytes for 1024 tokens on four devices, others may need half, and eight devices half of that."""
    expectations = {}

    def attempt(setting, expected):
        expectations[str(setting)] = expected
        program = Program({"temporary": expected}, 0.0, 0.0, Work(), Work())
        return Estimate(Chip("small", 1e9, 200, 1e9, 1e9), program, 1, 1, 1)

    setting = Setting({"data": 4, "feature": 1, "model": 1}, 1024)
    better, _ = nearest(attempt, setting, 8, 32, 1000)
    assert expectations["--mesh data=2,feature=2 --batch-size 1024"] == 500
    assert expectations["--mesh data=8 --batch-size 1024"] == 250
    assert str(better) == "--mesh data=8 --batch-size 512"


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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("all-reduce(%x), replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("all-reduce(%x), replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("all-reduce(%x), replica_groups=mesh['data'=2,'feature'=4] {'data'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("all-reduce(%x), replica_groups=mesh['data'=2,'feature'=2] {'feature'}", [(0, 1), (2, 3)]),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_groups_of_an_exchange(line, expected):
    assert groups(line) == expected


def test_what_crosses_machines_goes_at_the_networks_rate():
    """Four devices a machine: (0, 4) is in two machines, (0, 1) in one."""
    two_machines = replace(HERE, machine=4, network=1e7)
    inside, across = (Collective("all-gather", 1_000_000, 1, 2, places=places) for places in ((0, 1), (0, 4)))
    program = Program({"all": 1}, 0.0, 0.0, Work((inside, across)), Work())
    found = Estimate(two_machines, program, devices=8, tokens=1, steps=1)
    assert found.interconnect(Work((inside,))) == pytest.approx(1e6 / 1e8)
    assert found.interconnect(Work((across,))) == pytest.approx(1e6 / 1e7)
    assert replace(found, chip=HERE).interconnect(Work((across,))) == pytest.approx(1e6 / 1e8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h200", "write h200:8 for eight GPUs of one machine, or h200:8x4"),
        ("h200:0", "write h200:8 for eight"),
        (
            "h20:8",
            "unknown chip 'h20'; known: v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200, l4, rtx4090, cpu",
        ),
    ],
)
def test_a_gpu_that_is_written_otherwise_is_told(text, words):
    with pytest.raises(UserError, match=re.escape(words)):
        chips.find(text)
