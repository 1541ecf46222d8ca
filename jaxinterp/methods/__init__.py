"""Methods: one paper, one file."""

from jaxinterp.methods.base import Method, Recipe, gradient_method
from jaxinterp.methods.skip_transcoder import SkipTranscoder
from jaxinterp.methods.sparse_autoencoder import SparseAutoencoder
from jaxinterp.methods.transcoder import Transcoder

__all__ = ["Method", "Recipe", "SkipTranscoder", "SparseAutoencoder", "Transcoder", "gradient_method"]
