"""The benchmark of the sparse top-k core at tiny shapes: what it says, not how long it takes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import topk, topk_programs
from benchmarks.timing import Round, Sample, interleaved, ratio, seconds
from benchmarks.workers import ROOT, Shape, Worker, WorkerError, activations

SHAPE = Shape(tokens=1024, width=32, features=2048, k=4)

ECHO = """
import sys
from benchmarks.workers import serve

def load():
    print("a library that greets")
    def start(shape):
        print("and talks")
        if shape.k == 3:
            sys.exit(3)
        return {"version": "1", "features": shape.features}, {"step": lambda: {"fvu": 0.5}, "worse": lambda: 1 / 0}
    return start

serve(load)
"""


def echo(shape=SHAPE):
    return Worker("echo", [sys.executable, "-c", ECHO], shape)


@pytest.mark.slow
def test_command_measures_every_part_and_names_a_peer_that_is_missing(tmp_path, capsys):
    """Run as a user runs it, with an interpreter that lacks the peers."""
    without_peers = subprocess.run([sys.executable, "-c", "import sparsify"], capture_output=True).returncode
    assert without_peers, "this test needs an interpreter without sparsify"
    file = tmp_path / "topk.json"
    arguments = ["--shapes", "1024,32,2048,4", "--repeats", "1", "--peers", sys.executable, "--json", str(file)]
    assert topk.main(arguments) == 0
    (result,) = json.loads(file.read_text())["results"]
    (found,) = result["rounds"]
    assert set(found["samples"]) == {*topk.PARTS, "step", "package step"}
    assert all(wall > 0 for samples in found["samples"].values() for wall, _ in samples)
    assert [failure.partition(":")[0] for failure in result["failures"]] == [*topk.PEERS, "torch"]
    for name in ("step", "package step"):
        steps, fvu = result["fvu"][name]
        memory = result["memory_mb"][name]
        assert steps >= 2 and 0 < fvu < 1.5
        assert memory["peak"] > memory["idle"] > 50
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*topk.PARTS, "not measured: sparsify", "holds  temporary memory"))


def test_a_broken_fact_decides_the_exit_code():
    holding, broken = {"holds": True}, {"holds": False}
    assert topk.exit_code([{"facts": [holding]}, {"facts": [holding]}]) == 0
    assert topk.exit_code([{"facts": [holding]}, {"facts": [holding, broken]}]) == 1


def test_dense_gradient_is_the_same_numbers_and_caught_by_the_fact():
    """The control of both: what is timed as the dense gradient is this gradient, and it does hold large arrays."""
    x = jnp.asarray(activations(SHAPE)[0])
    mean = x.mean(0)
    parameters = topk_programs.start(jax.random.key(1), mean, SHAPE).parameters
    gradients = []
    for forward, large in ((topk_programs.forward, False), (topk_programs.dense_forward, True)):
        function = jax.jit(jax.grad(forward, has_aux=True), static_argnums=3)
        program = function.lower(parameters, x, mean, SHAPE.k).compile()
        assert bool(topk_programs.large_arrays(program.as_text(), SHAPE)) == large
        gradients.append(program(parameters, x, mean)[0])
    for sparse, dense in zip(*gradients, strict=True):
        np.testing.assert_allclose(sparse, dense, atol=1e-5 * float(jnp.abs(dense).max()))


@pytest.mark.parametrize(
    ("text", "large"),
    [
        ("f32[1024,2048]{1,0} dot", True),
        ("f32[2,512,2048]", True),
        ("f32[1024,128,16]{2,1,0}", True),
        ("s32[512,2048] f32[2048,32] f32[1024,32] f32[1024,4]", False),
        ("f32[64,512,32] f32[1024,4,32] f32[128]", False),
    ],
)
def test_large_arrays_are_found_whatever_their_axes(text, large):
    assert bool(topk_programs.large_arrays(text, SHAPE)) == large


def test_large_arrays_of_gathered_rows_are_found():
    shape = Shape(tokens=4096, width=768, features=12288, k=8)
    assert topk_programs.large_arrays("f32[32768,768]", shape) == ["f32[32768,768]"]
    assert topk_programs.large_arrays("f32[256,16,8,768]", shape) == ["f32[256,16,8,768]"]
    assert not topk_programs.large_arrays("f32[16,8,768] f32[12288,768]", shape)


def test_step_keeps_unit_rows_counts_and_learns():
    batches = [jnp.asarray(batch) for batch in activations(SHAPE)]
    mean = batches[0].mean(0)
    state = topk_programs.start(jax.random.key(1), mean, SHAPE)
    losses = []
    for number in range(12):
        state, loss = jax.jit(topk_programs.whole_step, static_argnums=3)(state, batches[number % 4], mean, SHAPE.k)
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    np.testing.assert_allclose(jnp.linalg.norm(state.parameters.decoder, axis=1), 1, atol=1e-5)
    _, indices = topk_programs.forward(state.parameters, batches[0], mean, SHAPE.k)
    assert set(np.unique(state.since_fired) % SHAPE.tokens) == {0}
    assert 0 < (state.since_fired == 0).sum() <= SHAPE.tokens * SHAPE.k and indices.shape == (1024, 4)


def test_worker_answers_although_the_library_prints():
    with echo() as worker:
        assert worker.about["version"] == "1" and worker.about["features"] == SHAPE.features
        sample = worker.run("step")
        assert sample.wall >= 0 and worker.last["fvu"] == 0.5


def test_worker_reports_failures_in_one_line():
    with echo() as worker:
        with pytest.raises(WorkerError, match="echo: ZeroDivisionError"):
            worker.run("worse")
        assert worker.run("step").wall >= 0  # and goes on
    with pytest.raises(WorkerError, match="echo: the process ended with code 3"):
        echo(Shape(tokens=8, width=4, features=16, k=3))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new process may inherit the peak of its parent")
def test_peak_memory_is_that_of_the_worker_alone():
    ballast = np.ones(2**25)  # 268 MB here
    with echo() as worker:
        worker.run("step")
        assert 5 < worker.last["peak_mb"] < 150 < ballast.nbytes / 1e6


def test_peers_do_without_jax_and_this_package():
    code = "import sys, benchmarks.peers; sys.exit(bool({'jax', 'jaxlib', 'jaxinterp', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_data_are_the_same_everywhere_and_uneven():
    first, again = activations(SHAPE), activations(SHAPE)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1]) and first[0].dtype == np.float32
    variance = first[0].var(0)
    assert variance[0] > 10 * variance[-1] and abs(variance.mean() - 1) < 0.2


@pytest.mark.parametrize("text", ["4096,768,12288", "a,b,c,d", "8,8,8,0", "8,8,8,9"])
def test_shapes_that_cannot_be_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        topk.main(["--shapes", text])
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_interpreter_that_is_missing_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        topk.main(["--peers", "/nowhere/python"])
    assert stopped.value.code == 2 and "/nowhere/python" in capsys.readouterr().err


def test_rounds_interleave_and_leave_warm_ups_out():
    order = []

    def measure(name):
        order.append(name)
        return Sample(len(order), 2 * len(order))

    schedule = [(name, lambda name=name: measure(name)) for name in ("a", "b", "a")]
    rounds = interleaved(schedule, 2, warmups=1, rest=0)
    assert order == ["a", "b", "a"] * 3
    assert [found.samples for found in rounds] == [
        {"a": [Sample(4, 8), Sample(6, 12)], "b": [Sample(5, 10)]},
        {"a": [Sample(7, 14), Sample(9, 18)], "b": [Sample(8, 16)]},
    ]


def test_ratios_are_taken_inside_a_round():
    rounds = [
        Round({"a": [Sample(2, 1), Sample(4, 1)], "b": [Sample(1, 1)]}, 0.0),
        Round({"a": [Sample(20, 2)], "b": [Sample(10, 1)]}, 0.0),
        Round({"a": [Sample(100, 9)], "b": [Sample(20, 3)]}, 0.0),
    ]
    assert ratio(rounds, "a", "b") == (3, 2, 5)
    assert ratio(rounds, "a", "b", "cpu") == (2, 1, 3)
    assert seconds(rounds, "a") == (12, 2, 100)
