"""Causes with the subject spread over devices, and over processes."""

import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.attribute import attribute, summed
from jaxinterp.causal.measure import LogitDifference
from jaxinterp.causal.patch import patch_effects
from jaxinterp.causal.steer import matched_strength
from jaxinterp.models.edits import Add
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.generate import generate
from jaxinterp.models.run import run
from jaxinterp.training.mesh import make_mesh, place_model
from tests.causal.das_worker import arrays
from tests.causal.toys import small_transformer
from tests.training.hosted import QUICK

SITE = "blocks/0/resid/post"
DIRECTION = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)


def everything(model):
    """Generation, steering, patching, attribution."""
    subject = Subject(model, byte_tokenizer(), "small")
    out = generate(subject, ["abc", "a longer prompt"], max_tokens=6, edits={SITE: Add(0.5 * DIRECTION)})
    tokens, other = jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([[1, 2, 9, 4]])
    strength = matched_strength(model, tokens, SITE, DIRECTION, 0.05, high=10.0, steps=12)
    metric = LogitDifference(jnp.asarray([10]), jnp.asarray([12]))
    fills = {SITE: eqx.filter_jit(run)(model, other)[SITE]}
    truth = patch_effects(model, tokens, metric, fills, chunk=4)[SITE]
    estimate = summed(attribute(model, tokens, metric, fills))[SITE]
    return out, float(strength.value), np.asarray(truth), np.asarray(estimate)


@pytest.mark.slow
def test_a_subject_spread_over_two_devices_gives_the_same():
    """Under jit, model=2: each matrix is cut in two."""
    model = small_transformer()
    mesh = make_mesh(1, model=2, devices=jax.devices()[:2])
    spread = place_model(model, mesh)
    whole, part = spread.blocks[0].mlp.up_proj.weight, spread.blocks[0].mlp.up_proj.weight.addressable_shards[0].data
    assert part.size * 2 == whole.size
    (alone, *numbers), (together, *others) = everything(model), everything(spread)
    assert alone.tokens == together.tokens and len(set(alone.tokens)) == 2
    for one, other in zip(alone.log_probabilities, together.log_probabilities, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for one, other in zip(numbers, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-3)
    assert np.abs(numbers[1]).max() > 0.05


MESHES = ("data=2,model=4", "data=8")


@pytest.mark.slow
def test_das_and_lineas_on_two_processes_are_those_of_one(tmp_path):
    """On two meshes, one after the other in the same processes."""
    command = [sys.executable, "-m", "experiments.launch", "2", "tests.causal.das_worker", str(tmp_path), *MESHES]
    flags = {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 8 devices" in done.stdout
    alone = arrays()
    for mesh in MESHES:
        found = np.load(tmp_path / f"{mesh}.npz")
        assert set(found) == set(alone) and len(alone) > 4
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=f"{mesh}: {name}")
