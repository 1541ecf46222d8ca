"""A method that is defined in one file of 30 lines is trained, spread, saved, scored and swept as any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.evaluation.planted.laboratory import Plant, train
from jaxinterp.evaluation.planted.recovery import mcc
from jaxinterp.methods import SparseAutoencoder, Together
from tests.methods.laboratory import SITE, fitted
from tests.methods.method_in_one_file import SignedSparseAutoencoder

PLANT = Plant()


def signed(rows, key, samples):
    """Samples of the plant whose coefficients have random signs."""
    code_key, sign_key = jax.random.split(key)
    codes = PLANT.codes(code_key, samples)
    return {"x": codes * jnp.where(jax.random.bernoulli(sign_key, shape=codes.shape), 1.0, -1.0) @ rows}


def found(method):
    """The matched cosine with a plant of signed features, whatever the sign of a row."""
    rows = PLANT.rows(jax.random.key(0))
    (dictionary,), _ = train(method, signed, [rows], Sites("x", "x"), steps=1000)
    return mcc(rows, np.concatenate([dictionary.decoder, -dictionary.decoder]))


@pytest.mark.slow
def test_it_recovers_what_it_was_made_for_and_topk_of_one_sign_does_not():
    sizes = {"features": 64, "k": 3, "learning_rate": 1e-2}
    assert found(SignedSparseAutoencoder(**sizes)) > 0.96
    assert found(SparseAutoencoder(**sizes, auxk=0.0)) < 0.95


def test_it_is_swept_and_compared():
    several = {f"k {k}": SignedSparseAutoencoder(features=64, k=k) for k in (2, 4)}
    learned = fitted(Together(several)).decomposition
    assert [one.activation.k for one in learned.values()] == [2, 4]
    assert Together(several).needs(SITE).sites == Sites((f"{SITE}/out",), (f"{SITE}/out",))
