"""A transcoder of a whole mixture and of one of its experts, in a tiny Qwen3-MoE: trained and scored."""

import grain
import numpy as np
import pytest

from jaxinterp.data.activations import harvest
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods import Transcoder
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sites import open_experts
from jaxinterp.training.fit import fit
from tests.models.model_files import GOLDENS

METHOD = Transcoder(features=24, k=4, auxk=0.0, learning_rate=1e-2)


def text():
    rng, weight = np.random.default_rng(0), np.ones(16, np.float32)
    windows = [
        {"tokens": rng.integers(0, 48, 16, np.int32), "weight": weight, "document": np.full(16, number, np.int32)}
        for number in range(64)
    ]
    return grain.MapDataset.source(windows)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["blocks/1/mlp", "blocks/1/mlp/experts/3"])
def test_a_transcoder_of_a_mixture_and_of_one_expert(site: str) -> None:
    model = open_experts(load(GOLDENS / "qwen3-moe", dtype="float32").model, "blocks/1/mlp", 3)
    subject = Subject(model, None, "tiny Qwen3-MoE")
    result = fit(METHOD, subject, text(), site=site, steps=60, batch_size=64, buffer_batches=2, progress=False)
    assert result.decomposition.sites.reads == f"{site}/in"
    row = score(result.decomposition, subject, text(), tokens=512, ce_tokens=512)
    assert 0 < row["fvu"] < 0.9 and row["ce_clean"] != row["ce_replaced"], row


def test_rows_of_an_expert_are_its_tokens() -> None:
    model = open_experts(load(GOLDENS / "qwen3-moe", dtype="float32").model, "blocks/1/mlp", 3)
    windows = {"tokens": np.arange(32).reshape(2, 16) % 48, "weight": np.ones((2, 16), np.float32)}
    rows = harvest(model, windows, ("blocks/1/mlp/experts/3/in", "blocks/1/mlp/experts/3/out"))
    index = run(model, windows["tokens"])["blocks/1/mlp/experts/index"]
    np.testing.assert_array_equal(np.asarray(rows.weight), np.any(np.asarray(index) == 3, axis=-1))
    assert 0 < rows.weight.sum() < 32
