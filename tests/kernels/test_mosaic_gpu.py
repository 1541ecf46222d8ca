"""The Mosaic GPU kernels: interpreted with race detection against float64 numpy, and lowered for a Hopper GPU.

tests/kernels/test_implementations.py runs them on the base of tests that all implementations share.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import dispatch, mosaic_gpu
from tests.kernels import oracle
from tests.kernels.gpu_problem import TOO_OLD, described, needs, on, problem

SMALL = (3, 24, 11, 10)  # tokens, width, features, k: more entries in a run than slots
CUT = (131, 40, 3, 4)  # 524 entries in 3 runs: two cuts


@needs
def test_gathers_equal_float64_and_do_not_race():
    values, indices, g, rows = problem(SMALL)
    oracle.close(mosaic_gpu.gather_sum(values, indices, rows, interpret=True), oracle.gather_sum(values, indices, rows))
    oracle.close(mosaic_gpu.sampled_dot(g, rows, indices, interpret=True), oracle.sampled_dot(g, rows, indices))


@needs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (CUT, jnp.float32),
        ((5, 576, 4, 9), jnp.bfloat16),
        ((2, 4360, 3, 5), jnp.bfloat16),
        ((9, 20, 3, 4), jnp.bfloat16),
    ],
    ids=str,
)
def test_every_pass_equals_float64(shape, dtype):
    """Runs with cuts; a width of no whole register; of two slabs; one that is padded."""
    values, indices, g, rows = problem(shape, dtype)
    for got, expected in (
        (mosaic_gpu.gather_sum(values, indices, rows, interpret=True), oracle.gather_sum(values, indices, rows)),
        (mosaic_gpu.sampled_dot(g, rows, indices, interpret=True), oracle.sampled_dot(g, rows, indices)),
        (
            mosaic_gpu.outer_sum(values, indices, g, shape[2], interpret=True),
            oracle.outer_sum(values, indices, g, shape[2]),
        ),
    ):
        assert got.dtype == jnp.float32 and got.shape == expected.shape
        oracle.close(got, expected)


@needs
def test_the_row_that_stands_in_for_none_does_no_harm():
    """An index of no row fetches the last one, whatever it holds."""
    values, _, _, rows = problem((1, 24, 5, 3))
    spoilt = rows.at[-1].set(jnp.nan)
    got = mosaic_gpu.gather_sum(values, jnp.array([[5, 0, 5]]), spoilt, interpret=True)
    np.testing.assert_allclose(got[0], values[0, 1] * rows[0], rtol=1e-6)
    assert np.isnan(mosaic_gpu.gather_sum(values, jnp.array([[4, 0, 5]]), spoilt, interpret=True)).all()


@needs
@pytest.mark.parametrize("without", ["_release", "_wait"])
def test_a_race_is_caught(monkeypatch, without):
    """The controls: a slot that is written before all have read it, and one that is read before it has arrived."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    values, indices, _, rows = problem((1, 24, 11, 10))
    monkeypatch.setattr(mosaic_gpu, without, lambda *_: None)
    try:
        with pytest.raises(Exception, match="RACE DETECTED"):
            jax.block_until_ready(mosaic_gpu.gather_sum(values, indices, rows, interpret=True))
    finally:
        reset_gpu_interpret_mode_state()


@needs
def test_the_passes_lower_for_hopper():
    """From a machine without a GPU; `make test-gpu` compiles them."""
    values, indices, g, rows = described(jnp.bfloat16, (7, 600, 19, 9))
    with on("NVIDIA H200"):
        for function, arguments, kernels in (
            (mosaic_gpu.gather_sum, (values, indices, rows), 1),
            (mosaic_gpu.sampled_dot, (g, rows, indices), 1),
            (partial(mosaic_gpu.outer_sum, features=19), (values, indices, g), 2),
        ):
            text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("custom_call @mosaic_gpu") == kernels


SHAPE = {"tokens": 64, "features": 24576, "k": 32, "width": 768, "itemsize": 2}


@needs
@pytest.mark.parametrize(
    ("kind", "chosen"),
    [("NVIDIA H100 80GB HBM3", "mosaic_gpu"), ("NVIDIA B200", "mosaic_gpu"), ("NVIDIA GH200 480GB", "mosaic_gpu"),
     ("NVIDIA A100-SXM4-80GB", "pallas_gpu"), ("NVIDIA GeForce RTX 4090", "pallas_gpu")],
)  # fmt: skip
def test_older_gpus_fall_back_and_say_why_once(caplog, kind, chosen):
    dispatch.choose.cache_clear()
    with on(kind), caplog.at_level("INFO", logger="jaxinterp.kernels"):
        for _ in range(2):
            assert dispatch.choose("gather_sum", "gpu", kind, **SHAPE) == chosen
    assert len(caplog.records) == 1 and kind in caplog.text
    assert ("is older than Hopper" in caplog.text) == (chosen == "pallas_gpu")


def test_without_mosaic_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "plgpu", None)
    dispatch.choose.cache_clear()
    with on("NVIDIA H200"):
        assert dispatch.choose("gather_sum", "gpu", "NVIDIA H200", **SHAPE) == "pallas_gpu"
        with pytest.raises(UserError, match="too old for Mosaic GPU kernels"):
            dispatch.find("mosaic_gpu", "gather_sum", **SHAPE)
    dispatch.choose.cache_clear()


@pytest.mark.parametrize(
    ("without", "chosen"),
    [("mosaic_gpu", "pallas_gpu"), ("mosaic_gpu,pallas_gpu", "xla"), ("pallas_gpu", "mosaic_gpu")],
)
def test_kernels_can_be_left_out(monkeypatch, caplog, without, chosen):
    if chosen == "mosaic_gpu" and TOO_OLD:
        pytest.skip(str(TOO_OLD))
    monkeypatch.setenv("JAXINTERP_WITHOUT", without)
    dispatch.choose.cache_clear()
    with on("NVIDIA H200"), caplog.at_level("INFO", logger="jaxinterp.kernels"):
        assert dispatch.choose("gather_sum", "gpu", "NVIDIA H200", **SHAPE) == chosen
    dispatch.choose.cache_clear()
    assert ("mosaic_gpu: JAXINTERP_WITHOUT names it" in caplog.text) == (chosen != "mosaic_gpu")
