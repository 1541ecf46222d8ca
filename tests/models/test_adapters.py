"""Models written with Penzai, NNX and Linen behave as our own with the same weights. Invariants 1, 2, 3 and 5."""

import dataclasses

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods import Transcoder
from jaxinterp.models.adapters import Places, from_linen, from_nnx, from_penzai, to_penzai
from jaxinterp.models.edits import Add, SetTo
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.rules import RELEVANCE
from jaxinterp.models.run import LanguageModel, run
from jaxinterp.models.sites import replace, select, sites
from jaxinterp.models.transformer import RESIDUAL
from jaxinterp.models.view import tree_html
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from tests.models.flax_llamas import CONFIG, LinenLlama, linen_params, nnx_llama, own_llama, random_tokens
from tests.models.wrapped import Wrapped

INSIDE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "final_norm": "norm"}
NNX = Places(block="layers/{i}", attn="layers/{i}/attention", mlp="layers/{i}/mlp", **INSIDE)
LINEN = Places(block="layer_{i}", attn="layer_{i}/attention", mlp="layer_{i}/mlp", **INSIDE)
TOKENS = random_tokens()
ADAPTED = {
    "penzai": lambda own: from_penzai(to_penzai(own)),
    "nnx": lambda own: from_nnx(nnx_llama(own), NNX),
    "linen": lambda own: from_linen(LinenLlama(), {"params": linen_params(own)}, LINEN),
}
forward = jax.jit(lambda model, tokens: run(model, tokens))


@pytest.fixture(scope="module")
def own():
    return own_llama()


@pytest.fixture(scope="module", params=list(ADAPTED))
def model(request, own):
    return ADAPTED[request.param](own)


@pytest.fixture(scope="module")
def text():
    """64 windows of 16 random tokens."""
    rng = np.random.default_rng(0)
    weight = np.ones(16, np.float32)
    weight[0] = 0
    return grain.MapDataset.source(
        [
            {
                "tokens": rng.integers(0, CONFIG.vocab_size, 16, np.int32),
                "weight": weight,
                "document": np.full(16, index, np.int32),
            }
            for index in range(64)
        ]
    )


def train(model, text, **options):
    method = Transcoder(features=64, k=8, learning_rate=1e-2)
    subject = Subject(model, None, "tiny llama")
    return fit(method, subject, text, site="blocks/1/mlp", steps=20, batch_size=64, buffer_batches=2, **options)


@pytest.fixture(scope="module")
def trained(own, text):
    return train(own, text)


def test_the_names_are_those_of_our_own_model(model, own):
    hidden = ("attn/pattern", "attn/z", "resid/mid") if type(model).__name__ == "FlaxModel" else ()
    flax = type(model).__name__ == "FlaxModel"
    inside = sites(own, "**/*_proj") if flax else sites(own, "**/attn/*_proj")
    assert sites(model) == [
        name for name in sites(own) if not name.endswith(hidden or "no name") and name not in inside
    ]
    with pytest.raises(UserError, match="projections are inside the module"):
        replace(model, {inside[0]: select(own, inside[0]).get()})
    assert sites(model, "blocks/*/mlp") == ["blocks/0/mlp", "blocks/1/mlp"]
    assert isinstance(model, LanguageModel)
    for name in hidden:
        with pytest.raises(UserError, match=r"no site|adapted from Flax"):
            run(model, TOKENS)[f"blocks/0/{name}"]


