"""Protocols of `core.decomposition`, which terms and pages read, asked of every listed dictionary."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.decomposition import Decomposition, Features, Normalised, Revivable, Shown, Target, Vectors
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import as_needs
from jaxinterp.decompositions.plain import LinearMap
from jaxinterp.methods.listed import METHODS
from jaxinterp.report.features import feature_pages
from tests.goldens.trainings import subject, text

DICTIONARIES = sorted(
    name
    for name, listed in METHODS.items()
    if listed.family == "sparse" and name not in ("attention", "cross_layer") and listed.site == "blocks/1/mlp"
)
MAP = LinearMap(jnp.ones((4, 4)), jnp.zeros(4), jnp.zeros(4), Sites("blocks/0/mlp/in", "blocks/0/mlp/out"))


def started(name):
    """The decomposition that a listed method starts from, as shapes: nothing is computed."""
    listed = METHODS[name]
    method = listed.method(features=40)
    needs = as_needs(method.needs(listed.site))
    arrays = dict.fromkeys(needs.names(), jax.random.normal(jax.random.key(0), (16, 4)))
    batch = make_batch(arrays, jnp.ones(16), needs.sites)
    init = method.recipe(2).init
    return eqx.filter_eval_shape(lambda key: init(key, batch, None).decomposition, jax.random.key(1))


@pytest.mark.parametrize("name", DICTIONARIES)
def test_every_listed_dictionary_is_what_terms_and_pages_read(name):
    found = started(name)
    for protocol in (Decomposition, Target, Vectors, Features, Revivable, Normalised, Shown):
        if protocol is Normalised and name == "gradient":
            continue  # its input has a gradient beside it: `ghost` is not for it
        assert isinstance(found, protocol), protocol.__name__


def test_the_list_is_not_empty_and_a_linear_map_is_a_decomposition_without_vectors():
    assert len(DICTIONARIES) >= 8
    assert isinstance(MAP, Decomposition)
    assert not any(isinstance(MAP, protocol) for protocol in (Target, Vectors, Features, Revivable, Normalised, Shown))
    with pytest.raises(UserError, match="LinearMap has no encoder and decoder rows"):
        feature_pages(MAP, subject(), text())
