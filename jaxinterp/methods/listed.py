"""The list of methods: the one place that sweeps, comparisons, documents and the conformance suite read.

A new method of the package adds its file and one line here. Yours needs neither: pass it to `fit`.
"""

from dataclasses import dataclass
from typing import Literal

from jaxinterp.core.protocols import Method
from jaxinterp.methods.causal.das import DAS
from jaxinterp.methods.causal.lineas import LinEAS
from jaxinterp.methods.causal.trained_vector import TrainedVector
from jaxinterp.methods.factor.attribution_training import AttributionParameters
from jaxinterp.methods.factor.experts import HiddenExperts
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.parameter_training import AdversarialParameters, StochasticParameters
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.methods.solved.exact_transcoder import ExactTranscoder
from jaxinterp.methods.solved.linear_map import LinearMapMethod
from jaxinterp.methods.solved.neurons import NeuronsMethod
from jaxinterp.methods.solved.principal_components import PrincipalComponentsMethod
from jaxinterp.methods.solved.random_features import RandomFeatures
from jaxinterp.methods.sparse.afa import TopAFASparseAutoencoder
from jaxinterp.methods.sparse.attention_sparse_autoencoder import AttentionSparseAutoencoder
from jaxinterp.methods.sparse.cross_layer_transcoder import CrossLayerTranscoder
from jaxinterp.methods.sparse.gated import GatedSparseAutoencoder
from jaxinterp.methods.sparse.gradient_sparse_autoencoder import GradientSparseAutoencoder
from jaxinterp.methods.sparse.group_bias_adaptation import GroupBiasAdaptation
from jaxinterp.methods.sparse.jumprelu import JumpReLUSparseAutoencoder
from jaxinterp.methods.sparse.matryoshka import MatryoshkaSparseAutoencoder
from jaxinterp.methods.sparse.skip_transcoder import SkipTranscoder
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder
from jaxinterp.methods.sparse.transcoder import Transcoder

Room = Literal["sparse", "factor", "solved", "causal"]


@dataclass(frozen=True)
class Listed:
    """One method: its class, the family that it belongs to, and a site that it can be trained at."""

    method: type[Method]
    family: Room
    site: str = "blocks/1/mlp"


METHODS: dict[str, Listed] = {
    "transcoder": Listed(Transcoder, "sparse"),
    "skip_transcoder": Listed(SkipTranscoder, "sparse"),
    "sparse_autoencoder": Listed(SparseAutoencoder, "sparse"),
    "gated": Listed(GatedSparseAutoencoder, "sparse"),
    "jumprelu": Listed(JumpReLUSparseAutoencoder, "sparse"),
    "matryoshka": Listed(MatryoshkaSparseAutoencoder, "sparse"),
    "top_afa": Listed(TopAFASparseAutoencoder, "sparse"),
    "gradient": Listed(GradientSparseAutoencoder, "sparse"),
    "group_bias": Listed(GroupBiasAdaptation, "sparse"),
    "attention": Listed(AttentionSparseAutoencoder, "sparse", "blocks/1/attn"),
    "cross_layer": Listed(CrossLayerTranscoder, "sparse", "blocks/*/mlp"),
    "hidden_experts": Listed(HiddenExperts, "factor"),
    "linear_transforms": Listed(LinearTransformsMethod, "factor"),
    "mixture_of_decoders": Listed(MixtureOfDecodersMethod, "factor"),
    "product_key_neurons": Listed(ProductKeyNeuronsMethod, "factor"),
    "factor_analysers": Listed(MixtureOfFactorAnalysers, "factor"),
    "interaction_basis": Listed(LocalInteractionBasis, "factor"),
    "semi_nmf": Listed(SemiNMF, "factor"),
    "stochastic_parameters": Listed(StochasticParameters, "factor"),
    "adversarial_parameters": Listed(AdversarialParameters, "factor"),
    "attribution_parameters": Listed(AttributionParameters, "factor"),
    "neurons": Listed(NeuronsMethod, "solved"),
    "principal_components": Listed(PrincipalComponentsMethod, "solved"),
    "linear_map": Listed(LinearMapMethod, "solved"),
    "random_features": Listed(RandomFeatures, "solved"),
    "exact_transcoder": Listed(ExactTranscoder, "solved"),
    "das": Listed(DAS, "causal", "blocks/1/resid/post"),
    "lineas": Listed(LinEAS, "causal", "blocks/1/resid/post"),
    "trained_vector": Listed(TrainedVector, "causal", "blocks/1/resid/post"),
}
"""Every method of the package that `fit` trains, by name."""
