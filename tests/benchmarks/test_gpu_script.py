"""The GPU benchmark on a CPU: kernels interpreted, shapes tiny, so that what waits for a GPU is known to run."""

import json

import pytest

pytest.importorskip("optax")

from benchmarks import gpu, gpu_programs
from benchmarks.workers import Shape
from jaxinterp.kernels import dispatch, mosaic_gpu

TINY = Shape(tokens=33, width=24, features=70, k=5)
BOTH = ("xla", "pallas_gpu:interpret")


def test_floors_are_those_of_the_roofline():
    """An H200 as measured (790 TFLOP/s, 4.3 TB/s): milliseconds by hand."""
    least = gpu.floors(Shape(8192, 768, 24576, 32), 790e12, 4.3e12)
    expected = {"matmul": 0.39, "gather_sum": 0.09, "sampled_dot": 0.09, "forward+backward": 0.80}
    assert {part: round(least[part] * 1e3, 2) for part in expected} == expected
    assert round(2e3 * least["outer_sum"], 2) == 0.22
    assert round(1e3 * (least["step"] - least["forward+backward"]), 2) == 0.26


def test_every_pass_is_checked_and_right():
    found = gpu_programs.checks("xla", TINY) + gpu_programs.checks("pallas_gpu:interpret", TINY)
    assert len(found) == 2 * 2 * 4
    assert all(check["holds"] for check in found), found


def test_a_wrong_pass_and_one_that_fails_are_told(monkeypatch):
    find = dispatch.find

    def spoilt(name, of, **shape):
        run = find(name, of, **shape)
        if of == "gather_sum":
            return lambda *arguments: run(*arguments) + 0.01
        if of == "encode":  # the right values, with the features of other tokens
            return lambda *arguments: (run(*arguments)[0], run(*arguments)[1][::-1])
        return run if of == "sampled_dot" else None

    monkeypatch.setattr(dispatch, "find", spoilt)
    found = {check["pass"]: check for check in gpu_programs.checks("xla", TINY)}
    assert not found["gather_sum xla float32"]["holds"] and not found["encode xla float32"]["holds"]
    assert found["sampled_dot xla bfloat16"]["holds"]
    assert "TypeError" in found["outer_sum xla float32"]["reason"]
    about = {"device": "a device", "jax": "0"}
    text = gpu.machine_text(about, {"operations": 1e12, "bytes": 1e12}, list(found.values()))
    assert text.count("WRONG") == 6 and text.count("right") == 2


def test_ceilings_are_rates():
    found = gpu_programs.ceilings(128, 2**16)
    assert found["operations"] > 0 and found["bytes"] > 0


def test_parts_run_and_refusals_are_told():
    about, parts = gpu_programs.parts(TINY, ("xla", "pallas_gpu:interpret", "pallas_gpu"))
    assert set(about["failed"]) == {
        f"{part} pallas_gpu" for part in ("gather_sum", "sampled_dot", "outer_sum", "forward+backward")
    }
    assert "needs a GPU" in about["failed"]["outer_sum pallas_gpu"]
    assert {"matmul", "encode", "outer_sum .at[].add", "forward+backward dense"} < set(parts)
    assert parts["outer_sum pallas_gpu:interpret"]()["calls"] >= 1


def test_implementations_take_the_same_step():
    """Dense autodiff, XLA and the kernels: the same loss after a few steps, and less of it."""
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(gpu_programs.activations(TINY)[0], jnp.bfloat16)
    losses = {}
    for name in (None, *BOTH):
        state = gpu_programs.start(jax.random.key(0), jnp.zeros(TINY.width), TINY)
        run = jax.jit(gpu_programs.whole_step, static_argnums=(0, 1))
        found = []
        for _ in range(4):
            state, loss = run(TINY.k, name, state, x)
            found.append(float(loss))
        losses[name] = found
    assert losses["xla"][-1] < losses["xla"][0]
    for name in BOTH:
        assert losses[name] == pytest.approx(losses[None], rel=1e-2)


@pytest.mark.slow
def test_everything_about_a_shape_becomes_a_table():
    result = gpu.run(TINY, 2, "/no/such/python", ("xla",))
    json.dumps(result)
    text = gpu.table(result, 1e12, 1e10)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert len(set(rows)) == len(rows)
    assert {"matmul", "step xla", "step dense", "outer_sum xla"} <= set(rows)
    assert "Not measured: sparsify" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_peer_is_set_against_every_implementation():
    seconds = {
        "parts": {"matmul": [1.0, 1.0], "forward+backward xla": [2.0, 2.0], "forward+backward dense": [6.0, 6.0]},
        "step xla": {"matmul": [1.0, 1.0], "step": [3.0, 3.0]},
        "sparsify": {"matmul": [2.0, 2.0], "step": [9.0, 9.0], "forward+backward": [5.0, 5.0]},
    }
    peak = {"step xla": 2e9, "sparsify": 5e9, "parts": None}
    result = {"shape": TINY.__dict__, "seconds": seconds, "peak_bytes": peak, "failures": {}}
    lines = {line.split("|")[1].strip(): line for line in gpu.table(result, 1e12, 1e12).splitlines() if "|" in line}
    assert lines["step xla"].endswith("| 3.00 |  | 3.00 | 2,000 | 11 |")
    assert lines["step sparsify"].endswith("| 4.50 |  | 1.00 | 5,000 | 4 |")
    assert lines["forward+backward xla"].endswith("| 2.00 | 3.00 | 2.50 |  |  |")


def test_without_a_gpu_one_line_says_so(capsys):
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "needs a CUDA GPU" in printed.err


def test_after_its_minutes_nothing_is_started():
    found = gpu.run(TINY, 1, None, ("xla",), until=0.0)
    assert set(found["failures"]) == {"parts", "step xla", "step dense"} and not found["seconds"]
    assert all("no time was left" in reason for reason in found["failures"].values())


@pytest.mark.slow
def test_the_dry_run_goes_through_everything(capsys, tmp_path):
    """Ceilings, checks, parts and steps of every implementation, in tiny and interpreted; the tables and the file."""
    file = tmp_path / "found.json"
    assert gpu.main(["--dry", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "WRONG" not in printed and "tokens/s" in printed
    kernels = ["pallas_gpu:interpret", *([] if mosaic_gpu.available() else ["mosaic_gpu:interpret"])]
    for name in ("xla", *kernels):
        assert f"| step {name} |" in printed and f"outer_sum {name}" in found["results"][0]["seconds"]["parts"]
    assert not found["results"][0]["failures"] or mosaic_gpu.available()