def test_logits_and_every_array_are_those_of_our_own_model(model, own):
    theirs, ours = forward(model, TOKENS), forward(own, TOKENS)
    assert float(jnp.abs(ours.logits).max()) > 1
    np.testing.assert_allclose(theirs.logits, ours.logits, rtol=1e-5, atol=1e-5)
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(array, ours[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_projection_of_a_penzai_mlp_is_replaced_by_a_plain_one(model, own):
    """Our linear map in the place of Penzai's layer; a Flax module keeps its projections inside."""
    for name in sites(model, "blocks/1/mlp/*_proj"):
        replaced = replace(model, {name: select(own, name).get()})
        np.testing.assert_allclose(forward(replaced, TOKENS).logits, forward(own, TOKENS).logits, rtol=1e-5, atol=1e-5)
        linear = select(own, name).get()
        empty = replace(model, {name: eqx.tree_at(lambda linear: linear.weight, linear, 0 * linear.weight)})
        assert float(jnp.abs(run(empty, TOKENS).logits - run(own, TOKENS).logits).max()) > 0.01


def test_a_wrapping_replacement_is_bit_exact(model):
    """Invariant 1."""
    leaves = ("blocks/0/mlp", "blocks/1/attn", "blocks/1/mlp")
    wrapped = replace(model, {name: Wrapped(select(model, name).get()) for name in leaves})
    assert (forward(wrapped, TOKENS).logits == forward(model, TOKENS).logits).all()
    for name in leaves:
        ports = ("in", "out", "added") if name.endswith("mlp") else ("in", "out")
        assert sites(wrapped, f"{name}/*") == [f"{name}/{port}" for port in ports]


def test_the_inside_of_an_mlp_can_be_cut_at_hidden(model):
    trace = forward(model, TOKENS)
    mlp = select(model, "blocks/1/mlp").get()
    rows = trace["blocks/1/mlp/in"].reshape(-1, CONFIG.d_model)  # any leading axes will do
    hidden = trace["blocks/1/mlp/hidden"].reshape(len(rows), -1)
    np.testing.assert_allclose(mlp.hidden(rows), hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mlp.write(hidden), mlp(rows), rtol=1e-5, atol=1e-5)


EDITED = [
    "embed",
    *(f"blocks/0/{name}" for name in ("resid/pre", "attn/in", "attn/out", "mlp/in", "mlp/pre", "mlp/up", "mlp/hidden")),
    *(f"blocks/1/{name}" for name in ("resid/pre", "mlp/out", "mlp/added", "resid/post")),
    "final",
]


@eqx.filter_jit
def slopes(deltas, model):
    """How one logit answers to each array and to each weight, all in one pass."""

    def logit(both):
        deltas, model = both
        return run(model, TOKENS, edits={name: Add(delta) for name, delta in deltas.items()}).logits[0, -1, 5]

    return eqx.filter_grad(logit)((deltas, model))


@jax.jit
def with_edits(model, edits):
    return run(model, TOKENS, edits=edits)


@pytest.fixture(scope="module")
def our_slopes(own):
    return slopes({name: jnp.zeros_like(forward(own, TOKENS)[name]) for name in EDITED}, own)


def matrices(model):
    return [leaf for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)) if leaf.ndim > 1]


def test_edits_and_gradients_are_those_of_our_own_model(model, own, our_slopes):
    """Invariant 2, derivatives by an added zero, and by every weight."""
    clean = forward(model, TOKENS)
    same = with_edits(model, {name: SetTo(clean[name]) for name in EDITED})
    np.testing.assert_allclose(same.logits, clean.logits, rtol=1e-6, atol=1e-6)
    theirs, their_weights = slopes({name: jnp.zeros_like(clean[name]) for name in EDITED}, model)
    for name, ours in our_slopes[0].items():
        assert float(jnp.abs(ours).max()) > 1e-3, name
        np.testing.assert_allclose(theirs[name], ours, rtol=1e-4, atol=1e-5, err_msg=name)
    norms, our_norms = (
        sorted(float(jnp.linalg.norm(leaf)) for leaf in matrices(tree)) for tree in (their_weights, our_slopes[1])
    )
    assert len(norms) == len(our_norms) == 2 + 7 * CONFIG.layers and our_norms[0] > 0
    np.testing.assert_allclose(norms, our_norms, rtol=1e-4)
    ablation = {"blocks/1/mlp/hidden": SetTo(jnp.zeros(()))}
    ablated = with_edits(model, ablation)
    assert (ablated["blocks/1/mlp/added"] == 0).all() and float(jnp.abs(ablated.logits - clean.logits).max()) > 0.1
    np.testing.assert_allclose(ablated.logits, with_edits(own, ablation).logits, rtol=1e-5, atol=1e-5)


