"""Factorisations, experts, spectra, parameter components: decompositions that are not sparse dictionaries."""
