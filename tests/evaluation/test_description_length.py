"""Description length against entropies that are known, and against counting by hand."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.decompositions.directions import Directions
from jaxinterp.evaluation.description_length import description_length, entropy_bits


def identity(d, scale=1.0):
    eye = jnp.eye(d)
    return Directions(eye / scale, eye * scale, jnp.ones(d), jnp.zeros(d), jnp.ones(()), Sites("x", "x"))


def by_hand(numbers):
    """numbers [tokens, components]: sum of plug-in entropies."""
    total = 0.0
    for column in np.asarray(numbers).T:
        counts = np.array(list(Counter(column.tolist()).values())) / len(column)
        total -= float(np.sum(counts * np.log2(counts)))
    return total


def test_entropies_are_those_counted_by_hand():
    numbers = np.random.default_rng(0).integers(-2, 3, (300, 7))
    numbers[:, 3] = 0
    component = np.broadcast_to(np.arange(7), numbers.shape)
    assert entropy_bits(numbers.ravel(), component.ravel(), 300) == pytest.approx(by_hand(numbers), abs=1e-9)
    without_zeros = entropy_bits(numbers.ravel(), component.ravel(), 300) - by_hand(np.where(numbers == 0, 9, numbers))
    assert without_zeros == pytest.approx(0, abs=1e-9)


def test_coins_take_a_bit_each_and_rare_codes_less():
    """Values ±1, each half of the time: 1 bit; active (always 1) in 1 of 8 tokens: H(1/8) bits."""
    tokens = 4096
    coin = jnp.where(jnp.arange(tokens) % 2 == 0, 1.0, -1.0)
    rare = jnp.where(jnp.arange(tokens) % 8 == 3, 1.0, 0.0)
    x = jnp.stack([coin, rare], axis=1)
    found = description_length(identity(2), x, variance=1.1)
    rare_bits = -(math.log2(1 / 8) / 8 + 7 / 8 * math.log2(7 / 8))
    assert found.bits == pytest.approx(1 + rare_bits, abs=1e-6) and found.change <= 0.01


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_the_precision_is_the_largest_that_keeps_the_tolerance(scale):
    """Gaussian coordinates: the error of rounding is step^2 / 12, the entropy h - log2(step), in any unit."""
    x = jax.random.normal(jax.random.key(0), (20_000, 3))
    found = description_length(identity(3, scale), x, variance=3.0)
    step = math.sqrt(12 * 0.01)
    assert 0.009 < found.change <= 0.01
    assert found.step == pytest.approx(step, rel=0.03)
    assert found.bits == pytest.approx(3 * (0.5 * math.log2(2 * math.pi * math.e) - math.log2(step)), rel=0.02)
    finer = description_length(identity(3, scale), x, variance=3.0, tolerance=0.01 / 4)
    assert finer.bits == pytest.approx(found.bits + 3, rel=0.02), "half the step: a bit more for each coordinate"


class Sparse(Directions):
    """The same codes, held as sparse ones in another order."""

    def encode(self, x, *, k=None, weight=None, training=False):
        values = super().encode(x).values
        order = jnp.argsort(-jnp.abs(values), axis=-1)
        return SparseCodes(jnp.take_along_axis(values, order, axis=-1), order, values.shape[-1])


def test_sparse_and_dense_codes_are_the_same_to_it():
    x = jax.random.normal(jax.random.key(1), (500, 4)) * (jax.random.uniform(jax.random.key(2), (500, 4)) < 0.3)
    dense = identity(4)
    sparse = Sparse(*(getattr(dense, name) for name in dense.__dataclass_fields__))
    assert isinstance(dense.encode(x), DenseCodes) and isinstance(sparse.encode(x), SparseCodes)
    assert description_length(sparse, x, 1.2) == pytest.approx(description_length(dense, x, 1.2), rel=1e-5)


def test_wrong_numbers_are_refused():
    with pytest.raises(UserError, match="must be positive"):
        description_length(identity(2), jnp.ones((4, 2)), variance=0.0)


def test_a_component_next_to_nothing_takes_no_bits():
    """Its squares are 0 in float32: it was divided by 0, no step was fine enough, and every code took all its bits."""
    x = jax.random.normal(jax.random.key(1), (4096, 2))
    alone = description_length(identity(2), x, variance=2.0)
    beside = description_length(identity(3), jnp.concatenate([x, jnp.full((4096, 1), 1e-25)], axis=1), variance=2.0)
    assert beside.bits == pytest.approx(alone.bits, rel=1e-6) and beside.change == pytest.approx(alone.change, rel=1e-4)
