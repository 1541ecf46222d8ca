"""In-context regression: the query alone, its MLP updated, predicts what it predicts behind its examples."""

import json
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.factor_in_context import Config, losses, main, sequences, slope, start, update_steps
from jaxinterp.methods.factor import context_update as context

TINY = {"examples": 5, "width": 8, "hidden": 12, "heads": 2, "heldout": 32, "seeds": 1, "steps": 16}


def test_the_patched_query_predicts_what_it_predicts_in_context(tmp_path):
    """Also by hand, in NumPy; broken: the stream is not shifted, or the update belongs to another sequence."""
    config = Config(out=tmp_path, **TINY)
    block = start(jax.random.key(0), config)
    tokens, answers = sequences(jax.random.key(1), 32, config)
    np.testing.assert_array_equal(np.asarray(tokens)[:, -1, -1], 0)
    found = losses(block, tokens, answers)
    assert found["apart"] < 1e-5 and abs(found["patched"] - found["with context"]) < 1e-4 * found["alone"]
    assert abs(found["alone"] - found["with context"]) > 1e-2 * found["alone"]
    z_context, z = block.contextual(tokens[0]), block.contextual(tokens[0, -1:])
    wanted = float(block(tokens[0]))
    weight = np.asarray(block.mlp.up_proj.weight, np.float64)
    update = np.outer(z, np.asarray(z_context - z, np.float64) @ weight) / float(z @ z)
    hidden = jax.nn.gelu(jnp.asarray(np.asarray(z) @ (weight + update), jnp.float32), approximate=False)
    out = block.mlp.down_proj(hidden) + (z_context - z)
    assert abs(float(block.read(z + out)[0]) - wanted) < 1e-4 * abs(wanted) + 1e-5
    left = eqx.tree_at(lambda b: b.mlp, block, context.updated_mlp(block.mlp, z_context, z))(tokens[0, -1:])
    other = context.updated_mlp(block.mlp, block.contextual(tokens[1]), z, z_context - z)
    other = eqx.tree_at(lambda b: b.mlp, block, other)(tokens[0, -1:])
    assert min(abs(float(left) - wanted), abs(float(other) - wanted)) > 1e-2 * abs(wanted)


def test_steps_are_differences_of_updates(tmp_path):
    config = Config(out=tmp_path, **TINY)
    block = start(jax.random.key(2), config)
    tokens, _ = sequences(jax.random.key(3), 1, config)
    weight = np.asarray(block.mlp.up_proj.weight)
    z = [np.asarray(block.contextual(jnp.concatenate([tokens[0, :i], tokens[0, -1:]]))) for i in range(6)]
    updates = [np.outer(z[0], (each - z[0]) @ weight) / (z[0] @ z[0]) for each in z]
    wanted = [np.linalg.norm(after - before) for before, after in pairwise(updates)]
    np.testing.assert_allclose(update_steps(block, tokens), wanted / np.linalg.norm(weight), rtol=1e-4)
    assert abs(slope(np.array([9.0, *(1 / np.arange(2, 6))])) + 1) < 1e-9


def test_the_experiment_writes_its_three_losses(tmp_path):
    main(Config(out=tmp_path, **TINY))
    (found,) = json.loads((tmp_path / "results.json").read_text())
    assert [row["step"] for row in found["losses"]] == [2 * number for number in range(9)]
    assert all(row["apart"] < 1e-4 for row in found["losses"]) and len(found["steps trained"]) == 5
