"""Hidden experts on inputs that are sums of a few dictionary vectors, against their Gaussian twin."""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.factor_experts import Config, errors, students, toy_inputs


@pytest.mark.slow
def test_experts_gain_more_on_sparse_inputs_than_on_the_gaussian_twin():
    """Ratio of FVUs (experts / dense, 16 active neurons each): at least .08 lower on the real inputs, three seeds.

    Measured with 400 steps of 512 at 1e-2, seed 0: .673 and .777. The control is the twin itself: the same code, MLP,
    mean and covariance.
    """
    ratios = []
    for seed in range(3):
        config = Config(
            Path("unused"), problem="toy", experts=1024, inputs=40_000, steps=400, learning_rate=1e-2, seed=seed
        )
        x, mlp = toy_inputs(jax.random.key(seed), config.inputs)
        methods = {name: method for name, method in students(config).items() if name in ("dense", "low rank, start k")}
        found = errors(config, methods, x, mlp)
        ratios.append([found["low rank, start k"][kind] / found["dense"][kind] for kind in ("real", "twin")])
    real, twin = np.mean(ratios, axis=0)
    assert real < twin - 0.08, ratios
