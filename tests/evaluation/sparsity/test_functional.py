"""Density, functional L0 and CETT as columns of the scoreboard, against the measure on dense codes."""

import math

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.decompositions.plain import Neurons
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.evaluation.sparsity.functional import functional, needed_at, parts_of
from jaxinterp.evaluation.sparsity.measures import cett_threshold, functional_l0
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from tests.evaluation.whole import Whole as WithoutVectors
from tests.helpers import random_dictionary

SITE = "blocks/1/mlp"
SITES = Sites(f"{SITE}/in", f"{SITE}/out")


class Whole(eqx.Module):
    """The MLP itself, with its matrices as encoder and decoder."""

    mlp: eqx.Module
    encoder: jax.Array
    decoder: jax.Array
    target_mean: jax.Array
    sites: Sites = eqx.field(static=True)

    def encode(self, x, **_):
        return DenseCodes(self.mlp.hidden(x))

    def decode(self, codes, x):
        return self.mlp.write(codes.values)

    def __call__(self, x):
        return self.mlp(x)


@pytest.fixture(scope="module")
def heldout():
    rng = np.random.default_rng(0)
    weight = (np.arange(16) > 0).astype(np.float32)
    rows = [{"tokens": rng.integers(0, 256, 16).astype(np.int32), "weight": weight} for _ in range(24)]
    return grain.MapDataset.source([row | {"document": np.full(16, i, np.int32)} for i, row in enumerate(rows)])


@pytest.mark.slow
def test_the_columns_are_those_of_the_measure(heldout):
    subject = load("tiny")
    mlp = subject.model.blocks[1].mlp
    whole = Whole(mlp, mlp.up_proj.weight.T, mlp.down_proj.weight, jnp.zeros(64), SITES)
    sparse = random_dictionary(TopK(4), d_in=64, d_out=64)
    neurons = Neurons(mlp, jnp.zeros(mlp.down_proj.weight.shape[0]), jnp.zeros(64), 8, SITES)
    given = {"whole": whole, "sparse": sparse, "neurons": neurons}
    options = {"tokens": 384, "ce_tokens": 64}
    rows = scoreboard(given, subject, heldout, effect=functional(0.3, most=2048), **options)
    plain = scoreboard(given, subject, heldout, **options)
    tokens = jnp.asarray(np.concatenate([batch["tokens"] for batch in take(heldout, 384)]))
    x = run(subject.model, tokens)[SITES.reads][:, 1:].reshape(-1, 64)
    for row, before, own in zip(rows, plain, given.values(), strict=True):
        same = [key for key, value in before.items() if isinstance(value, float)]
        assert [row[key] for key in same] == pytest.approx([before[key] for key in same], nan_ok=True)
        codes = own.encode(x)
        decoder = mlp.down_proj.weight if own is neurons else own.decoder
        sizes = np.abs(np.asarray(codes.dense())) * np.linalg.norm(decoder, axis=-1)
        found = cett_threshold(codes.dense(), decoder, 0.3, candidates=np.unique(sizes))
        assert row["functional_l0"] == pytest.approx(found.ratio * sizes.shape[1], rel=1e-2)
        assert row["functional_cett"] == pytest.approx(found.achieved, abs=1e-2) and row["functional_cett"] <= 0.3
        assert row["density"] == pytest.approx(float(np.mean(np.asarray(codes.dense()) != 0)), rel=1e-3)
        assert row["functional_l0"] < row["l0"]
        coarse = functional_l0(codes.dense(), decoder, 0.3)  # the authors' grid of thresholds
        assert row["functional_l0"] == pytest.approx(coarse.needed, rel=0.1)
    unit = np.asarray(sparse.decoder) / np.linalg.norm(sparse.decoder, axis=-1, keepdims=True)
    skewed = eqx.tree_at(lambda d: d.decoder, sparse, jnp.asarray(unit * np.geomspace(0.01, 100, len(unit))[:, None]))
    broken = scoreboard({"skewed": skewed}, subject, heldout, effect=functional(0.3), **options)[0]
    assert broken["functional_l0"] < 0.8 * rows[1]["functional_l0"]  # sizes are those of what is written, not codes


def test_one_row_by_hand_and_what_is_not_known():
    """Three features write 3, 2 and 1 along three axes."""
    parts = parts_of(DenseCodes(jnp.asarray([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]])), jnp.eye(3))
    np.testing.assert_allclose(parts.sizes[0], [3, 2, 1])
    np.testing.assert_allclose(parts.missing[0], np.sqrt([14, 5, 1, 0]) / np.sqrt(14), atol=1e-6)
    sizes, missing = (np.asarray(part) for part in parts)
    assert np.isnan(missing[1]).all()
    assert needed_at(sizes, missing, 0.3) == pytest.approx((2, np.sqrt(1 / 14)), rel=1e-6)
    assert needed_at(sizes, missing, 0.0) == (3, 0)
    assert needed_at(sizes, missing, 0.999)[0] == 1
    cut = parts_of(DenseCodes(jnp.asarray([[1.0, -2.0, 3.0]])), jnp.eye(3), 2)
    sizes, missing = (np.asarray(part) for part in cut)
    assert math.isnan(needed_at(sizes, missing, 0.2).needed)  # the third was not looked at
    assert needed_at(sizes, missing, 0.7)[0] == 1
    assert math.isnan(needed_at(sizes[:0], missing[:0], 0.2).needed)


def test_rows_without_a_decoder_are_undefined_and_a_bad_target_is_refused(heldout):
    subject = load("tiny")
    plain = WithoutVectors(subject.model.blocks[1].mlp, jnp.zeros(64), SITES)
    row = scoreboard({"plain": plain}, subject, heldout, effect=functional(), tokens=64, ce_tokens=64)[0]
    assert math.isnan(row["functional_l0"]) and math.isnan(row["density"]) and row["l0"] > 0
    effect = functional(0.1)
    assert [column.key for column in effect.columns[len(NEXT_TOKEN.columns) :]][1] == "functional_l0"
    with pytest.raises(UserError, match=r"target=1\.0 must be"):
        functional(1.0)
