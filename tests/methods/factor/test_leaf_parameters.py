"""Parameter components of one MLP by the error of its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods.factor.parameter_training import StochasticParameters, as_decomposition, start
from jaxinterp.methods.factor.parameters import Coefficients, Mask
from jaxinterp.methods.factor.targets import LeafTarget
from jaxinterp.models.rules import ACTIVATIONS
from jaxinterp.training.fit import fit
from tests.methods.laboratory import SITE, subject, text

TARGET = LeafTarget(SITE)


def batch(tokens=12):
    mlp = subject().model.blocks[1].mlp
    x = jax.random.normal(jax.random.key(0), (tokens, mlp.up_proj.weight.shape[0]))
    return make_batch({f"{SITE}/in": x, f"{SITE}/out": mlp(x)}, jnp.ones(tokens), Sites(f"{SITE}/in", f"{SITE}/out"))


def test_masks_of_one_leave_the_mlp_as_it_is_and_the_unit_is_the_variance():
    model, given = subject().model, batch()
    learned = start(TARGET, jax.random.key(1), model, 6, 4)
    clean = TARGET.clean(model, given)
    ones = {name: Mask(jnp.ones((12, 6)), jnp.ones(12)) for name in learned.parts}
    np.testing.assert_allclose(TARGET.masked(model, learned.parts, given, ones), clean.output, atol=1e-4)
    np.testing.assert_allclose(float(jnp.mean(jnp.var(clean.output, axis=0))), 1, rtol=1e-4)
    none = {name: Mask(jnp.zeros((12, 6)), jnp.ones(12)) for name in ("down_proj",)}
    assert float(jnp.abs(TARGET.masked(model, learned.parts, given, none) - clean.output).max()) > 1e-2


def test_as_a_decomposition_it_computes_the_mlp_of_its_parts():
    """Against the matrices of the open parts, written out; "importance" multiplies, "rounded" keeps or drops."""
    model, given = subject().model, batch()
    learned = start(TARGET, jax.random.key(2), model, 6, 4)
    mlp, x = model.blocks[1].mlp, given.inputs
    mean = jnp.zeros(x.shape[1])
    g = learned.importances(TARGET.clean(model, given).reads)
    for mask in ("importance", "rounded"):
        found = as_decomposition(learned, model, SITE, mean, mask=mask)
        m = {name: one.lower if mask == "importance" else 1.0 * (one.lower > 0) for name, one in g.items()}

        def apply(name, row, inner, m=m):
            parts = learned.parts[name]
            linear = getattr(mlp, name)
            own = np.einsum("c,ci,co->io", np.asarray(m[name][row]), np.asarray(parts.read), np.asarray(parts.write))
            return inner @ own + (0 if linear.bias is None else np.asarray(linear.bias))

        wanted = []
        for row in range(3):
            inner = np.asarray(x[row])
            act = lambda z: np.asarray(ACTIVATIONS[mlp.activation](z))
            if mlp.gate_proj is None:
                hidden = act(apply("up_proj", row, inner))
            else:
                hidden = act(apply("gate_proj", row, inner)) * apply("up_proj", row, inner)
            wanted.append(apply("down_proj", row, hidden))
        np.testing.assert_allclose(found(x[:3]), np.stack(wanted), atol=2e-4)
        codes = found.encode(x)
        assert codes.features == found.features == 6 * len(learned.parts)
        if mask == "rounded":
            names = mlp.projections()
            at = 6 * names.index("up_proj")
            np.testing.assert_array_equal(codes.values[:, at : at + 6] != 0, g["up_proj"].lower > 0)


THROUGH_FIT = StochasticParameters(TARGET, parts=8, learning_rate=3e-3, coefficients=Coefficients(importance=1e-3))


@pytest.fixture(scope="module")
def result():
    return fit(THROUGH_FIT, subject(), text(), site=SITE, steps=10, batch_size=256, buffer_batches=2, log_every=5)


def test_it_is_trained_through_fit_and_has_a_row(result):
    mean = jnp.zeros(subject().model.blocks[1].mlp.down_proj.weight.shape[1])
    found = as_decomposition(result.decomposition, subject().model, SITE, mean)
    row = score(found, subject(), text(), tokens=256, ce_tokens=256)
    assert np.isfinite(row["fvu"]) and row["l0"] > 0 and np.isfinite(row["ce_replaced"])
    with pytest.raises(UserError, match="the target is 'blocks/1/mlp'"):
        THROUGH_FIT.needs("blocks/0/mlp")
