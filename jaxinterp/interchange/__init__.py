"""Dictionaries of other libraries: SAELens, sparsify, Gemma Scope 1 and 2, circuit-tracer, Llama Scope and more."""

from jaxinterp.interchange.circuit_tracer import decoder_rows
from jaxinterp.interchange.formats import Format, as_jumprelu, read, write
from jaxinterp.interchange.hub import card, push
from jaxinterp.interchange.neuronpedia import write_neuronpedia
from jaxinterp.interchange.probe import Probe, probe
from jaxinterp.interchange.releases import Entry, Release, directory

__all__ = [
    "Entry",
    "Format",
    "Probe",
    "Release",
    "as_jumprelu",
    "card",
    "decoder_rows",
    "directory",
    "probe",
    "push",
    "read",
    "write",
    "write_neuronpedia",
]
