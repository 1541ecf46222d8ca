"""Factorising methods through `fit` are their pure functions; what all methods share is in tests/conformance."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import harvest
from jaxinterp.methods.factor import interaction_basis as lib
from jaxinterp.methods.factor import semi_nmf
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.preflight.program_text import exchanges, shape_of
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from tests.methods.laboratory import SITE, subject, text

STREAM = {"site": SITE, "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 5}
KEPT = {"site": SITE, "steps": 20, "batch_size": 256, "rows": 1024, "log_every": 5}
SEMI = SemiNMF(features=16, sparsity=0.25)


@cache
def swept():
    return fit(SEMI, subject(), text(), **KEPT)


def test_the_sweeps_of_fit_are_those_of_factorise():
    """From the start values that `fit` drew: the same loss and features as the pure function, rows of weight 0 out."""
    one = swept()
    final = one.state.method.aux.coefficients
    weight = np.tile(np.r_[0, np.ones(31)], 32)
    assert final.shape == (1024, 16) and float(jnp.abs(final).sum(axis=1)[weight == 0].max()) == 0
    losses = [row["loss"] for row in one.history]
    assert all(0 < loss < 1 for loss in losses) and min(losses) >= one.history[-1]["best"] - 1e-6
    assert int((one.decomposition.decoder != 0).sum(axis=1).max()) <= semi_nmf.kept_entries(0.25, 128)


def test_patience_ends_the_run():
    impatient = SemiNMF(features=16, sparsity=0.25, patience=5, tolerance=0.5)
    early = fit(impatient, subject(), text(), **KEPT | {"steps": 100})
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
    crossing = [shape_of(array) for _, results in exchanges(compiled) for array in results]
    assert (16, 96) in crossing
    assert not any(size in (1024, 128) for shape in crossing for size in shape)


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
