"""`fit` says before it starts how much memory it will hold; the numbers are those of what it then holds."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import fit, load
from jaxinterp.methods import Transcoder
from jaxinterp.training import fit as module
from jaxinterp.training.memory import said


@pytest.fixture(scope="module")
def text():
    rows = np.random.default_rng(0).integers(97, 122, (32, 16)).astype(np.int32)
    whole = {"weight": np.ones(16, np.float32), "document": np.zeros(16, np.int32)}
    return load("tiny"), grain.MapDataset.source([{"tokens": row} | whole for row in rows])


def test_what_is_said_is_what_is_held(text, capsys, monkeypatch):
    subject, train = text
    kept = {}
    real = module.memory_needed
    monkeypatch.setattr(module, "memory_needed", lambda *given: kept.setdefault("needed", real(*given)))
    size = {"steps": 2, "batch_size": 64, "buffer_batches": 3}
    result = fit(Transcoder(features=32, k=4), subject, train, site="blocks/1/mlp", **size)
    needed = kept["needed"]

    def held(tree):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        return sum(leaf.nbytes for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))

    assert needed["model"] == held(subject.model)
    assert needed["state"] == held((result.state.method, result.state.step))
    assert needed["buffer"] == held(result.state.buffer) > 3 * 64 * 2 * 64 * 4 - 1
    assert needed["step"] == 64 * 2 * 64 * 4
    assert said(needed) in capsys.readouterr().out