def test_weights_are_arguments_of_the_program(model):
    traced = []

    @jax.jit
    def program(model, tokens):
        traced.append(1)
        return run(model, tokens).logits

    closed = jax.make_jaxpr(program)(model, TOKENS)
    assert max([np.size(constant) for constant in closed.consts], default=0) <= CONFIG.vocab_size
    assert str(closed).count(RESIDUAL) == CONFIG.layers, "what a rematerialised backward pass keeps is marked"
    first = program(model, TOKENS)
    other = program(jax.tree.map(lambda leaf: 1.1 * leaf if getattr(leaf, "ndim", 0) > 1 else leaf, model), TOKENS)
    assert len(traced) == 1 and float(jnp.abs(first - other).max()) > 0.1


def test_layers_nobody_asks_for_are_never_computed(model):
    """Invariant 3."""

    def flops(name):
        program = jax.jit(lambda model, tokens: run(model, tokens)[name]).lower(model, jnp.zeros((4, 32), jnp.int32))
        return program.compile().cost_analysis()["flops"]

    assert flops("blocks/0/mlp/out") < 0.6 * flops("final")


@pytest.mark.parametrize("make", ["penzai", "nnx", pytest.param("linen", marks=pytest.mark.slow)])
def test_a_transcoder_trained_on_it_is_the_one_trained_on_our_own(make, own, text, trained):
    """Invariant 27."""
    model = ADAPTED[make](own)
    result = train(model, text)
    theirs, ours = named_leaves(result.decomposition), named_leaves(trained.decomposition)
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    assert trained.history[-1]["fvu"] < 0.9 * trained.history[0]["fvu"]
    spliced = replace(model, {"blocks/1/mlp": result.decomposition})
    ours = replace(own, {"blocks/1/mlp": trained.decomposition})
    np.testing.assert_allclose(forward(spliced, TOKENS).logits, forward(ours, TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_its_score_is_that_of_our_own(model, own, text, trained):
    rows = [
        score(trained.decomposition, Subject(each, None, "tiny llama"), text, tokens=512, ce_tokens=256)
        for each in (model, own)
    ]
    for name, value in rows[1].items():
        if isinstance(value, float):
            np.testing.assert_allclose(rows[0][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_mesh_changes_nothing(model, text, trained):
    """Invariant 5, the model's weights cut as well."""
    result = train(model, text, mesh=make_mesh(data=2, model=2))
    theirs, ours = named_leaves(result.decomposition), named_leaves(trained.decomposition)
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


def test_what_needs_layers_of_ours_is_refused(model, text):
    with pytest.raises(UserError, match="know no rules"):
        run(model, TOKENS, rules=RELEVANCE)
    with pytest.raises(UserError, match=r"site='blocks/1/mlp' is a .*MLP: the baselines read the neurons"):
        baselines(Subject(model, None, "tiny llama"), text, "blocks/1/mlp", k=4, features=8)


def test_the_view_shows_site_names(model):
    assert "blocks/1/mlp" in tree_html(model)


def test_an_mlp_without_a_table_of_its_inside_has_its_ports_only(own):
    places = Places(mlp="layers/{i}/mlp")
    model = from_nnx(nnx_llama(own), places)
    assert sites(model) == [f"blocks/{i}/mlp{port}" for i in range(2) for port in ("", "/in", "/out", "/added")]
    np.testing.assert_allclose(forward(model, TOKENS).logits, forward(own, TOKENS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="Places do not say where"):
        run(model, TOKENS)["blocks/0/mlp/hidden"]
    with pytest.raises(UserError, match="up='up_proj', down=None"):
        dataclasses.replace(places, up="up_proj")
