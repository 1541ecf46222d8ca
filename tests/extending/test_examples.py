"""What docs/extending.md shows: each example is one file here, and no file of the package knows of it.

Trained on one device and on (data, feature) = (2, 4) by one `compare`, and checked against independent computations.
Methods that sweep, stream and solve are checked in tests/methods/test_lifters.py.
"""

import json
from dataclasses import replace as with_changes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinterp.commands.shell import print_scoreboard
from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.evaluation.comparison import compare
from jaxinterp.methods import SparseAutoencoder, Transcoder
from jaxinterp.models.edits import SetTo
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.tiny import planted_transformer
from jaxinterp.objectives import Forward
from jaxinterp.report.content import Report
from jaxinterp.report.features import feature_pages
from jaxinterp.report.page import write_report
from jaxinterp.training.mesh import make_mesh, model_shardings
from tests.extending.decomposition import KMeans, Prototypes
from tests.extending.effect import AMONG_TEN
from tests.extending.family import TOY
from tests.extending.objective import huber
from tests.extending.term import objective, overlap
from tests.goldens.trainings import MLP, SMALL, subject, text

METHODS = {
    "k-means": KMeans(),
    "huber": Transcoder(features=16, k=3, learning_rate=1e-2, objective=huber),
    "apart": SparseAutoencoder(features=16, k=3, learning_rate=1e-2, objective=objective),
}
SIZES = {"site": MLP, "steps": 4, "rows": 128, "batch_size": 64, "buffer_batches": 2, "tokens": 1024, "ce_tokens": 1024}
TOKENS = jnp.asarray(np.stack([text()[index]["tokens"] for index in range(64)]))


APART = ("apart",)
"""Compared by themselves, so that no one test takes the time of all."""


def compared(names, **options):
    given = {name: METHODS[name] for name in names}
    return compare(given, subject(), text(), text(), **SIZES, effect=AMONG_TEN, progress=False, **options)


@pytest.fixture(scope="module")
def one():
    return compared([name for name in METHODS if name not in APART])


@pytest.fixture(scope="module")
def apart():
    return compared(APART)


@pytest.mark.parametrize("name", METHODS)
def test_each_is_the_same_on_two_by_four_devices(request, name):
    one = request.getfixturevalue("apart" if name in APART else "one")
    assert [row["method"] for row in one.rows] == list(one.fits)
    many = compared([name], mesh=make_mesh(2, 4))
    leaves = named_leaves(many.fits[name].decomposition)
    for leaf, array in named_leaves(one.fits[name].decomposition).items():
        np.testing.assert_allclose(leaves[leaf], array, rtol=1e-3, atol=1e-4, err_msg=leaf)
    for row, other in zip([row for row in one.rows if row["method"] == name], many.rows, strict=True):
        assert all(other[key] == pytest.approx(row[key], rel=1e-3) for key in ("fvu", "among_ten_replaced", "l0"))


def rows_and_dictionary(one, name):
    """A batch of random rows, as float64 as well, and the learned decomposition."""
    learned = one.fits[name].decomposition
    x, y = jax.random.normal(jax.random.key(5), (2, 12, 8))
    batch = make_batch({"x": x, "y": y}, jnp.r_[0.0, jnp.ones(11)], Sites("x", "y"))
    return learned, batch, np.asarray(y, np.float64)


def test_the_objective_is_huber_s(one):
    learned, batch, y = rows_and_dictionary(one, "huber")
    loss, _ = huber(learned, batch, jax.random.key(0))
    error = np.abs(y - np.asarray(learned(batch.inputs))) / float(learned.target_variance) ** 0.5
    each = np.where(error < 1, error**2 / 2, error - 0.5).sum(1)[1:]
    assert float(loss) == pytest.approx(each.mean(), rel=1e-5)
    assert abs((error**2 / 2).sum(1)[1:].mean() - each.mean()) > 0.1, "squares alone would be seen"
    last = one.fits["huber"].history[-1]
    assert last["loss"] == pytest.approx(last["huber"], rel=0.05), "the same number, averaged in another way"


