"""Factorising methods through `fit`, on one device and on a mesh, on disk, in the leaf's place, on the scoreboard."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import harvest
from jaxinterp.decompositions.directions import Directions
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods.factor import interaction_basis as lib
from jaxinterp.methods.factor import semi_nmf
from jaxinterp.methods.factor.experts import DenseRival, HiddenExperts
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.models.sites import replace, run
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from tests.methods.laboratory import SITE, subject, text

STREAM = {"site": SITE, "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 5}
KEPT = {"site": SITE, "steps": 20, "batch_size": 256, "rows": 1024, "log_every": 5}
METHODS = {
    "semi_nmf": (SemiNMF(features=16, sparsity=0.25), KEPT),
    "experts": (HiddenExperts(experts=64, k=4, shared=8, rank=8, learning_rate=3e-3), STREAM),
    "full_router": (HiddenExperts(experts=64, k=4, shared=8, rank=None, learning_rate=3e-3), STREAM),
    "dense": (DenseRival(neurons=16, learning_rate=3e-3), STREAM),
    "interaction": (LocalInteractionBasis(directions=16, probes=4), STREAM | {"steps": 5}),
    "analysers": (MixtureOfFactorAnalysers(regions=8, rank=2, learning_rate=3e-3), STREAM),
}
LONG = {"full_router", "dense", "analysers"}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in METHODS]


@cache
def trained(name):
    method, options = METHODS[name]
    return fit(method, subject(), text(), **options)


def tokens():
    return jnp.arange(16).reshape(2, 8)


@pytest.mark.parametrize(
    "name", [pytest.param("experts", marks=pytest.mark.slow), *(n for n in NAMES if n != "experts")]
)
def test_it_is_the_same_on_a_mesh(name):
    """Invariant 5. Directions are compared by what they say of a token, as their signs are free."""
    method, options = METHODS[name]
    one, many = trained(name), fit(method, subject(), text(), **options, mesh=make_mesh(2, 4))
    if isinstance(one.decomposition, Directions):
        x = jax.random.normal(jax.random.key(0), (9, one.decomposition.encoder.shape[1]))
        found, wanted = (d.encode(x).values ** 2 for d in (many.decomposition, one.decomposition))
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-3 * float(wanted.max()))
        np.testing.assert_allclose(many.decomposition.importance, one.decomposition.importance, rtol=1e-4)
        return
    leaves = named_leaves(many.decomposition)
    for leaf_name, leaf in named_leaves(one.decomposition).items():
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(np.asarray(leaves[leaf_name]), leaf, atol=1e-4 * max(scale, 1), err_msg=leaf_name)
    assert many.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-5, abs=1e-5)
    if name != "analysers":  # whose k-means start is so good that 20 steps show noise
        assert one.history[-1]["loss"] < one.history[0]["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_on_disk_replaces_its_leaf_and_has_a_row(name, tmp_path):
    """Invariants 2 and 7: in its leaf's place it does what an edit of its array does."""
    decomposition = trained(name).decomposition
    loaded = load_decomposition(save(decomposition, tmp_path / name))
    assert jax.tree.structure(loaded) == jax.tree.structure(decomposition)
    for leaf_name, leaf in named_leaves(decomposition).items():
        np.testing.assert_array_equal(leaf, named_leaves(loaded)[leaf_name], err_msg=leaf_name)
    model = subject().model
    stands = decomposition
    if decomposition.sites.reads != f"{SITE}/in" or decomposition.sites.writes != f"{SITE}/out":
        stands = StandIn(model.blocks[1].mlp, decomposition)
    there = run(replace(model, {SITE: stands}), tokens()).logits
    clean = run(model, tokens())
    edits = {decomposition.sites.writes: lambda value: decomposition(clean[decomposition.sites.reads])}
    np.testing.assert_allclose(there, run(model, tokens(), edits=edits).logits, rtol=1e-3, atol=1e-3)
    assert float(jnp.abs(there - clean.logits).max()) > 1e-2
    row = score(decomposition, subject(), text(), tokens=1024, ce_tokens=1024)
    assert 0 < row["fvu"] < 1.5 and row["l0"] > 0 and np.isfinite(row["ce_replaced"])


