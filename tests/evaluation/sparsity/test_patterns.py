"""Patterns against brute force on a small network; each with a variant that must fail."""

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.patterns import certified, follows, mine_pattern, quality


def network(seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(2, 6)), rng.normal(size=6)), (rng.normal(size=(6, 5)), rng.normal(size=5)),
            (rng.normal(size=(5, 3)), rng.normal(size=3))]  # fmt: skip


def forward(layers, x):
    hidden = []
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight + bias, 0)
        hidden.append(x)
    return hidden, (x @ layers[-1][0] + layers[-1][1]).argmax(-1)


def test_mined_patterns_cover_what_they_say():
    layers = network(2)
    x = np.random.default_rng(1).normal(size=(400, 2))
    hidden, labels = forward(layers, x)
    label = int(np.bincount(labels).argmax())
    own = [layer[labels == label] for layer in hidden]
    strict, loose = mine_pattern(own), mine_pattern(own, 0.7)
    assert quality(strict, hidden, labels, label).coverage == 1.0
    found = quality(loose, hidden, labels, label)
    kept = follows(loose, hidden)
    assert loose.size() > strict.size() and found.coverage < 1.0
    assert found.accuracy == pytest.approx((labels[kept] == label).mean())
    for row in np.flatnonzero(kept)[:20]:
        assert all((layer[row][on] > 0).all() for layer, on in zip(hidden, loose.on, strict=True))
    another = int(np.setdiff1d(labels, [label])[0])
    other = quality(loose, hidden, labels, another)  # broken: the pattern of another class
    assert other.coverage < found.coverage
    with pytest.raises(UserError, match=r"share=0\.4 must"):
        mine_pattern(own, 0.4)


def test_what_is_certified_holds_for_every_sample_and_a_pattern_proves_more():
    rng = np.random.default_rng(2)
    proved, more = 0, 0
    for seed in range(20):
        layers = network(seed)
        centre = rng.normal(size=2)
        hidden, labels = forward(layers, centre[None])
        pattern = mine_pattern(hidden)
        for radius in (0.02, 0.2, 0.6):
            low, high = centre - radius, centre + radius
            plain = certified(layers, low, high, int(labels[0]))
            narrow = certified(layers, low, high, int(labels[0]), pattern)
            samples = rng.uniform(low, high, size=(500, 2))
            inside, answers = forward(layers, samples)
            if plain:
                assert (answers == labels[0]).all()
            if narrow:
                assert (answers[follows(pattern, inside)] == labels[0]).all()
            assert narrow >= plain
            proved, more = proved + plain, more + (narrow and not plain)
            wrong = certified(layers, low, high, int(labels[0] + 1) % 3)
            assert not wrong  # broken: another label
    assert proved > 10 and more > 2
