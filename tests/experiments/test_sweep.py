"""A sweep: its runs by name, what is refused, and that each is what it is alone."""

import json
from functools import partial

import numpy as np
import pytest
import tyro

from jaxinterp.commands.on_text import prepared
from jaxinterp.commands.sweep import Config, combinations, main, method_of, reading, stability
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.files import load_dictionary
from jaxinterp.training.fit import fit

SMALL = {"model": "tiny", "tokens": 10_240, "seq": 32, "batch_size": 512, "heldout_tokens": 1024, "ce_tokens": 512}
swept = partial(Config, **SMALL, features=64)


def test_every_combination_has_a_name_and_values_of_the_fields_type(tmp_path):
    found = combinations(swept(tmp_path, sweep=("k=4,8", "seed=0..2")))
    assert list(found) == [f"k={k}, seed={seed}" for k in (4, 8) for seed in (0, 1, 2)]
    assert found["k=8, seed=2"] == {"k": 8, "seed": 2}
    scaled = combinations(swept(tmp_path, sweep=("normalise=True,False",)))
    assert [setting["normalise"] for setting in scaled.values()] == [True, False]
    rates = combinations(swept(tmp_path, sweep=("learning_rate=0.001,0.01",), method="sparse_autoencoder"))
    assert [setting["learning_rate"] for setting in rates.values()] == [0.001, 0.01]


def test_the_command_line_sweeps_what_it_is_told_to_and_nothing_else():
    """Options that may be repeated are appended to a default that is not empty."""
    asked = tyro.cli(Config, args=["--out", "unused", "--sweep", "k=2,4", "--sweep", "seed=0,1"])
    assert list(combinations(asked)) == ["k=2, seed=0", "k=2, seed=1", "k=4, seed=0", "k=4, seed=1"]
    assert len(combinations(tyro.cli(Config, args=["--out", "unused"]))) == 9
    assert list(combinations(tyro.cli(Config, args=["--out", "unused", "--method", "gated"]))) == [
        f"seed={seed}" for seed in range(3)
    ]
    with pytest.raises(UserError, match="gated has no 'k' to sweep"):
        combinations(tyro.cli(Config, args=["--out", "unused", "--method", "gated", "--sweep", "k=1,2"]))


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (("k",), "write it as k=16,32,64"),
        (("kk=1,2",), "skip_transcoder has no 'kk' to sweep. Did you mean 'k'"),
        (("k=1,x",), "sweep k=x must be of type int"),
        (("k=1,1",), "1 stands there 2 times"),
        (("seed=3..0",), "sweep seed=3..0 is empty"),
        (("k=1", "k=2"), "k stands there twice"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(tmp_path, sweep, words):
    with pytest.raises(UserError, match=words):
        combinations(swept(tmp_path, sweep=sweep))


def test_only_seeds_of_one_setting_are_compared_and_only_their_live_rows():
    class Found:
        def __init__(self, rows, since):
            self.decoder, self.tokens_since_fired = np.asarray(rows, float), np.asarray(since)

    settings = {name: {"k": int(name[0]), "seed": int(name[1])} for name in ("10", "11", "20")}
    found = {
        "10": Found([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [0, 0, 99]),
        "11": Found([[0, 1, 0], [1, 0, 0], [1, 1, 1]], [0, 5, 50]),
        "20": Found([[1, 0, 0]], [0]),
    }
    assert stability(settings, found, dead_after=10) == {"k=1": pytest.approx(1.0)}
    rows = [{"method": "k=1, seed=0", "ce_replaced": 2.0, "ce_clean": 1.0, "l0": 4.0}]
    assert "k=1, seed=0 (2.000; unchanged 1.000)" in reading(rows, {"k=1": 1.0})[0]


@pytest.mark.slow
def test_each_run_is_what_it_is_alone(tmp_path):
    """Losses to the dictionaries' weights; one scoreboard; seeds compared."""
    config = swept(tmp_path / "sweep", sweep=("k=4,8", "seed=0..1", "features=32,64"))
    main(config)
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert [row["method"] for row in rows] == list(combinations(config)) and len(rows) == 8
    assert all(0.2 < row["stability"] < 1 for row in rows)
    ready = prepared(swept(tmp_path / "alone"))
    method = method_of(config, {"k": 8, "seed": 1, "features": 32})
    sizes = {"site": config.site, "steps": config.steps, "batch_size": 512}
    alone = fit(method, ready.subject, ready.train, **sizes).decomposition[0]
    loaded = load_dictionary(tmp_path / "sweep" / "dictionaries" / "k=8,seed=1,features=32")
    for name, leaf in named_leaves(alone).items():
        np.testing.assert_allclose(named_leaves(loaded)[name], leaf, atol=1e-5, err_msg=name)
