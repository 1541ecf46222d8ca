"""The table of families: sizes that survive a resumption, equal parameters, who is ranked and who is not."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from experiments.compare_families import QUICK, Config, falls, sized
from experiments.every_family import Shape, families
from experiments.families_page import marked, status
from jaxinterp.core.batch import make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import as_needs
from jaxinterp.methods.recipes import one_pass

OUT = Path("runs") / "never_made"


def test_sizes_survive_a_resumption():
    """What is kept in the folder, --quick and the sizes, gives the same sizes again; what is asked for stands."""
    config, plan = sized(Config(out=OUT, quick=True))
    assert plan == QUICK and sized(config) == (config, plan)
    _, other = sized(Config(out=OUT, quick=True, ks=(4, 8), features=100))
    assert other == QUICK._replace(ks=(4, 8), features=100)
    with pytest.raises(UserError, match="ks"):
        sized(Config(out=OUT, ks=()))


@pytest.mark.parametrize("d", [64, 576])
def test_families_of_free_size_have_equal_parameters(d):
    """Within a twelfth of a dictionary of `features`, counted on start values from shapes alone."""
    site, features = "blocks/1/mlp", 16 * d // 4
    made = families(site, Shape(d, 3 * d, 3), features=features, k=16, rate=1e-3, tokens=1024, batch_size=256)
    budget = 2 * d * features
    for name, family in made.items():
        if not family.sized or name == "parameter components":  # needs the model; its count is in `families`
            continue
        sites = as_needs(family.method.needs(site)).sites
        arrays = {each: jnp.zeros((512, d)) for each in sites.names()}
        sample = make_batch(arrays, jnp.ones(512), sites)
        recipe = one_pass(family.method, 4)
        start = eqx.filter_eval_shape(
            lambda key, sample=sample, recipe=recipe: recipe.init(key, sample, None), jax.random.key(0)
        )
        count = sum(leaf.size for leaf in jax.tree.leaves(start.decomposition))
        assert count == pytest.approx(budget, rel=1 / 12), name


def test_only_rows_that_are_comparable_are_ranked():
    row = {"sized": True, "falls": 0.0, "active": 32.0, "k": 32, "reads": "in", "fvu": 0.3}
    assert status(row, 32) == "" and status(row | {"sized": False}, 32) == "reference"
    assert status(row | {"falls": 0.03}, 32) == "undertrained" and status(row | {"active": 40.0}, 32) == "other L0"
    rows = [row, row | {"fvu": 0.2}, row | {"reads": "out", "fvu": 0.1}, row | {"falls": 0.5, "fvu": 0.0}]
    assert [each["status"] for each in marked(rows)] == ["2 of 2", "1 of 2", "1 of 1", "undertrained"]


def test_a_loss_that_falls_is_seen():
    assert falls([1.0] * 100) == 0
    late = [1.0] * 90 + [0.9] * 10
    assert falls(late) == pytest.approx(0.1) and falls([5.0] * 50 + [1.0] * 50) == 0
