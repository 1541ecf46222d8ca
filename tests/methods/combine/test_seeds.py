"""Several seeds in one program: each is what it is alone, the model runs once, and stability is high where k is right.

Invariants 5 and 9. Plant: 24 rows in 16 dimensions, 2 active, 48 learned; measured over the live rows of three seeds:
mean matched cosine 0.88 and share above 0.9 0.79 at k = 2, 0.72 and 0.28 at k = 6.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import Rows
from jaxinterp.evaluation.planted.laboratory import Plant, train
from jaxinterp.evaluation.stability import compare_seeds
from jaxinterp.methods import Method, PerLayerTranscoders, SparseAutoencoder, Transcoder
from jaxinterp.methods.combine.seeds import Seeds
from jaxinterp.models.tiny import unit_rows
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.state import make_step, start_state
from tests.methods.laboratory import SITE, subject, text

METHOD = SparseAutoencoder(features=96, k=4, learning_rate=3e-3, dead_after=500)
SIZES = {"site": SITE, "steps": 12, "batch_size": 256, "buffer_batches": 4, "log_every": 1}


def close(one, other, tolerance=1e-5):
    leaves = named_leaves(other)
    for name, leaf in named_leaves(one).items():
        np.testing.assert_allclose(np.asarray(leaves[name]), leaf, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_each_seed_is_what_it_is_alone_and_no_two_are_alike():
    together = fit(Seeds(METHOD, 3), subject(), text(), **SIZES)
    assert isinstance(Seeds(METHOD, 3), Method) and len(together.decomposition) == 3
    alone = fit(METHOD, subject(), text(), **SIZES)
    close(alone.decomposition, together.decomposition[0])
    last = fit(Seeds(METHOD, 1, first=2), subject(), text(), **SIZES)
    close(last.decomposition[0], together.decomposition[2])
    rows = [np.asarray(each.decoder) for each in together.decomposition]
    assert compare_seeds(rows).cosine < 0.9
    assert alone.history[-1]["loss"] == pytest.approx(together.history[-1]["loss"], rel=0.1)
    assert alone.history[-1]["loss"] != pytest.approx(together.history[-1]["loss"], rel=1e-6), "a mean over seeds"


def uses_of_the_model(method):
    """How often the model's up projection is multiplied by in the training program of one step."""
    model, mesh, sites = subject().model, make_mesh(), method.needs(SITE)
    recipe = method.recipe(20)
    shape = model.blocks[1].mlp.up_proj.weight.shape
    assert shape == (64, 128) and 96 not in shape
    windows = {"tokens": jnp.zeros((8, 32), jnp.int32), "weight": jnp.ones((8, 32))}
    buffer = Rows({name: jnp.ones((8, 128, 64)) for name in sites.names()}, jnp.ones((8, 128)))
    with jax.set_mesh(mesh):
        state = eqx.filter_eval_shape(start_state, recipe, sites, mesh, model, buffer, 0)
        program = jax.make_jaxpr(make_step(recipe, sites, mesh))((model, windows), state)
    products = [each for each in equations(program.jaxpr) if each.primitive.name == "dot_general"]
    return sum(each.invars[1].aval.shape == shape for each in products)


def equations(program):
    """Those of the program and of all programs inside it."""
    for equation in program.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_the_model_runs_once_for_all_seeds():
    one, three = uses_of_the_model(METHOD), uses_of_the_model(Seeds(METHOD, 3))
    assert one == three > 0


def test_another_number_of_seeds_does_not_resume(tmp_path):
    method, sizes = Seeds(Transcoder(features=16, k=4), 2), SIZES | {"steps": 1, "checkpoint": tmp_path / "c"}
    fit(method, subject(), text(), **sizes)
    with pytest.raises(UserError, match=r"made with method\.count=2, not 3"):
        fit(Seeds(method.method, 3), subject(), text(), **sizes, resume=True)


@pytest.mark.slow
def test_seeds_of_methods_of_several_layers():
    method = Seeds(PerLayerTranscoders(Transcoder(features=16, k=4, learning_rate=3e-3)), 2)
    first, second = fit(method, subject(), text(), **SIZES | {"site": "blocks/*/mlp", "steps": 2}).decomposition
    assert len(first.parts) == len(second.parts) == 4
    assert float(jnp.abs(first.parts[0].encoder - second.parts[0].encoder).max()) > 1e-3


@pytest.mark.parametrize(("field", "value"), [("count", 0), ("first", -1)])
def test_numbers_that_cannot_be_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        Seeds(METHOD, **{field: value})


def planted_stability(k):
    """Of the live rows of three seeds, trained in one program."""
    plant = Plant(features=24, width=16, active=2)
    rows = plant.rows(jax.random.key(0))
    method = SparseAutoencoder(features=48, k=k, learning_rate=1e-2, auxk=0.0)
    (trained,), _ = train(Seeds(method, 3), plant.draw, [rows], Sites("x", "x"), steps=800)
    samples = plant.draw(rows, jax.random.key(77), 8192)["x"]
    live = [np.asarray(each.encode(samples).fired(jnp.ones(8192))) > 40 for each in trained]
    return compare_seeds([np.asarray(each.decoder)[own] for each, own in zip(trained, live, strict=True)])


@pytest.mark.slow
def test_seeds_agree_where_k_is_that_of_the_plant_and_not_where_it_is_not():
    right, wrong = planted_stability(2), planted_stability(6)
    assert right.cosine > wrong.cosine + 0.05 and right.share > wrong.share + 0.2


def test_the_numbers_of_known_dictionaries():
    rows = np.asarray(unit_rows(jax.random.key(0), 20, 12))
    half = np.concatenate([rows[10:], np.asarray(unit_rows(jax.random.key(1), 10, 12))])
    assert compare_seeds([rows, rows[::-1]]) == pytest.approx((1, 1))
    found = compare_seeds([rows, half])
    assert found.share == 0.5 and 0.6 < found.cosine < 0.9
    assert compare_seeds([rows, half, rows]).share == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert compare_seeds([rows, half], threshold=-1.0).share == 1
    with pytest.raises(UserError, match="1 dictionary given, at least 2 needed"):
        compare_seeds([rows])
