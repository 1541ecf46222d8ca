"""A run that was stopped and resumed is the run that was not, for every kind of method, to the last bit. Invariant 9.

Whatever a method changes from step to step must be in its state: counters, thresholds, adapted biases, moments. It is
stopped where such things are under way: within a period of adaptation, between resamplings, in a warm-up.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.trees import named_leaves
from jaxinterp.methods import (
    AttentionSparseAutoencoder,
    CrossLayerTranscoder,
    GatedSparseAutoencoder,
    GradientSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    PerLayerTranscoders,
    Resampling,
    SparseAutoencoder,
    Together,
    TopAFASparseAutoencoder,
    Transcoder,
)
from jaxinterp.training.fit import fit
from tests.methods.dead import HalfDead
from tests.methods.laboratory import SITE, subject, text

SIZES = {"steps": 10, "batch_size": 256, "buffer_batches": 2, "log_every": 2}
SHARED = {"features": 96, "learning_rate": 1e-2, "dead_after": 500}
SEVERAL = "blocks/*/mlp"
BATCH = SparseAutoencoder(**SHARED, k=4, activation="batch_topk")
ACROSS = CrossLayerTranscoder(features=96, activation="topk", k=1, sparsity=1e-3, learning_rate=1e-2, dead_after=500)
RELU = SparseAutoencoder(**SHARED, activation="relu", l1=0.3)
METHODS = {  # and the end of a leaf's name that must not be 0 at the stop
    "group bias": (GroupBiasAdaptation(**SHARED, groups=2, every=4, rate=0.05), SITE, "activation/seen"),
    "batch topk": (BATCH, SITE, "activation/threshold"),
    "across layers": (ACROSS, SEVERAL, "tokens_since_fired"),
    "resampling": (Resampling(HalfDead(RELU), every=4, last=8, dead_after=300), SITE, "count"),
    "gradient": (GradientSparseAutoencoder(**SHARED, k=1), SITE, "tokens_since_fired"),
    "gated": (GatedSparseAutoencoder(**SHARED, penalty_warmup=8), SITE, "activation/gate_bias"),
    "jumprelu": (
        JumpReLUSparseAutoencoder(**SHARED, penalty_warmup=8, parametrisation="raw"),
        SITE,
        "activation/threshold_parameter",
    ),
    "together": (Together({"topk": Transcoder(**SHARED, k=1), "batch": BATCH}), SITE, "activation/threshold"),
    "per layer": (PerLayerTranscoders(Transcoder(**SHARED, k=1)), SEVERAL, "tokens_since_fired"),
    "matryoshka": (MatryoshkaSparseAutoencoder(**SHARED, k=4), SITE, "activation/threshold"),
    "top-AFA": (TopAFASparseAutoencoder(**SHARED, cap=16), SITE, "encoder_bias"),
    "attention": (AttentionSparseAutoencoder(**SHARED, k=1), "blocks/1/attn", "tokens_since_fired"),
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The three runs of a test are one program: it is compiled for the first, and read for the others."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def bits(tree):
    """Every leaf by name; random keys by their data."""

    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return {name: np.asarray(plain(leaf)) for name, leaf in named_leaves(tree).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, name):
    method, site, counted = METHODS[name]
    sizes = SIZES | {"site": site}
    whole = fit(method, subject(), text(), **sizes)
    first = fit(method, subject(), text(), **sizes, checkpoint=tmp_path, stop_after=6)
    second = fit(method, subject(), text(), **sizes, checkpoint=tmp_path, resume=True)
    expected, halfway, found = bits(whole.state), bits(first.state), bits(second.state)
    assert expected.keys() == found.keys()
    for leaf in expected:
        np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)
    moved = [leaf for leaf in expected if leaf.startswith("method") and (expected[leaf] != halfway[leaf]).any()]
    assert len(moved) > 3, "nothing happened after the stop"
    assert any(halfway[leaf].any() for leaf in halfway if leaf.endswith(counted)), f"{counted} was 0 at the stop"
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in second.history]