def test_the_term_is_the_mean_squared_cosine(apart):
    learned, batch, _ = rows_and_dictionary(apart, "apart")
    value, _ = overlap()(learned, batch, Forward(None, batch.targets, jax.random.key(0), None))
    rows = np.asarray(learned.decoder, np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.mean(((unit @ unit.T) ** 2)[~np.eye(16, dtype=bool)])
    assert float(value) == pytest.approx(expected, rel=1e-4)
    loss, metrics = objective(learned, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(float(metrics["fvu"].value()) + 3 * expected, rel=1e-4)
    assert {"fvu", "overlap"} <= apart.fits["apart"].history[0].keys()


def test_the_method_s_step_is_lloyd_s():
    """Against NumPy in float64, from the same rows; one sweep fewer is seen."""
    x, y = jax.random.normal(jax.random.key(3), (2, 64, 8))
    weight = jnp.r_[jnp.zeros(4), jnp.ones(60)]
    batch = make_batch({"x": x, "y": y}, weight, Sites("x", "y"), rows=jnp.arange(64))
    recipe = KMeans(6).recipe(3)
    state = recipe.init(jax.random.key(1), batch, None)
    wide = [np.asarray(array, np.float64) for array in (x, y, state.decomposition.encoder, state.decomposition.decoder)]
    counts = np.asarray(weight) > 0
    found = []
    for _ in range(3):
        state, _ = recipe.step(state, batch, jax.random.key(2), None)
        nearest = ((wide[0][:, None] - wide[2]) ** 2).sum(-1).argmin(1)
        for j in set(nearest[counts]):
            wide[2][j], wide[3][j] = (array[(nearest == j) & counts].mean(0) for array in wide[:2])
        found.append(wide[2].copy())
    np.testing.assert_allclose(state.decomposition.encoder, found[-1], atol=1e-5)
    np.testing.assert_allclose(state.decomposition.decoder, wide[3], atol=1e-5)
    assert np.abs(found[-2] - found[-1]).max() > 1e-2


def table(prototypes, x):
    """What the prototypes answer, in NumPy."""
    x, centres = (np.asarray(array, np.float64) for array in (x, prototypes.encoder))
    return np.asarray(prototypes.decoder)[((x[..., None, :] - centres) ** 2).sum(-1).argmin(-1)]


def test_a_new_kind_stands_in_its_leaf_saves_loads_and_is_scored(one, tmp_path):
    learned, model = one.fits["k-means"].decomposition, subject().model
    clean = run(model, TOKENS)
    answers = table(learned, clean[f"{MLP}/in"])
    np.testing.assert_allclose(
        run(replace(model, {MLP: learned}), TOKENS).logits,
        run(model, TOKENS, edits={f"{MLP}/out": SetTo(jnp.asarray(answers))}).logits,
        atol=1e-5,
    )
    folder = save(learned, tmp_path / "mine")
    again = load_decomposition(folder, kinds=(Prototypes,))
    for name, leaf in named_leaves(learned).items():
        np.testing.assert_array_equal(named_leaves(again)[name], leaf)
    assert again.sites == learned.sites
    with pytest.raises(UserError, match=r"'Prototypes' in .* is unknown: pass its class in kinds"):
        load_decomposition(folder)
    y = np.asarray(clean[f"{MLP}/out"], np.float64)[:, 1:]  # the first token of a window has no weight
    fvu = ((y - answers[:, 1:]) ** 2).sum() / ((y - y.mean((0, 1))) ** 2).sum()
    assert one.rows[0]["fvu"] == pytest.approx(fvu, rel=1e-4) and one.rows[0]["l0"] == 1


def test_an_effect_brings_its_columns_to_page_and_terminal(one, tmp_path, capsys):
    learned, model = one.fits["k-means"].decomposition, subject().model
    clean = run(model, TOKENS)

    def share(logits):
        right = np.take_along_axis(logits[:, 1:-1], np.asarray(TOKENS)[:, 2:, None], -1)
        return np.mean((logits[:, 1:-1] > right).sum(-1) < 10)

    value = jnp.where(
        (jnp.arange(16) > 0)[:, None], jnp.asarray(table(learned, clean[f"{MLP}/in"])), clean[f"{MLP}/out"]
    )
    replaced = run(model, TOKENS, edits={f"{MLP}/out": SetTo(value)}).logits
    row = one.rows[0]
    assert row["among_ten_clean"] == pytest.approx(share(np.asarray(clean.logits)))
    assert row["among_ten_replaced"] == pytest.approx(share(np.asarray(replaced)))
    densities, pages = feature_pages(learned, subject(), text(), features=2, tokens=256)
    content = Report("t", "s", {}, one.rows, one.fits["huber"].history, densities, pages, AMONG_TEN)
    html = write_report(content, tmp_path / "report.html").read_text()
    assert "Among ten guesses" in html and "The next token is among ten guesses" in html and ">CE<" not in html
    print_scoreboard(one.rows, AMONG_TEN)
    printed = capsys.readouterr().out
    assert "in ten" in printed and f"{row['among_ten_replaced']:.3f}" in printed and "guesses of 896 next" in printed


def test_two_methods_of_one_class_need_names():
    with pytest.raises(UserError, match="methods: two of the list are of one class"):
        compare([KMeans(2), KMeans(3)], subject(), text(), text(), **SIZES)


def write_toy(folder, model, config):
    """A model under the names and layouts of the toy family, written by hand."""
    folder.mkdir()
    tensors = {
        "toy.embed.weight": model.embedding.token,
        "toy.guess.weight": model.unembedding.weight.T,
        "toy.norm.weight": model.final_norm.weight,
    }
    for number, each in enumerate(model.blocks):
        layer, mlp = f"toy.layer.{number}", each.mlp
        tensors |= {
            f"{layer}.before_attention.weight": each.attn_norm.weight,
            f"{layer}.before_mlp.weight": each.mlp_norm.weight,
            f"{layer}.query.weight": each.attn.q_proj.weight.T,
            f"{layer}.key.weight": each.attn.k_proj.weight.T,
            f"{layer}.value.weight": each.attn.v_proj.weight.T,
            f"{layer}.mix.weight": each.attn.o_proj.weight.T,
            f"{layer}.expand.weight": mlp.up_proj.weight.T,
            f"{layer}.expand.bias": mlp.up_proj.bias,
            f"{layer}.contract.weight": mlp.down_proj.weight.T,
            f"{layer}.contract.bias": mlp.down_proj.bias,
        }
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    fields = {"model_type": "toy", "vocabulary": 64, "width": 8, "depth": 2, "heads": 2, "neurons": 16, "window": 32}
    (folder / "config.json").write_text(json.dumps(fields | config))


def test_a_family_of_one_s_own_is_loaded_on_one_device_and_on_many(tmp_path):
    model = planted_transformer(jax.random.key(0), with_changes(SMALL, kv_heads=2, rotary_dimensions=2))
    write_toy(tmp_path / "toy", model, {})
    loaded = load(tmp_path / "toy", families={"toy": TOY}).model
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(named_leaves(loaded)[name], leaf, err_msg=name)
    logits = run(model, TOKENS[:4]).logits
    np.testing.assert_array_equal(run(loaded, TOKENS[:4]).logits, logits)
    spread = load(tmp_path / "toy", families={"toy": TOY}, sharding=model_shardings(make_mesh(2, 4))).model
    assert len(spread.embedding.token.sharding.device_set) == 8
    np.testing.assert_allclose(run(spread, TOKENS[:4]).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "families", "words"),
    [
        ({}, {}, r"model_type='toy' is not supported"),
        ({"slope": 2.0}, {"toy": TOY}, r"unknown config field slope=2.0"),
        ({"heads": 3}, {"toy": TOY}, r"config field heads=3 is not supported; supported: a divisor of width=8"),
        ({}, {"llama": TOY}, r"model_type 'llama' is supported already"),
    ],
)
def test_what_a_family_does_not_say_is_refused(tmp_path, config, families, words):
    write_toy(tmp_path / "toy", planted_transformer(jax.random.key(0), with_changes(SMALL, kv_heads=2)), config)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "toy", families=families)
