"""Dictionaries of other libraries: SAELens, sparsify, Gemma Scope, dictionary_learning."""

from jaxinterp.interchange.formats import Format, as_jumprelu, read, write
from jaxinterp.interchange.probe import Probe, probe

__all__ = ["Format", "Probe", "as_jumprelu", "probe", "read", "write"]
