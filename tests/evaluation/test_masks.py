"""The table of masks against edits of the model written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import make_batch
from jaxinterp.core.sites import Sites
from jaxinterp.evaluation.language_loss import language_loss
from jaxinterp.evaluation.masks import mask_table
from jaxinterp.methods.factor.parameter_training import start
from jaxinterp.methods.factor.targets import ProjectionTarget
from jaxinterp.models.layers import Linear
from jaxinterp.models.sites import replace
from tests.methods.laboratory import SITE, subject, text

NAMES = (f"{SITE}/up_proj", f"{SITE}/down_proj")


@pytest.fixture(scope="module")
def table():
    model, target = subject().model, ProjectionTarget(NAMES)
    held = {name: jnp.stack([text()[i][name] for i in range(2)]) for name in ("tokens", "weight", "document")}
    batch = make_batch({}, jnp.zeros(0), Sites((), ()), windows=held)
    learned = start(target, jax.random.key(0), model, 5, 4)
    rows = mask_table(target, learned, model, batch, jax.random.key(1), ascents=3)
    return {row["mask"]: row for row in rows}, learned, held


def with_matrices(model, matrices):
    old = {name: getattr(model.blocks[1].mlp, name.rpartition("/")[2]) for name in NAMES}
    return replace(model, {name: Linear(matrix, old[name].bias, old[name].cut) for name, matrix in matrices.items()})


def test_all_and_none_are_the_model_with_the_sums_of_parts_and_with_nothing(table):
    rows, learned, _ = table
    model, windows = subject().model, text()[:2]
    sums = {name: own.read.T @ own.write for name, own in learned.parts.items()}
    wanted = {
        "clean": model,
        "all": with_matrices(model, sums),
        "none": with_matrices(model, jax.tree.map(jnp.zeros_like, sums)),
    }
    for name, changed in wanted.items():
        assert rows[name]["ce"] == pytest.approx(language_loss(changed, windows)["ce"], rel=1e-5), name
    assert rows["all"]["l0"] == 10 and rows["none"]["l0"] == 0 and rows["clean"]["kl"] == 0
    assert rows["none"]["kl"] > 0 and rows["none"]["ce"] != pytest.approx(rows["all"]["ce"], rel=1e-4)


def test_open_parts_are_counted_and_the_adversary_does_harm(table):
    rows, learned, held = table
    reads = (
        ProjectionTarget(NAMES).clean(subject().model, make_batch({}, jnp.zeros(0), Sites((), ()), windows=held)).reads
    )
    opened = sum(float(jnp.mean(jnp.sum(g.lower > 0, axis=-1))) for g in learned.importances(reads).values())
    assert rows["importance"]["l0"] == rows["rounded"]["l0"] == pytest.approx(opened, rel=1e-6)
    assert rows["importance"]["kl"] != pytest.approx(rows["rounded"]["kl"], rel=1e-4)
    assert rows["adversarial"]["kl"] > rows["stochastic"]["kl"]
    assert np.isfinite([row["ce"] for row in rows.values()]).all()
