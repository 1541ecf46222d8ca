"""Methods: one paper, one file."""

from jaxinterp.methods.afa import TopAFASparseAutoencoder
from jaxinterp.methods.attention_sparse_autoencoder import AttentionSparseAutoencoder, AttentionStandIn
from jaxinterp.methods.base import Method, Recipe, gradient_method
from jaxinterp.methods.cross_layer_transcoder import CrossLayerTranscoder
from jaxinterp.methods.discrete_codes import DiscreteCodes
from jaxinterp.methods.gated import GatedSparseAutoencoder
from jaxinterp.methods.gradient_sparse_autoencoder import GradientSparseAutoencoder
from jaxinterp.methods.group_bias_adaptation import GroupBiasAdaptation
from jaxinterp.methods.jumprelu import JumpReLUSparseAutoencoder
from jaxinterp.methods.matryoshka import MatryoshkaSparseAutoencoder
from jaxinterp.methods.per_layer_transcoders import PerLayerTranscoders
from jaxinterp.methods.resampling import Resampling
from jaxinterp.methods.seeds import Seeds
from jaxinterp.methods.skip_transcoder import SkipTranscoder
from jaxinterp.methods.sparse_autoencoder import SparseAutoencoder
from jaxinterp.methods.together import Together
from jaxinterp.methods.transcoder import Transcoder

__all__ = [
    "AttentionSparseAutoencoder",
    "AttentionStandIn",
    "CrossLayerTranscoder",
    "DiscreteCodes",
    "GatedSparseAutoencoder",
    "GradientSparseAutoencoder",
    "GroupBiasAdaptation",
    "JumpReLUSparseAutoencoder",
    "MatryoshkaSparseAutoencoder",
    "Method",
    "PerLayerTranscoders",
    "Recipe",
    "Resampling",
    "Seeds",
    "SkipTranscoder",
    "SparseAutoencoder",
    "Together",
    "TopAFASparseAutoencoder",
    "Transcoder",
    "gradient_method",
]
