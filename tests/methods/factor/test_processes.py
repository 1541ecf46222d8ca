"""Two real processes give what one gives: sweeps over kept rows, streamed moments, answers from the weights alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxinterp.core.trees import named_leaves
from jaxinterp.models.load import load
from jaxinterp.training.fit import fit
from tests.methods.factor.process_worker import runs
from tests.training.hosted import QUICK, text


@pytest.mark.slow
def test_two_processes_are_one_for_every_lifter(tmp_path):
    """Invariant 5. Directions have free signs: what is compared is their square."""
    command = [sys.executable, "-m", "experiments.launch", "2", "tests.methods.factor.process_worker", str(tmp_path)]
    given = os.environ | {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 processes, 8 devices" in done.stdout
    for name, (method, options) in runs().items():
        tokens = () if name == "closed form" else (text(),)
        alone = named_leaves(fit(method, load("tiny"), *tokens, **options).decomposition)
        found = np.load(tmp_path / f"{name}.npz")
        assert len(alone) == len(found.files) > 0
        for leaf, wanted in alone.items():
            both = [np.asarray(each) for each in (found[leaf.replace("/", ".")], wanted)]
            if name == "streaming" and leaf in ("encoder", "decoder"):
                both = [each**2 for each in both]
            scale = max(float(np.abs(both[1]).max()), 1e-6)
            np.testing.assert_allclose(both[0], both[1], rtol=0, atol=2e-3 * scale, err_msg=f"{name}: {leaf}")
