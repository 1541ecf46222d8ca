"""Numbers that are undefined: one line before training, NaN without a warning in Python, null in JSON."""

import json
import math
import warnings
from dataclasses import replace

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import Rows, check_varies
from jaxinterp.evaluation.effects import Table
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.scoreboard import row_of
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.storage.json_text import json_text
from jaxinterp.training.fit import fit
from jaxinterp.training.tracking import JsonLines, read_rows

SIZES = {"site": "blocks/1/mlp", "steps": 1, "batch_size": 64, "buffer_batches": 2}


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(0).integers(0, 256, (16, 32), np.int32)
    weight = np.ones(32, np.float32)
    rows = [{"tokens": row, "weight": weight, "document": np.full(32, i, np.int32)} for i, row in enumerate(tokens)]
    return grain.MapDataset.source(rows)


@pytest.mark.parametrize(
    ("method", "target", "bias"),
    [(SkipTranscoder(features=16, k=2), "out", 0.0), (SparseAutoencoder(features=16, k=2, array="out"), "out", 3.7)],
)
def test_a_constant_target_is_one_line_before_training(text, method, target, bias):
    """A sublayer that was zeroed, or whose down projection was: its output is its bias."""
    model = planted_transformer(jax.random.key(0), TINY)
    down = lambda model: model.blocks[1].mlp.down_proj
    dead = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias), down(model), (0 * down(model).weight, jnp.full(64, bias))
    )
    subject = Subject(eqx.tree_at(down, model, dead), None, "pruned")
    with pytest.raises(UserError, match=f"'blocks/1/mlp/{target}' is the same for every token .*Choose another site"):
        fit(method, subject, text, **SIZES)


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 1e4])
def test_constant_within_rounding_and_varying_however_little(value):
    rng = np.random.default_rng(0)
    constant = np.full((4, 9, 5), value, np.float32)
    weight = np.ones((4, 9), np.float32)
    with pytest.raises(UserError, match="'y' is the same for every token"):
        check_varies(Rows({"y": jnp.asarray(constant)}, jnp.asarray(weight)), ("y",))
    little = constant + 1e-4 * max(value, 1e-6) * rng.normal(size=constant.shape).astype(np.float32)
    check_varies(Rows({"y": jnp.asarray(little)}, jnp.asarray(weight)), ("y",))
    only = constant.copy()
    only[0, 0] += 7  # what has no weight does not count
    weight[0, 0] = 0
    with pytest.raises(UserError, match="the same for every token"):
        check_varies(Rows({"y": jnp.asarray(only)}, jnp.asarray(weight)), ("y",))


def table(spread, size, counted=1.0):
    made = Table()
    ones = np.ones(6)
    made.add(document=ones, weight=ones, squares=ones, spread=spread * ones, size=size * ones, active=ones)
    made.add(fired=np.array([1.0, 0.0]), counted=counted * ones, item_document=ones)
    return made


@pytest.mark.parametrize(("spread", "size"), [(0.0, 0.0), (0.0, 5.0), (1e-13, 1.0)])
def test_a_row_of_an_undefined_fvu_has_no_warning_and_is_json(spread, size):
    effect = replace(NEXT_TOKEN, numbers=lambda table: {"ce": table.mean("active")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = row_of("x", Sites("a", "b"), table(spread, size, counted=0.0), effect)
    assert math.isnan(row["fvu"]) and math.isnan(row["ce"]) and all(math.isnan(bound) for bound in row["fvu_interval"])
    read = json.loads(json_text(row), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["fvu"] is None and read["fvu_interval"] == [None, None] and read["l0"] == 1.0
    assert "NaN" in json.dumps(row), "what was written before"
    assert row_of("x", Sites("a", "b"), table(2.0, 5.0), effect)["fvu"] == 0.5


def test_an_interval_without_a_denominator_is_undefined():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(ratio_interval(np.ones(4), np.zeros(4), np.arange(4))).all()
        assert ratio_interval(np.ones(4), np.full(4, 2.0), np.arange(4)) == (0.5, 0.5)


def test_numbers_become_json():
    value = {"a": [math.inf, -math.inf, 1.5], "b": np.float32("nan"), "c": np.int64(3), "d": (True, None, "NaN")}
    assert json.loads(json_text(value)) == {"a": [None, None, 1.5], "b": None, "c": 3, "d": [True, None, "NaN"]}


def test_the_log_is_json(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log({"step": 1, "fvu": math.nan, "loss": 0.5})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "fvu": null, "loss": 0.5}\n'
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1, "fvu": None, "loss": 0.5}]
