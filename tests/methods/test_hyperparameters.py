"""Invalid hyperparameters are refused when they are given: by name, with the value and a way out."""

from dataclasses import fields

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.methods import (
    AttentionSparseAutoencoder,
    GatedSparseAutoencoder,
    GradientSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    SkipTranscoder,
    SparseAutoencoder,
    TopAFASparseAutoencoder,
    Transcoder,
)
from jaxinterp.objectives import reconstruction, total

pytestmark = pytest.mark.usefixtures("without_annotations")

EVERY = (
    SparseAutoencoder,
    Transcoder,
    SkipTranscoder,
    GatedSparseAutoencoder,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    GradientSparseAutoencoder,
    TopAFASparseAutoencoder,
    AttentionSparseAutoencoder,
)


CHOOSE = (SparseAutoencoder, Transcoder, SkipTranscoder, MatryoshkaSparseAutoencoder, AttentionSparseAutoencoder)


@pytest.mark.parametrize("method", CHOOSE)
def test_an_unknown_activation_is_refused(method):
    with pytest.raises(UserError, match="activation='topkk' must be"):
        method(activation="topkk")


def test_what_a_method_does_not_use_it_does_not_have():
    """No k that says nothing, no activation that is fixed."""
    names = {method: {field.name for field in fields(method)} for method in EVERY}
    assert all({"activation", "k"} <= names[method] for method in CHOOSE)
    assert "k" in names[GradientSparseAutoencoder] and "activation" not in names[GradientSparseAutoencoder]
    for method in (GatedSparseAutoencoder, JumpReLUSparseAutoencoder, TopAFASparseAutoencoder, GroupBiasAdaptation):
        own = {field.name for field in fields(method)}
        assert not {"activation", "k"} & own, method
    assert not {"l1", "auxk", "normalise"} & {field.name for field in fields(GroupBiasAdaptation)}


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 0}, "features=0 must be at least 1"),
        ({"features": 8.0}, "features=8.0 must be a whole number"),
        ({"l1": -0.1}, "l1=-0.1 must not be negative"),
        ({"auxk": -0.1}, "auxk=-0.1 must not be negative"),
        ({"dead_after": -1}, "dead_after=-1 must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
    ],
)
def test_numbers_and_words_of_every_dictionary_method(method, change, words):
    with pytest.raises(UserError, match=words):
        method(**change)


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        (SparseAutoencoder, {"k": 3.5}, "k=3.5 must be a whole number"),
        (SparseAutoencoder, {"k": True}, "k=True must be a whole number"),
        (Transcoder, {"features": 8, "k": 9}, "k=9 must lie between 1 and features=8"),
        (SparseAutoencoder, {"activation": "topkk"}, r"JumpReLU.start\(...\). Did you mean 'topk'"),
        (SparseAutoencoder, {"array": "outt"}, "array='outt' must be one of out, hidden, in. Did you mean 'out'"),
        (AttentionSparseAutoencoder, {"array": "hidden"}, "array='hidden' must be one of z, out"),
        (GatedSparseAutoencoder, {"penalty_warmup": -1}, "penalty_warmup=-1 must be at least 0"),
        (JumpReLUSparseAutoencoder, {"penalty_warmup": 0.5}, "penalty_warmup=0.5 must be a whole number"),
    ],
)
def test_those_of_one_method(method, change, words):
    with pytest.raises(UserError, match=words):
        method(**change)


@pytest.mark.parametrize("method", [SparseAutoencoder, Transcoder, MatryoshkaSparseAutoencoder])
def test_a_relu_that_nothing_makes_sparse_is_refused(method):
    with pytest.raises(UserError, match=r"l1=0\.0 with activation='relu' makes nothing sparse"):
        method(activation="relu")
    assert method(activation="relu", l1=0.01).l1 == 0.01
    assert method(activation="relu", objective=total(reconstruction())).l1 == 0
    assert isinstance(method(activation=ReLU()).make_activation(), ReLU), "by value it is taken as it is"


@pytest.mark.parametrize("method", [m for m in EVERY if m is not AttentionSparseAutoencoder])
def test_a_method_of_one_leaf_takes_no_more(method):
    for site in (("a", "b"), ("a",)):
        with pytest.raises(UserError, match=r"is not a single leaf, such as blocks/3/mlp.*PerLayerTranscoders"):
            method().needs(site)
    assert method().needs("a").leaf == "a"
