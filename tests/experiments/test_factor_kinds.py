"""Kinds of MLP at equal numbers: each group has one size, all learn, and a wrong start is one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.factor_kinds import kinds, train
from tests.methods.factor.small_digits import digits


def numbers(start):
    made = eqx.filter_eval_shape(start, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(made))


def test_each_group_has_one_size():
    sizes = {name: numbers(start) for name, start in kinds(16, 64).items()}
    assert sizes["narrow dense"] == sizes["mixer"] == sizes["PK"] == 4096
    assert sizes["GELU"] == 2 * 256 * 64 + 64 + 256
    activations = 2 * (6 + 8 * 4)
    assert sizes["KAT"] == sizes["KAT, wrong start"] == sizes["GELU"] + activations


def test_a_wrong_start_is_no_gelu_and_the_right_one_is_swish():
    x = jnp.linspace(-3, 3, 48).reshape(6, 8)
    made = {name: kinds(16, 64)[name](jax.random.key(0)) for name in ("KAT", "KAT, wrong start")}
    off = lambda mlp, f: float(jnp.abs(mlp.second(x) - f(x)).max())
    assert off(made["KAT"], jax.nn.silu) < 1e-3
    assert off(made["KAT, wrong start"], jax.nn.gelu) > 0.5


def test_a_kat_learns_digits_from_one_key():
    x, y = digits()
    start = kinds(8, 16)["KAT"]
    sizes = {"d": 64, "batch_size": 64, "learning_rate": 1e-2, "decay": 0.1}
    run = eqx.filter_jit(lambda key: train(start, key, x[:1000], y[:1000], steps=120, **sizes))
    found = run(jax.random.key(0))
    right = float(np.mean(np.argmax(found.model(x[1000:]), axis=1) == np.asarray(y[1000:])))
    assert right > 0.7 and float(found.first_loss) > 2
