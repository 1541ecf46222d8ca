"""The one list of methods that the conformance suite asks: each as small as it can be, and where it is trained.

A method of the package is here once, under the name that it has in `jaxinterp.methods.listed`; what is made of others
follows. A test compares the two lists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

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
    Seeds,
    SkipTranscoder,
    SparseAutoencoder,
    Together,
    TopAFASparseAutoencoder,
    Transcoder,
)
from jaxinterp.methods.causal.das import DAS, Rotation
from jaxinterp.methods.causal.lineas import LinEAS, Transport
from jaxinterp.methods.causal.trained_vector import TrainedVector, Vector
from jaxinterp.methods.factor.attribution_training import AttributionParameters
from jaxinterp.methods.factor.experts import DenseRival, HiddenExperts
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.parameter_training import AdversarialParameters, StochasticParameters
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.methods.factor.targets import LeafTarget, ProjectionTarget
from jaxinterp.methods.solved.exact_transcoder import ExactTranscoder
from jaxinterp.methods.solved.linear_map import LinearMapMethod
from jaxinterp.methods.solved.neurons import NeuronsMethod
from jaxinterp.methods.solved.principal_components import PrincipalComponentsMethod
from jaxinterp.methods.solved.random_features import RandomFeatures
from jaxinterp.objectives import ghost, reconstruction, total
from tests.methods.dead import HalfDead
from tests.methods.method_in_one_file import SignedSparseAutoencoder, TopKBySize

MLP, SEVERAL, POST = "blocks/0/mlp", "blocks/*/mlp", "blocks/0/resid/post"
RATE = 1e-2


@dataclass(frozen=True)
class Case:
    """One method, and what is particular about it.

    Attributes:
      site: None where the method names its arrays itself.
      options: of `fit`, besides those of every case.
      counts: the end of the name of a leaf of the state that must not be 0 where the run is stopped: what a method
        changes from step to step, stopped where it is under way.
      place: "leaf": it does in its leaf's place what an edit of the array does, and has a row of the scoreboard;
        "array": the same as an edit of the array that it reads; "": it replaces neither.
      kinds: classes of its decomposition that a file may name only where they are given.
      signs: whether directions are free in sign, so that squares are compared.
      text: whether `fit` takes text.
      stepped: whether it has steps; a closed form has none.
      spread: whether its rows of features lie over the mesh; what is solved on the host lies there whole.
      kept: whether its decomposition is one that `save` takes.
      fast: what every run of the suite asks of it; the rest are slow proofs. "all", "alone": what takes one device.
    """

    method: Any
    site: str | None = MLP
    options: Mapping[str, Any] = field(default_factory=dict)
    counts: str = ""
    place: str = "leaf"
    kinds: tuple[type, ...] = ()
    signs: bool = False
    text: bool = True
    kept: bool = True
    stepped: bool = True
    spread: bool = True
    fast: Literal["all", "alone", ""] = ""


SHARED = {"features": 24, "learning_rate": RATE, "dead_after": 100}
WIDE = SHARED | {"features": 96}
"""Of which some features never fire in four steps."""
ACROSS = {"features": 24, "learning_rate": RATE, "dead_after": 100}
FACTORS = {"learning_rate": RATE}
BATCH = SparseAutoencoder(**SHARED, k=3, activation="batch_topk")
RELU = SparseAutoencoder(**SHARED, activation="relu", l1=0.3)
GHOSTS = SparseAutoencoder(**SHARED, activation="relu", objective=total(reconstruction(), ghost(dead_after=64)))
TARGET = ProjectionTarget(("blocks/0/mlp/up_proj",))
PARTS = {"site": None, "place": ""}
ALONE = {"site": None, "place": "", "text": False}
PROMPTS, OTHERS = ((1, 2, 3), (4, 5, 6)), ((7, 8, 9), (10, 11, 12))

LISTED = {
    "transcoder": Case(Transcoder(**WIDE, k=3), counts="tokens_since_fired"),
    "skip_transcoder": Case(SkipTranscoder(**WIDE, k=3), counts="tokens_since_fired"),
    "sparse_autoencoder": Case(BATCH, counts="activation/threshold"),
    "gated": Case(GatedSparseAutoencoder(**SHARED, penalty_warmup=4), counts="activation/gate_bias"),
    "jumprelu": Case(
        JumpReLUSparseAutoencoder(**SHARED, penalty_warmup=4, parametrisation="raw"),
        counts="activation/threshold_parameter",
    ),
    "matryoshka": Case(MatryoshkaSparseAutoencoder(**SHARED, k=3), counts="activation/threshold"),
    "top_afa": Case(TopAFASparseAutoencoder(**SHARED, cap=12), counts="encoder_bias"),
    "gradient": Case(GradientSparseAutoencoder(**WIDE, k=3), counts="tokens_since_fired"),
    "group_bias": Case(GroupBiasAdaptation(**SHARED, groups=2, every=3, rate=0.05), counts="activation/seen"),
    "attention": Case(
        AttentionSparseAutoencoder(**WIDE, k=3), "blocks/0/attn", counts="tokens_since_fired", place="array"
    ),
    "cross_layer": Case(
        CrossLayerTranscoder(**ACROSS | {"features": 96}, activation="topk", k=3, sparsity=1e-3),
        SEVERAL,
        counts="tokens_since_fired",
        place="",
    ),
    "hidden_experts": Case(HiddenExperts(experts=32, k=4, shared=4, rank=4, **FACTORS), fast="alone"),
    "linear_transforms": Case(LinearTransformsMethod(ranks=(8, 4, 4), k=2, **FACTORS)),
    "mixture_of_decoders": Case(MixtureOfDecodersMethod(features=16, hidden=8, k=4, **FACTORS)),
    "product_key_neurons": Case(
        ProductKeyNeuronsMethod(n=4, channels=2, knn=4, d_key=8, **FACTORS),
    ),
    "factor_analysers": Case(MixtureOfFactorAnalysers(regions=4, rank=2, **FACTORS)),
    "interaction_basis": Case(LocalInteractionBasis(directions=6, probes=4), signs=True, fast="alone"),
    "semi_nmf": Case(SemiNMF(features=8, sparsity=0.25), options={"rows": 128}, counts="coefficients", fast="all"),
    "stochastic_parameters": Case(StochasticParameters(TARGET, parts=6, hidden=4, warmup=3, **FACTORS), **PARTS),
    "adversarial_parameters": Case(
        AdversarialParameters(TARGET, parts=6, hidden=4, warmup=3, ascents=1, faithful=1.0, **FACTORS),
        **PARTS,
        counts="sources/blocks/0/mlp/up_proj",
    ),
    "attribution_parameters": Case(AttributionParameters(LeafTarget(MLP), parts=6, k=2.0, **FACTORS), place=""),
    "neurons": Case(NeuronsMethod(k=4), counts="total/hidden"),
    "principal_components": Case(PrincipalComponentsMethod(k=4), counts="total/y", signs=True),
    "linear_map": Case(LinearMapMethod(), counts="total/x"),
    "random_features": Case(RandomFeatures(features=16, k=3), counts="total/codes", spread=False),
    "exact_transcoder": Case(ExactTranscoder(), place="", stepped=False, spread=False),
    "das": Case(DAS(PROMPTS, OTHERS, (1, 2), POST, rate=RATE), **ALONE, kinds=(Rotation,)),
    "lineas": Case(LinEAS(PROMPTS, OTHERS, (POST,), gamma=0.01, rate=RATE), **ALONE, kinds=(Transport,)),
    "trained_vector": Case(TrainedVector(PROMPTS, (1, 2), POST, rate=RATE), **ALONE, kinds=(Vector,)),
}
"""Every method of `jaxinterp.methods.listed`."""

BESIDES = {
    "attention_out": Case(
        AttentionSparseAutoencoder(**SHARED, activation="relu", l1=0.1, array="out"), "blocks/0/attn", place="array"
    ),
    "afa_dense": Case(TopAFASparseAutoencoder(**SHARED)),
    "across_default": Case(CrossLayerTranscoder(**ACROSS, pre_activation=0.01), SEVERAL, place=""),
    "full_router": Case(HiddenExperts(experts=16, k=4, shared=4, rank=None, **FACTORS)),
    "dense": Case(DenseRival(neurons=8, **FACTORS)),
    "ghosts": Case(HalfDead(GHOSTS), counts="tokens_since_fired"),
    "resampling": Case(Resampling(HalfDead(RELU), every=3, last=4, dead_after=100), counts="count"),
    "per_layer": Case(PerLayerTranscoders(SkipTranscoder(**WIDE, k=3)), SEVERAL, counts="tokens_since_fired", place=""),
    "together": Case(
        Together({"topk": Transcoder(**SHARED, k=3), "batch": BATCH}),
        counts="activation/threshold",
        place="",
        kept=False,
    ),
    "seeds": Case(Seeds(Transcoder(**WIDE, k=3), 2), counts="tokens_since_fired", place="", kept=False),
    "of_ones_own": Case(SignedSparseAutoencoder(features=24, k=3, learning_rate=RATE), kinds=(TopKBySize,)),
}
"""Other settings, methods made of methods, and one that is written in a file of its own."""

CASES = LISTED | BESIDES


def names(wanted=lambda case: True, alone=True):
    """Names of cases for `parametrize`; those that not every run asks are slow proofs.

    alone: whether the question takes one device only.
    """
    fast = ("all", "alone") if alone else ("all",)
    return [
        pytest.param(name, marks=() if case.fast in fast else pytest.mark.slow)
        for name, case in CASES.items()
        if wanted(case)
    ]
