"""A planted model whose neurons are the features, and the index of the dictionary that is this MLP."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.activations import TopK
from jaxinterp.explore.build import build_index
from jaxinterp.explore.labels import Labels
from jaxinterp.explore.state import Explorer
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.tiny import TINY, planted_transformer
from tests.report.as_dictionary import as_dictionary

WINDOWS, SEQ = 10, 32
SITES = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")
ASKED = {"model": "planted", "dictionary": "made for tests"}


@pytest.fixture(scope="session")
def subject():
    config = dataclasses.replace(TINY, layers=2)
    return Subject(eqx.filter_jit(planted_transformer)(jax.random.key(0), config), byte_tokenizer(), "planted")


@pytest.fixture(scope="session")
def dictionary(subject):
    return as_dictionary(subject, SITES, TopK(6))


@pytest.fixture(scope="session")
def dataset():
    """Windows of random bytes, two documents each; position 0 has weight 0."""
    random = np.random.default_rng(1)
    weight = np.ones(SEQ, np.float32)
    weight[0] = 0
    return [
        {
            "tokens": random.integers(97, 105, SEQ).astype(np.int32),
            "weight": weight,
            "document": (2 * number + (np.arange(SEQ) >= 20)).astype(np.int32),
        }
        for number in range(WINDOWS)
    ]


@pytest.fixture(scope="session")
def index(tmp_path_factory, subject, dictionary, dataset):
    folder = tmp_path_factory.mktemp("run") / "explore"
    return build_index(folder, dictionary, subject, dataset, ASKED, tokens=WINDOWS * SEQ)


@pytest.fixture
def explorer(index, subject, dictionary, tmp_path):
    return Explorer(index, Labels(tmp_path / "labels.json", index.features), lambda: (dictionary, subject))
