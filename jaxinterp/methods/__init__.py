"""Methods: one paper, one file."""

from jaxinterp.core.protocols import Method, MethodState, Recipe
from jaxinterp.methods.combine.per_layer_transcoders import PerLayerTranscoders
from jaxinterp.methods.combine.resampling import Resampling
from jaxinterp.methods.combine.seeds import Seeds
from jaxinterp.methods.combine.together import Together
from jaxinterp.methods.documented import add_hyperparameters
from jaxinterp.methods.factor.experts import DenseRival, HiddenExperts
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.methods.recipes import alternating_method, closed_form, gradient_method, streaming_method
from jaxinterp.methods.sparse.afa import TopAFASparseAutoencoder
from jaxinterp.methods.sparse.attention_sparse_autoencoder import AttentionSparseAutoencoder, AttentionStandIn
from jaxinterp.methods.sparse.cross_layer_transcoder import CrossLayerTranscoder
from jaxinterp.methods.sparse.discrete_codes import DiscreteCodes
from jaxinterp.methods.sparse.gated import GatedSparseAutoencoder
from jaxinterp.methods.sparse.gradient_sparse_autoencoder import GradientSparseAutoencoder
from jaxinterp.methods.sparse.group_bias_adaptation import GroupBiasAdaptation
from jaxinterp.methods.sparse.jumprelu import JumpReLUSparseAutoencoder
from jaxinterp.methods.sparse.matryoshka import MatryoshkaSparseAutoencoder
from jaxinterp.methods.sparse.skip_transcoder import SkipTranscoder
from jaxinterp.methods.sparse.sparse_autoencoder import SparseAutoencoder
from jaxinterp.methods.sparse.transcoder import Transcoder

__all__ = [
    "AttentionSparseAutoencoder",
    "AttentionStandIn",
    "CrossLayerTranscoder",
    "DenseRival",
    "DiscreteCodes",
    "GatedSparseAutoencoder",
    "GradientSparseAutoencoder",
    "GroupBiasAdaptation",
    "HiddenExperts",
    "JumpReLUSparseAutoencoder",
    "LocalInteractionBasis",
    "MatryoshkaSparseAutoencoder",
    "Method",
    "MethodState",
    "MixtureOfFactorAnalysers",
    "PerLayerTranscoders",
    "Recipe",
    "Resampling",
    "Seeds",
    "SemiNMF",
    "SkipTranscoder",
    "SparseAutoencoder",
    "Together",
    "TopAFASparseAutoencoder",
    "Transcoder",
    "alternating_method",
    "closed_form",
    "gradient_method",
    "streaming_method",
]

for _name in __all__:
    if isinstance(globals()[_name], type):
        add_hyperparameters(globals()[_name])