def test_the_sweeps_of_fit_are_those_of_factorise():
    """From the start values that `fit` drew: the same loss and features as the pure function, rows of weight 0 out."""
    _method, _options = METHODS["semi_nmf"]
    one = trained("semi_nmf")
    final = one.state.method.aux.coefficients
    weight = np.tile(np.r_[0, np.ones(31)], 32)
    assert final.shape == (1024, 16) and float(jnp.abs(final).sum(axis=1)[weight == 0].max()) == 0
    losses = [row["loss"] for row in one.history]
    assert all(0 < loss < 1 for loss in losses) and min(losses) >= one.history[-1]["best"] - 1e-6
    assert int((one.decomposition.decoder != 0).sum(axis=1).max()) <= semi_nmf.kept_entries(0.25, 128)


def test_resumed_sweeps_are_the_uninterrupted_ones(tmp_path):
    method, options = METHODS["semi_nmf"]
    options = options | {"checkpoint": tmp_path / "c", "save_every": 10}
    fit(method, subject(), text(), **options, stop_after=10)
    again = fit(method, subject(), text(), **options, resume=True)
    np.testing.assert_array_equal(again.decomposition.decoder, trained("semi_nmf").decomposition.decoder)


def test_patience_ends_the_run():
    _method, options = METHODS["semi_nmf"]
    early = fit(
        SemiNMF(features=16, sparsity=0.25, patience=5, tolerance=0.5), subject(), text(), **options | {"steps": 100}
    )
    assert int(early.state.step) == 10, "the first update is better, five are not; seen at the next logged step"


def test_the_program_of_a_sweep_exchanges_nothing_with_a_token_axis():
    """On data=8 the collectives of one update hold K x d and K x K numbers, and single ones; none 1024 tokens."""
    mesh = make_mesh(8, 1)
    put = lambda *spec: NamedSharding(mesh, P(*spec))
    shapes = [((1024, 96), put("data")), ((1024, 16), put("data")), ((16, 16), put()), ((), put())]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=lies) for shape, lies in shapes]

    def update(rows, coefficients, gram, energy):
        return semi_nmf.sweep(rows, coefficients, gram, energy, 9)

    with jax.set_mesh(mesh):
        compiled = jax.jit(update).lower(*arguments).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", compiled)
    sizes = [shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result)]
    assert "16,96" in sizes
    assert not any(number in ("1024", "128") for shape in sizes for number in shape.split(","))


def test_the_interaction_basis_of_fit_is_that_of_the_pure_functions():
    """With exact derivatives of like tokens: the sum of importances to 10 %, single ones roughly (probes are noisy)."""
    method = LocalInteractionBasis(probes=64)
    found = fit(method, subject(), text(), **STREAM | {"steps": 4, "buffer_batches": 1}).decomposition
    windows = [text()[i] for i in range(48)]
    stacked = {name: jnp.stack([w[name] for w in windows]) for name in ("tokens", "weight", "document")}
    rows = harvest(subject().model, stacked, (f"{SITE}/in",)).flat()
    x = np.asarray(rows.arrays[f"{SITE}/in"])[np.asarray(rows.weight) > 0]
    mlp = subject().model.blocks[1].mlp
    jacobian = lib.jacobian_moment(mlp, jnp.asarray(x[:512]))
    basis = lib.interaction_basis(np.cov(x.T, ddof=0), jacobian, threshold=1e-6, relative=True)
    np.testing.assert_allclose(found.importance[:5], basis.importance[:5], rtol=0.35)
    assert float(found.importance.sum()) == pytest.approx(basis.importance.sum(), rel=0.1)
    assert found.features <= basis.into.shape[0]
    np.testing.assert_allclose(found.encoder @ found.decoder.T, np.eye(found.features), atol=2e-3)


def test_wrong_hyperparameters_are_refused(without_annotations):
    for make, message in [
        (lambda: SemiNMF(start="nndsvd"), "start='nndsvd' must be one of random, svd, kmeans"),
        (lambda: SemiNMF(sparsity=2.0), r"sparsity=2.0 must lie in"),
        (lambda: SemiNMF(features=0), "features=0 must be at least 1"),
        (lambda: LocalInteractionBasis(probes=0), "probes=0 must be at least 1"),
        (lambda: MixtureOfFactorAnalysers(port="pre"), "port='pre' must be one of in, hidden, out"),
        (lambda: fit(SemiNMF(), subject(), text(), site=SITE, steps=1), "rows"),
    ]:
        with pytest.raises(UserError, match=message):
            make()
